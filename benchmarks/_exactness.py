"""`exactness`: distances of images from float64, and of parallel from sequential ones, beside float32 rounding."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from _work import Work, header, write_json

CHUNK = 64
ALONE = 4
"""Number of images that are also decoded alone."""

LIMIT = 1e-4
"""Largest difference of an image in [-1, 1] at the default tolerance, or 4 x the float32 floor where that is more."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def largest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Each image's largest absolute difference, [B]."""
    return np.asarray(np.abs(a - b).reshape(len(a), -1).max(axis=1))


def distribution(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of each image's largest difference: median, 95 and 99 % points, maximum; and the rms of all values."""
    images = largest(a, b)
    median, p95, p99 = np.percentile(images, [50, 95, 99])
    rms = np.sqrt(np.mean(np.square(a.astype(np.float64) - b)))
    return {
        "median": float(median),
        "p95": float(p95),
        "p99": float(p99),
        "max": float(images.max()),
        "rms": float(rms),
    }


def pytorch(work: Work, z: np.ndarray, labels: list[int] | None, guidance: float) -> tuple[np.ndarray, np.ndarray]:
    """Sequential images of these latents by PyTorch in float32 and in float64; their difference is the floor."""
    import torch
    from _published import Segments, gs_jacobi

    from tarflow_sdk import Guidance, load_checkpoint

    model = load_checkpoint(work.weights, image_channels=work.config["image_channels"]).eval()
    sequential = [Segments(count=work.patches)] * work.config["blocks"]
    images = []
    for dtype in (torch.float32, torch.float64):
        model, parts = model.to(dtype), []
        for start in range(0, len(z), CHUNK):
            chunk = slice(start, start + CHUNK)
            y = None if labels is None else torch.tensor(labels[chunk])
            x = torch.from_numpy(z[chunk]).to(dtype)
            parts.append(gs_jacobi(model, x, y, Guidance(weight=guidance), strategy=sequential)[0].numpy())
            say(f"guidance {guidance:g}, PyTorch {str(dtype)[6:]}: {min(start + CHUNK, len(z))} of {len(z)}")
        images.append(np.concatenate(parts))
    return images[0], images[1]


class _Report:
    """Rows of distributions, printed and written immediately; `missed` is set when a limit is missed."""

    def __init__(self, head: dict[str, Any], path: str | None) -> None:
        self.head, self.path = head, path
        self.rows: list[dict[str, Any]] = []
        self.missed = False
        print("largest |difference| of each image, in the range [-1, 1]")
        print(f"{'guidance  compared':44s} {'median':>8s} {'p95':>8s} {'p99':>8s} {'max':>8s} {'rms':>8s}    limit")

    def add(self, guidance: float, name: str, a: np.ndarray, b: np.ndarray, limit: float | None = None) -> float:
        """One comparison, and its largest difference; a value that is not finite misses every limit."""
        spread = distribution(a, b)
        failed = limit is not None and not spread["max"] <= limit
        self.missed |= failed
        self.rows.append({"guidance": guidance, "compared": name, "images": len(a), **spread, "limit": limit})
        said = "" if limit is None else f"{limit:8.1e}{' missed' if failed else ''}"
        numbers = " ".join(f"{value:8.1e}" for value in spread.values())
        print(f"{guidance:5.1f}  {name:37s} {numbers} {said}", flush=True)
        if self.path:
            write_json(self.path, {"header": self.head, "missed": self.missed, "rows": self.rows})
        return spread["max"]


def exactness(options: argparse.Namespace, work: Work) -> int:
    """Print and write the distributions; 1 where a limit is missed, else 0. The limit of `native` is `ort-cpu`."""
    import tarflow_runtimes as tfr

    plan = tfr.Parallel(window=options.window)
    report = _Report(header(model=work.model, images=options.images, plan=repr(plan)), options.json)
    z, labels = work.noise(options.images, seed=0), work.labels(options.images)
    with tfr.load(work.bundle, engine="native") as native, tfr.load(work.bundle, engine="ort-cpu") as ort_cpu:
        for guidance in options.guidance:
            single, double = pytorch(work, z, labels, guidance)
            floor = report.add(guidance, "PyTorch float32 to float64 (floor)", single, double)
            stepped = {flow.engine.name: decoded(flow, z, labels, guidance, None) for flow in (ort_cpu, native)}
            furthest = report.add(guidance, "ort-cpu to PyTorch float64", stepped["ort-cpu"], double)
            report.add(guidance, "native to PyTorch float64", stepped["native"], double, furthest)
            parallel = decoded(ort_cpu, z, labels, guidance, plan)
            report.add(guidance, "parallel to sequential", parallel, stepped["ort-cpu"], max(LIMIT, 4 * floor))
            alone = [
                ort_cpu.decode(z[i : i + 1], labels and labels[i : i + 1], guidance=guidance, plan=plan)
                for i in range(min(ALONE, len(z)))
            ]
            report.add(guidance, "parallel: alone, in a batch", np.concatenate(alone), parallel[: len(alone)])
            if not guidance:
                for name, x in (stepped | {"parallel": parallel}).items():
                    report.add(guidance, f"round trip of noise, {name}", ort_cpu.encode(x, labels)[0], z)
    print("a limit is missed" if report.missed else "all limits hold")
    return int(report.missed)


def decoded(flow: Any, z: np.ndarray, labels: list[int] | None, guidance: float, plan: Any) -> np.ndarray:
    """Images of these latents, CHUNK at a time, with progress messages."""
    parts = []
    for start in range(0, len(z), CHUNK):
        chunk = slice(start, start + CHUNK)
        parts.append(flow.decode(z[chunk], labels and labels[chunk], guidance=guidance, plan=plan))
        name = f"{flow.engine.name}, {plan or 'sequential'}"
        say(f"guidance {guidance:g}, {name}: {min(start + CHUNK, len(z))} of {len(z)}")
    return np.concatenate(parts)
