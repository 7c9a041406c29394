"""`measure_ceilings`: the machine's limits, measured with NumPy: multiplying matrices, reading and copying memory.

The work runs in a separate process, whose BLAS is limited to one thread before it is loaded. Measurements with all
threads use that many Python threads, each with a part of the work (NumPy releases the interpreter lock).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tarflow_runtimes.engines.ort_cpu.cpus import usable_cpus
from tarflow_runtimes.errors import EngineError

GEMM_SIZE: Final = 1024
"""Side of the square matrices: 4 MiB each, so that arithmetic and not memory is the bottleneck."""

STREAM_BYTES: Final = 256 << 20
"""Bytes read by the matrix-vector product and by the copy: several times the last-level cache of most processors."""

ROUNDS: Final = 7
"""Repetitions of each measurement; the fastest counts, because disturbances can only slow it down."""

BLAS_THREADS: Final = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""Environment variables that set the number of threads of the known BLAS libraries."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """float32 matrix product in GFLOP/s; memory in GB/s (1e9 bytes): read by a matrix-vector product, and copied.

    A copied byte counts twice, once read and once written.
    """

    gemm_gflops: float
    gemv_gbs: float
    copy_gbs: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Rates of one thread and of `threads` threads together, and the BLAS library that computed them."""

    blas: str
    threads: int
    one_thread: Rates
    all_threads: Rates


def measure_ceilings(*, gemm_size: int = GEMM_SIZE, stream_bytes: int = STREAM_BYTES, rounds: int = ROUNDS) -> Ceilings:
    """Measure this machine: a few seconds, and twice `stream_bytes` of memory in another process.

    Raises:
        EngineError: when the other process fails.
    """
    source = str(Path(__file__).resolve().parents[1])
    environment = os.environ | dict.fromkeys(BLAS_THREADS, "1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    sizes = [str(value) for value in (gemm_size, stream_bytes, rounds, usable_cpus())]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tarflow_runtimes.measure.ceilings", *sizes],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EngineError(
            f"the machine's ceilings could not be measured: {reason}", hint="leave them out: --no-ceilings"
        )
    answer = json.loads(done.stdout)
    return Ceilings(
        blas=answer["blas"],
        threads=answer["threads"],
        one_thread=Rates(**answer["one_thread"]),
        all_threads=Rates(**answer["all_threads"]),
    )


def _rates(gemm_size: int, stream_bytes: int, rounds: int, threads: int) -> dict[str, float]:
    """The fastest of `rounds` repetitions of each kind of work, shared by `threads` threads.

    gemm: 2 m^3 operations a product of [m, m] matrices, one product a thread;
    gemv: the bytes of the matrix, its rows cut over the threads;
    copy: twice the bytes of the source, cut over the threads.
    """
    import numpy as np

    squares = np.random.default_rng(0).standard_normal((threads, 2, gemm_size, gemm_size), dtype=np.float32)
    products = np.empty((threads, gemm_size, gemm_size), np.float32)
    columns = 4096  # a long row: 16 KiB in one piece
    matrix = np.ones((max(threads, stream_bytes // (4 * columns)), columns), np.float32)
    vector = np.ones(columns, np.float32)
    copied = np.zeros_like(matrix)
    sums = np.empty(len(matrix), np.float32)
    cuts = [slice(len(matrix) * i // threads, len(matrix) * (i + 1) // threads) for i in range(threads)]

    def gemm(i: int) -> None:
        np.matmul(squares[i, 0], squares[i, 1], out=products[i])

    def gemv(i: int) -> None:
        np.matmul(matrix[cuts[i]], vector, out=sums[cuts[i]])

    def copy(i: int) -> None:
        np.copyto(copied[cuts[i]], matrix[cuts[i]])

    return {
        "gemm_gflops": 2e-9 * threads * gemm_size**3 / _fastest(gemm, threads, rounds),
        "gemv_gbs": 1e-9 * matrix.nbytes / _fastest(gemv, threads, rounds),
        "copy_gbs": 2e-9 * matrix.nbytes / _fastest(copy, threads, rounds),
    }


def _fastest(work: Callable[[int], None], threads: int, rounds: int) -> float:
    """Seconds of the fastest of `rounds` repetitions in which every thread does its part, after one warm-up."""
    gate = threading.Barrier(threads + 1)

    def part(index: int) -> None:
        for _ in range(rounds + 1):
            gate.wait()
            work(index)
            gate.wait()

    workers = [threading.Thread(target=part, args=(index,), daemon=True) for index in range(threads)]
    for worker in workers:
        worker.start()
    seconds = []
    for _ in range(rounds + 1):
        gate.wait()
        started = time.perf_counter()
        gate.wait()
        seconds.append(time.perf_counter() - started)
    for worker in workers:
        worker.join()
    return min(seconds[1:])


def _blas() -> str:
    """The BLAS library that NumPy was built with, as `name version`."""
    import numpy as np

    found: Any = np.show_config(mode="dicts")
    library = found.get("Build Dependencies", {}).get("blas", {}) if isinstance(found, dict) else {}
    return f"{library.get('name', 'unknown')} {library.get('version', '')}".strip()


def _main(arguments: list[str]) -> None:
    gemm_size, stream_bytes, rounds, threads = map(int, arguments)
    answer = {
        "blas": _blas(),
        "threads": threads,
        "one_thread": _rates(gemm_size, stream_bytes, rounds, 1),
        "all_threads": _rates(gemm_size, stream_bytes, rounds, threads),
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
