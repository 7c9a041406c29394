"""The density: `log_prob` and `denoise` of this SDK against the same on PyTorch, whose gradient is autograd's.

    python benchmarks/density.py [--model mnist|photos] [--batch 1,16,64,256] [--json FILE]

Each side runs in a separate process and is called in turn on the same noisy images, with no thread variables set;
seconds are medians over the rounds, ratios are medians of the rounds' ratios. Batches run in increasing order, so that
the peak memory after a batch is that of the batch; it is given as the growth of the process since its model was loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _peer import Peer, resident, serve
from _work import CHECKPOINTS, Work, header, write_json

TASKS = ("log_prob", "denoise")


def serve_density(tasks: dict[str, Callable[..., np.ndarray]], runtime: str) -> None:
    """Answer requests for a task on the images of a file; the detail is the growth of this process so far, MB."""
    loaded = resident("VmRSS")

    def work(task: str, images: str, labels: list[int] | None) -> tuple[np.ndarray, float]:
        return tasks[task](np.load(images), labels), resident("VmHWM") - loaded

    serve(work, runtime=runtime)


def serve_torch(work: Work) -> None:
    """Our PyTorch model: the forward pass without gradients, and the denoiser by autograd."""
    import torch

    from tarflow_sdk import denoise, load_checkpoint, log_prob

    model = load_checkpoint(work.weights, image_channels=work.config["image_channels"]).eval().requires_grad_(False)

    def tensors(images: np.ndarray, labels: list[int] | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.from_numpy(images), None if labels is None else torch.tensor(labels)

    def run_log_prob(*given: Any) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(log_prob(model, *tensors(*given)).numpy())

    def run_denoise(*given: Any) -> np.ndarray:
        return np.asarray(denoise(model, *tensors(*given), noise_std=work.config["noise_std"]).numpy())

    runtime = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    serve_density({"log_prob": run_log_prob, "denoise": run_denoise}, runtime)


def serve_ours(work: Work) -> None:
    """This SDK on `ort-cpu`."""
    import tarflow_runtimes as tfr

    flow = tfr.load(work.bundle, engine="ort-cpu")
    sigma = work.config["noise_std"]
    tasks = {"log_prob": flow.log_prob, "denoise": lambda images, labels: flow.denoise(images, labels, sigma=sigma)}
    serve_density(tasks, f"onnxruntime {version('onnxruntime')}")


SIDES = {"ours": serve_ours, "torch": serve_torch}


def compare(peers: dict[str, Peer], work: Work, task: str, batch: int, rounds: int) -> dict[str, Any]:
    """Both sides in turn on the same images: seconds (medians), ours over PyTorch's, largest relative difference."""
    images = work.folder / "images.npy"
    shape = (batch, work.config["image_channels"], work.config["image_size"], work.config["image_size"])
    np.save(images, np.random.default_rng(batch).uniform(-1, 1, shape).astype(np.float32))
    request = {"task": task, "images": str(images), "labels": work.labels(batch)}
    results = {}
    for name, peer in peers.items():
        peer.call(**request, save=str(work.folder / f"{name}.npy"))
        results[name] = np.load(work.folder / f"{name}.npy").astype(np.float64)
    times: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        for name in list(peers) if turn % 2 else list(peers)[::-1]:
            times[name].append(peers[name].call_rested(**request))
    return {
        "task": task,
        "batch": batch,
        "ours_ms": 1e3 * median(times["ours"]),
        "torch_ms": 1e3 * median(times["torch"]),
        "ours_over_torch": median(a / b for a, b in zip(times["ours"], times["torch"], strict=True)),
        "relative_difference": float(np.abs(results["ours"] - results["torch"]).max() / np.abs(results["torch"]).max()),
        "ours_peak_mb": peers["ours"].detail,
        "torch_peak_mb": peers["torch"].detail,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(CHECKPOINTS), default="mnist", help="trained weights")
    parser.add_argument("--batch", default="1,16,64,256", help="in rising order")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    script = str(Path(__file__).resolve())
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Work.prepare(arguments.model, CHECKPOINTS[arguments.model], Path(name))
        for task in TASKS:
            peers = {side: Peer(side, script, name) for side in SIDES}
            if not rows:
                runtimes = {side: peer.ready["runtime"] for side, peer in peers.items()}
                head = header(model=work.model, rounds=arguments.rounds, **runtimes)
                print(json.dumps(head))
                print("task      batch   ours ms  torch ms  ours/torch  rel. diff  ours peak MB  torch peak MB")
            for batch in map(int, arguments.batch.split(",")):
                row = compare(peers, work, task, batch, arguments.rounds)
                rows.append(row)
                print(
                    f"{task:9s} {batch:5d} {row['ours_ms']:9.2f} {row['torch_ms']:9.2f} {row['ours_over_torch']:11.2f}"
                    f" {row['relative_difference']:10.1e} {row['ours_peak_mb']:13.0f} {row['torch_peak_mb']:14.0f}",
                    flush=True,
                )
            for peer in peers.values():
                peer.close()
    if arguments.json:
        write_json(arguments.json, {"header": head, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        SIDES[sys.argv[2]](Work.open(sys.argv[3]))
    else:
        main()
