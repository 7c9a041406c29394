"""Steps of a wide model: the original eager PyTorch sampler, and this SDK with float32, bfloat16 and int8 weights.

    python benchmarks/int8.py --reference PATH/TO/ml-tarflow [--batch 1,4,16] [--blocks 2] [--json FILE]
    python benchmarks/int8.py --effect [--json FILE]

The shape is that of the published AFHQ model, 256 x 256 x 3, patch 8, width 768, 8 layers, with random weights, and by
default 2 of its 8 blocks. Of the CPU engines only `native` reads bfloat16. Each side runs in a separate process and is
called in turn; times are those of the first steps of every block, where the original's caches, which it copies at each
step, are still short.

`--effect` measures the effect of int8 on images of the trained models, from the same noise, without guidance, denoising
or timing. The density of both is computed with the float32 model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _peer import Peer, resident, serve
from _work import CHECKPOINTS, Work, header, write_json

SHAPE = {"image_size": 256, "image_channels": 3, "patch_size": 8, "width": 768, "layers": 8, "classes": 3}
PATCHES, PATCH_VALUES, LABEL = 1024, 192, 1
ORIGINAL_SHAPE = {
    "in_channels": 3, "img_size": 256, "patch_size": 8, "channels": 768, "layers_per_block": 8, "nvp": True,
    "num_classes": 3,
}  # fmt: skip


SIDES = ["original", "ort-cpu float32", "ort-cpu int8", "native float32", "native bfloat16", "native int8"]


def prepare(folder: Path, blocks: int) -> None:
    """Write the original checkpoint and the bundles, unless they are there."""
    from tarflow_export import convert_bundle, export_bundle
    from tarflow_sdk import FlowConfig, save_checkpoint
    from tarflow_sdk.testing import random_model

    if (folder / "int8.tarflow").exists():
        return
    model = random_model(FlowConfig(**SHAPE, blocks=blocks, noise_std=0.07))
    save_checkpoint(model, folder / "wide.pth")
    export_bundle(model, folder / "float32.tarflow", verify=False)
    for precision in ("bfloat16", "int8"):
        made = folder / f"{precision}.tarflow"
        convert_bundle(folder / "float32.tarflow", made, precision=precision, verify=False)


def serve_ours(folder: str, engine: str, precision: str) -> None:
    """This SDK on that engine, block by block."""
    import tarflow_runtimes as tfr
    from tarflow_runtimes.decode.turn import Conditions, Turn

    imported = resident("VmRSS")
    flow = tfr.load(Path(folder) / f"{precision}.tarflow", engine=engine, verify_digests=False)

    def first_patches(block: int, z: np.ndarray, steps: int) -> np.ndarray:
        given = Conditions(
            labels=np.full((1, len(z)), LABEL),
            guidance=np.zeros((len(z), 2, PATCHES), np.float32),
            inverse_temperature=np.ones((1, len(z)), np.float32),
        )
        x, _ = flow.engine.invert([Turn(block=block, strategy=tfr.Sequential(), steps=steps)], z, given)
        return (x if block % 2 == 0 else x[:, ::-1])[:, : steps + 1].copy()

    def work(noise: str, steps: int) -> tuple[np.ndarray, Any]:
        z = np.load(noise)
        x = [first_patches(block, z, steps) for block in reversed(range(flow.config.blocks))]
        return np.stack(x), resident("VmHWM")

    weights = flow.bundle.block_bytes * flow.config.blocks / 1e6
    serve(work, imported=imported, weights=weights)


def serve_original(folder: str, reference: str, blocks: str) -> None:
    """The original code, imported from its own folder: each block's `reverse` on a sequence cut short, eager."""
    sys.path.insert(0, reference)
    import torch
    import transformer_flow

    imported = resident("VmRSS")
    model = transformer_flow.Model(**ORIGINAL_SHAPE, num_blocks=int(blocks)).eval()
    model.load_state_dict(torch.load(Path(folder) / "wide.pth", weights_only=True, mmap=True))
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e6

    @torch.no_grad()
    def work(noise: str, steps: int) -> tuple[np.ndarray, Any]:
        z = torch.from_numpy(np.load(noise))
        y = torch.full((len(z),), LABEL)
        x = []
        for index in reversed(range(len(model.blocks))):
            ordered = z if index % 2 == 0 else z.flip(1)
            first = ordered[:, : steps + 1]
            found = model.blocks[index].reverse(first.clone() if index % 2 == 0 else first.flip(1), y)
            x.append(found if index % 2 == 0 else found.flip(1))
        return torch.stack(x).numpy(), resident("VmHWM")

    serve(work, imported=imported, weights=weights)


def compare(
    peers: list[Peer], folder: Path, *, batch: int, blocks: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """All samplers in turn on the same noise, a row each: time per step, ratio to the first, difference from it."""
    noise = np.random.default_rng(batch).standard_normal((batch, PATCHES, PATCH_VALUES), dtype=np.float32)
    np.save(folder / "noise.npy", noise)
    request = {"noise": str(folder / "noise.npy"), "steps": steps}
    patches = []
    for peer in peers:
        peer.call(**request, save=str(folder / "x.npy"))
        patches.append(np.load(folder / "x.npy").astype(np.float64))
    times = np.array([[peer.call(**request) for peer in peers] for _ in range(rounds)])
    rows = []
    for index, peer in enumerate(peers):
        ratios, difference = times[:, 0] / times[:, index], patches[index] - patches[0]
        error = float(np.mean(difference**2))
        rows.append(
            {
                "batch": batch,
                "sampler": peer.name,
                "ms_per_step": 1e3 * statistics.median(times[:, index]) / (blocks * steps),
                "speedup": statistics.median(ratios),
                "speedup_low": ratios.min(),
                "speedup_high": ratios.max(),
                "max_difference": float(np.abs(difference).max()),
                "relative_difference": float(np.sqrt(error / np.mean(patches[0] ** 2))),
                "peak_mb": peer.detail,
                "weights_mb": peer.ready["weights"],
                "peak_over_weights": peer.detail / peer.ready["weights"],
                "growth_over_weights": (peer.detail - peer.ready["imported"]) / peer.ready["weights"],
            }
        )
    return rows


def effect(name: str, folder: Path, images: int) -> dict[str, Any]:
    """A trained model's images in int8 beside those in float32; mean and worst of each measure."""
    import tarflow_runtimes as tfr
    from tarflow_export import convert_bundle

    work = Work.prepare(name, CHECKPOINTS[name], folder / name)
    rounded = convert_bundle(work.bundle, folder / f"{name}-int8.tarflow", precision="int8", verify=False).path
    labels = work.labels(images)
    with tfr.load(work.bundle) as stored, tfr.load(rounded) as changed:
        x, y = (flow.sample(images, labels=labels, seed=0, denoise=False).images for flow in (stored, changed))
        bits, bits_float32 = stored.bits_per_dim(y, labels), stored.bits_per_dim(x, labels)
    difference = np.abs(y.astype(np.float64) - x).reshape(images, -1)
    psnr = [10 * math.log10(4 / square) if square else math.inf for square in np.square(difference).mean(axis=1)]
    return {
        "model": work.model,
        "images": images,
        "psnr_db": [float(np.mean(psnr)), min(psnr)],
        "max_difference": [float(difference.max(axis=1).mean()), float(difference.max())],
        "bits_per_dim": [float(bits.mean()), float(bits.max())],
        "bits_per_dim_float32": [float(bits_float32.mean()), float(bits_float32.max())],
    }


def print_effect(images: int, path: str | None) -> None:
    """The effect on both trained models."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [effect(name, Path(folder), images) for name in CHECKPOINTS]
    for row in rows:
        print(f"{row['model']}, {images} images: mean, worst")
        for name in ("psnr_db", "max_difference", "bits_per_dim", "bits_per_dim_float32"):
            print(f"  {name:22s} {row[name][0]:9.4f} {row[name][1]:9.4f}")
    if path:
        write_json(path, {"header": header(), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="", help="folder of the original code (transformer_flow.py)")
    parser.add_argument("--effect", action="store_true", help="images of trained models in int8 against float32")
    parser.add_argument("--images", type=int, default=16, help="--effect: images")
    parser.add_argument("--batch", default="1", help="as 1,4,16")
    parser.add_argument("--samplers", default=",".join(SIDES), help=f"of {', '.join(SIDES)}; ratios are to the first")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32, help="of each block")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="keep checkpoint and bundle here")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    if arguments.effect:
        print_effect(arguments.images, arguments.json)
        return
    if not (Path(arguments.reference) / "transformer_flow.py").is_file():
        parser.error("--reference must name the folder of the original code, with transformer_flow.py in it")
    script, reference = str(Path(__file__).resolve()), str(Path(arguments.reference).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, arguments.blocks)
        peers = [
            Peer(name, script, str(folder), reference, str(arguments.blocks)) for name in arguments.samplers.split(",")
        ]
        head = header(shape=SHAPE | {"blocks": arguments.blocks}, steps=arguments.steps, rounds=arguments.rounds)
        print(json.dumps(head))
        print(
            "batch  sampler          ms/step  speed-up  (low..high)  relative diff  peak MB  weights MB  growth/weights"
        )
        rows = []
        for batch in map(int, arguments.batch.split(",")):
            for row in compare(
                peers, folder, batch=batch, blocks=arguments.blocks, steps=arguments.steps, rounds=arguments.rounds
            ):
                rows.append(row)
                print(
                    f"{row['batch']:5d}  {row['sampler']:15s} {row['ms_per_step']:8.2f} {row['speedup']:8.2f}x"
                    f" {row['speedup_low']:5.2f}..{row['speedup_high']:.2f} {row['relative_difference']:14.1e}"
                    f" {row['peak_mb']:8.0f} {row['weights_mb']:11.0f} {row['growth_over_weights']:15.2f}",
                    flush=True,
                )
        for peer in peers:
            peer.close()
    if arguments.json:
        write_json(arguments.json, {"header": head, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        side, folder, *given = sys.argv[2:]
        if side == "original":
            serve_original(folder, *given)
        else:
            serve_ours(folder, *side.split())
    else:
        main()
