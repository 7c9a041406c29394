"""`measure_floors`: what a card can do at most, measured with PyTorch: read and copy memory, multiply matrices.

`floor_seconds` is the time that sampling cannot go below on it: the larger of its bytes and its operations at these
rates (`sequential_work`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.measure.bench_results import sequential_work

ROUNDS = 10
"""Repetitions of each measurement; the fastest counts, for a limit is what nothing disturbed."""

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def measure_floors(device: str, *, tiny: bool = False) -> dict[str, float]:
    """GB/s of a matrix-vector product and of a copy (a byte counts twice there), TFLOP/s of products by dtype.

    A gigabyte is read and squares of 8192 are multiplied, so that starting the work does not count; `tiny` is for
    trying the script.
    """
    return _memory(device, rows=1 << 8 if tiny else 1 << 17) | {
        f"{dtype}_tflops": _product(device, dtype, side=256 if tiny else 8192) for dtype in BYTES
    }


def _memory(device: str, *, rows: int) -> dict[str, float]:
    import torch

    matrix = torch.ones(rows, 4096, dtype=torch.float16 if device == "cuda" else torch.float32, device=device)
    vector, target = torch.ones_like(matrix[0]), torch.empty_like(matrix)
    return {
        "read_gbs": 1e-9 * matrix.nbytes / _fastest(device, lambda: torch.mv(matrix, vector)),
        "copy_gbs": 2e-9 * matrix.nbytes / _fastest(device, lambda: target.copy_(matrix)),
    }


def _product(device: str, dtype: str, *, side: int) -> float:
    import torch

    square = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
    out = torch.empty_like(square)
    return 2e-12 * side**3 / _fastest(device, lambda: torch.mm(square, square, out=out))


def _fastest(device: str, work: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS repetitions, after two to warm up."""
    import torch

    seconds = []
    for _ in range(ROUNDS + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


def floor_seconds(floors: dict[str, float], config: ModelConfig, *, rows: int, dtype: str) -> float:
    """Seconds below which `rows` rows cannot go through all blocks, weights and caches in that dtype."""
    work = sequential_work(config, rows=rows, weight_bytes=BYTES[dtype], cache_bytes=BYTES[dtype])
    bandwidth = 1e9 * max(floors["read_gbs"], floors["copy_gbs"])
    return max(work.bytes / bandwidth, work.operations / (1e12 * floors[f"{dtype}_tflops"]))
