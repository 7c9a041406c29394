"""Sequential sampling: this SDK on ONNX Runtime against the original eager PyTorch sampler, same weights, same noise.

    python benchmarks/sampling.py --reference PATH/TO/ml-tarflow [--model mnist|photos] [--batch 1,16,64] [--json FILE]

Each side runs in a separate process and is called in turn, with no thread variables set; times are medians over the
rounds, the ratio is the median of the rounds' ratios. The images of both sides are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _peer import Peer
from _samplers import SAMPLERS
from _work import SHAPES, Work, header, write_json


def compare(ours: Peer, original: Peer, work: Work, *, batch: int, guidance: float, rounds: int) -> dict[str, float]:
    """Both samplers in turn on the same noise: seconds (medians), their ratio and the largest difference."""
    request = work.request(batch, guidance)
    images = []
    for peer in (ours, original):
        peer.call(**request, save=str(work.folder / f"{peer.name}.npy"))
        images.append(np.load(work.folder / f"{peer.name}.npy"))
    times = [tuple(peer.call_rested(**request) for peer in (ours, original)) for _ in range(rounds)]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "batch": batch,
        "guidance": guidance,
        "ours_ms_per_step": 1e3 * mine / work.steps,
        "original_ms_per_step": 1e3 * theirs / work.steps,
        "ours_images_per_s": batch / mine,
        "original_images_per_s": batch / theirs,
        "speedup": statistics.median(b / a for a, b in times),
        "speedup_low": min(b / a for a, b in times),
        "speedup_high": max(b / a for a, b in times),
        "max_difference": float(np.abs(images[0] - images[1]).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of the original code (transformer_flow.py)")
    parser.add_argument("--model", choices=sorted(SHAPES), default="mnist", help="shape with random weights")
    parser.add_argument("--checkpoint", help="use this checkpoint instead of random weights")
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--guidance", default="0")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    if not (Path(arguments.reference) / "transformer_flow.py").is_file():
        parser.error(f"{arguments.reference} has no transformer_flow.py")
    script = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as name:
        work = Work.prepare(arguments.model, arguments.checkpoint, Path(name))
        given = (script, name, str(Path(arguments.reference).resolve()))
        ours, original = Peer("sequential", *given), Peer("original", *given)
        head = header(
            model=work.model,
            ours=ours.ready["runtime"],
            original=original.ready["runtime"],
            rounds=arguments.rounds,
        )
        print(json.dumps(head))
        print("batch guide  ours ms/step  original  images/s  speed-up  (low..high)   max diff")
        rows = []
        for batch in map(int, arguments.batch.split(",")):
            for guidance in map(float, arguments.guidance.split(",")):
                row = compare(ours, original, work, batch=batch, guidance=guidance, rounds=arguments.rounds)
                rows.append(row)
                print(
                    f"{batch:5d} {guidance:5.1f} {row['ours_ms_per_step']:13.3f} {row['original_ms_per_step']:9.3f}"
                    f" {row['ours_images_per_s']:9.2f} {row['speedup']:8.2f}x"
                    f" {row['speedup_low']:6.2f}..{row['speedup_high']:.2f} {row['max_difference']:9.1e}",
                    flush=True,
                )
        ours.close()
        original.close()
    if arguments.json:
        write_json(arguments.json, {"header": head, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        SAMPLERS[sys.argv[2]].serve(Work.open(sys.argv[3]), sys.argv[4])
    else:
        main()
