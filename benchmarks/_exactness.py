"""`exactness`: distances of images of parallel decoding from sequential ones, beside the rounding errors of float32."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from _work import Work, header, write_json

CHUNK = 64
ALONE = 4
"""Number of images that are also decoded alone."""

LIMIT = 1e-3
"""Largest difference of an image at the default tolerance, in the images' range [-1, 1]."""

FINE_TOLERANCE = 1e-5
FINE_LIMIT = 1e-4
"""Largest difference at FINE_TOLERANCE, or 4 x the float32 floor where that is more."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def largest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Each image's largest absolute difference, [B]."""
    return np.asarray(np.abs(a - b).reshape(len(a), -1).max(axis=1))


def distribution(values: np.ndarray) -> dict[str, float]:
    """Median, 95 and 99 % points and maximum."""
    median, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"median": float(median), "p95": float(p95), "p99": float(p99), "max": float(values.max())}


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
        print(f"{'guidance  compared':44s} {'median':>8s} {'p95':>8s} {'p99':>8s} {'max':>8s}    limit")

    def add(self, guidance: float, name: str, values: np.ndarray, limit: float | None = None) -> None:
        """One distribution over images; a value that is not finite misses every limit."""
        spread = distribution(values)
        failed = limit is not None and not spread["max"] <= limit
        self.missed |= failed
        self.rows.append({"guidance": guidance, "compared": name, "images": len(values), **spread, "limit": limit})
        said = "" if limit is None else f"{limit:8.1e}{' missed' if failed else ''}"
        numbers = " ".join(f"{value:8.1e}" for value in spread.values())
        print(f"{guidance:5.1f}  {name:37s} {numbers} {said}", flush=True)
        if self.path:
            write_json(self.path, {"header": self.head, "missed": self.missed, "rows": self.rows})


def exactness(options: argparse.Namespace, work: Work) -> int:
    """Print and write the distributions; 1 where a limit is missed, else 0."""
    import tarflow_runtimes as tfr

    coarse, fine = "default tolerance", f"tolerance {FINE_TOLERANCE:g}"
    plans: dict[str, tfr.Parallel | None] = {
        "sequential": None,
        coarse: tfr.Parallel(window=options.window),
        fine: tfr.Parallel(window=options.window, tolerance=FINE_TOLERANCE),
    }
    head = header(model=work.model, images=options.images, plans={name: repr(plan) for name, plan in plans.items()})
    report = _Report(head, options.json)
    z, labels = work.noise(options.images, seed=0), work.labels(options.images)
    with tfr.load(work.bundle) as flow:
        for guidance in options.guidance:
            single, double = pytorch(work, z, labels, guidance)
            lowest = largest(single, double)
            report.add(guidance, "PyTorch float32 to float64 (floor)", lowest)
            images = {
                name: decoded(flow, z, labels, guidance=guidance, plan=plan, name=name) for name, plan in plans.items()
            }
            report.add(guidance, "sequential to PyTorch float64", largest(images["sequential"], double))
            limits = {coarse: LIMIT, fine: max(FINE_LIMIT, 4 * float(lowest.max()))}
            for name, limit in limits.items():
                report.add(guidance, f"{name} to sequential", largest(images[name], images["sequential"]), limit)
            alone = [
                flow.decode(z[i : i + 1], labels and labels[i : i + 1], guidance=guidance, plan=plans[coarse])
                for i in range(min(ALONE, len(z)))
            ]
            report.add(
                guidance, f"{coarse}: alone, in a batch", largest(np.concatenate(alone), images[coarse][: len(alone)])
            )
            if not guidance:
                for name, x in images.items():
                    back, _ = flow.encode(x, labels)
                    report.add(guidance, f"round trip of noise, {name}", largest(back, z))
    print("a limit is missed" if report.missed else "all limits hold")
    return int(report.missed)


def decoded(flow: Any, z: np.ndarray, labels: list[int] | None, *, guidance: float, plan: Any, name: str) -> np.ndarray:
    """Images of these latents, CHUNK at a time, with progress messages."""
    parts = []
    for start in range(0, len(z), CHUNK):
        chunk = slice(start, start + CHUNK)
        parts.append(flow.decode(z[chunk], labels and labels[chunk], guidance=guidance, plan=plan))
        say(f"guidance {guidance:g}, {name}: {min(start + CHUNK, len(z))} of {len(z)}")
    return np.concatenate(parts)
