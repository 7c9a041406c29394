"""Sequential sampling: this SDK on ONNX Runtime against the original eager PyTorch sampler, same weights, same noise.

    python benchmarks/sampling.py --reference PATH/TO/ml-tarflow [--model mnist|photos] [--batch 1,16,64] [--json FILE]

Each side lives in a process of its own and is called in turn, with no thread variables set; times are medians over
the rounds, the ratio is the median of the rounds' ratios. The pictures of both sides are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _peer import Peer, serve

MODELS = {
    "mnist": {
        "image_size": 28,
        "image_channels": 1,
        "patch_size": 4,
        "width": 128,
        "blocks": 4,
        "layers": 4,
        "classes": 10,
    },
    "photos": {
        "image_size": 32,
        "image_channels": 3,
        "patch_size": 2,
        "width": 256,
        "blocks": 4,
        "layers": 4,
        "classes": 0,
    },
}


def prepare(name: str, checkpoint: str | None, folder: Path) -> tuple[Path, Path, dict[str, int]]:
    """The model of this name as (original checkpoint, bundle, what the original constructor needs)."""
    from tarflow_export import export_bundle
    from tarflow_sdk import FlowConfig, load_checkpoint, save_checkpoint
    from tarflow_sdk.testing import random_model

    model = load_checkpoint(checkpoint) if checkpoint else random_model(FlowConfig(**MODELS[name], noise_std=0.1))
    weights, bundle = folder / "model.pth", folder / "model.tarflow"
    save_checkpoint(model, weights)
    export_bundle(model, bundle, verify=False)
    config = model.config
    shape = {
        "in_channels": config.image_channels,
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "channels": config.width,
        "num_blocks": config.blocks,
        "layers_per_block": config.layers,
        "nvp": config.nvp,
        "num_classes": config.classes,
    }
    return weights, bundle, shape


def serve_ours(bundle: str) -> None:
    """This SDK: `Flow.decode` on `ort-cpu`."""
    import tarflow_runtimes as tfr

    flow = tfr.load(bundle, engine="ort-cpu")

    def work(noise: str, labels: list[int] | None, guidance: float) -> np.ndarray:
        return flow.decode(np.load(noise), labels=labels, guidance=guidance)

    serve(work, runtime=f"onnxruntime {version('onnxruntime')}")


def serve_original(weights: str, reference: str, shape: str) -> None:
    """The original code, imported from its own folder: `Model.reverse`, float32, eager."""
    sys.path.insert(0, reference)
    import torch
    import transformer_flow

    model = transformer_flow.Model(**json.loads(shape)).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))

    @torch.no_grad()
    def work(noise: str, labels: list[int] | None, guidance: float) -> np.ndarray:
        y = None if labels is None else torch.tensor(labels)
        return model.reverse(torch.from_numpy(np.load(noise)), y, guidance).numpy()  # type: ignore[no-any-return]

    serve(work, runtime=f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def compare(ours: Peer, original: Peer, folder: Path, *, batch: int, guidance: float, rounds: int) -> dict[str, float]:
    """Both samplers in turn on the same noise: seconds (medians), their ratio and the largest difference."""
    manifest = json.loads((folder / "model.tarflow" / "manifest.json").read_text())["config"]
    patch_values = manifest["image_channels"] * manifest["patch_size"] ** 2
    patches = (manifest["image_size"] // manifest["patch_size"]) ** 2
    noise = np.random.default_rng(batch).standard_normal((batch, patches, patch_values), dtype=np.float32)
    np.save(folder / "noise.npy", noise)
    labels = [i % manifest["classes"] for i in range(batch)] if manifest["classes"] else None
    request = {"noise": str(folder / "noise.npy"), "labels": labels, "guidance": guidance}
    images = []
    for peer in (ours, original):
        peer.call(**request, save=str(folder / f"{peer.name}.npy"))
        images.append(np.load(folder / f"{peer.name}.npy"))
    times: list[tuple[float, float]] = [(ours.call(**request), original.call(**request)) for _ in range(rounds)]
    steps = manifest["blocks"] * (patches - 1)
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "batch": batch,
        "guidance": guidance,
        "ours_ms_per_step": 1e3 * mine / steps,
        "original_ms_per_step": 1e3 * theirs / steps,
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
    parser.add_argument("--model", choices=sorted(MODELS), default="mnist", help="shape with random weights")
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
        folder = Path(name)
        weights, bundle, shape = prepare(arguments.model, arguments.checkpoint, folder)
        ours = Peer("ours", script, str(bundle))
        original = Peer("original", script, str(weights), str(Path(arguments.reference).resolve()), json.dumps(shape))
        header = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
            "model": arguments.checkpoint or arguments.model,
            "ours": ours.ready["runtime"],
            "original": original.ready["runtime"],
            "rounds": arguments.rounds,
        }
        print(json.dumps(header))
        print("batch guide  ours ms/step  original  images/s  speed-up  (low..high)   max diff")
        rows = []
        for batch in map(int, arguments.batch.split(",")):
            for guidance in map(float, arguments.guidance.split(",")):
                row = compare(ours, original, folder, batch=batch, guidance=guidance, rounds=arguments.rounds)
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
        Path(arguments.json).write_text(json.dumps({"header": header, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        {"ours": serve_ours, "original": serve_original}[sys.argv[2]](*sys.argv[3:])
    else:
        main()
