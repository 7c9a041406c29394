"""`measure_floors`: the limits of a card, measured with PyTorch: reading and copying memory, multiplying matrices.

`floor_seconds` is the minimal sampling time at these limits: the larger of the times for its bytes and its operations
(`sequential_work`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.measure.bench_results import sequential_work

ROUNDS = 10
"""Repetitions of each measurement; the fastest counts, because disturbances can only slow it down."""

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def measure_floors(device: str, *, tiny: bool = False) -> dict[str, float]:
    """GB/s of a matrix-vector product and of a copy (a byte counts twice there), TFLOP/s of products by dtype.

    A gigabyte is read and matrices of 8192 x 8192 are multiplied, so that launch overhead is negligible; `tiny` is for
    testing the script.
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
    """Minimal seconds for `rows` rows through all blocks, with weights and caches in that dtype."""
    work = sequential_work(config, rows=rows, weight_bytes=BYTES[dtype], cache_bytes=BYTES[dtype])
    bandwidth = 1e9 * max(floors["read_gbs"], floors["copy_gbs"])
    return max(work.bytes / bandwidth, work.operations / (1e12 * floors[f"{dtype}_tflops"]))
