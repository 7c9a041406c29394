"""`import_cuda`: import NVIDIA's runtime API and check driver and GPU; `checked`: check the status of its calls.

A missing package, a missing driver, an old driver and a missing GPU are four different errors, each with a remedy.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from tarflow_runtimes.doctor.requirements import DRIVER, NO_DRIVER, NO_GPU, VISIBLE
from tarflow_runtimes.errors import EngineError

INSTALL: Final = 'pip install "cuda-python>=12.9"'


@functools.cache
def import_cuda() -> Any:
    """The module of the CUDA runtime, on a machine with a usable GPU.

    Raises:
        EngineError: when the package, the driver or the GPU is missing, or the driver too old for the package.
    """
    runtime = cuda_runtime()
    supported = driver_version()
    if not supported:
        raise EngineError(NO_DRIVER, hint=DRIVER)
    status, count = runtime.cudaGetDeviceCount()
    name = status.name
    if name == "cudaErrorInsufficientDriver":
        needed = checked(runtime, runtime.cudaRuntimeGetVersion())
        raise EngineError(
            f"the NVIDIA driver supports CUDA {dotted(supported)}, cuda-python needs CUDA {dotted(needed)}",
            hint=f'pip install "cuda-python=={supported // 1000}.*", or update the driver',
        )
    if name == "cudaErrorNoDevice" or (name == "cudaSuccess" and not count):
        raise EngineError(NO_GPU, hint=VISIBLE)
    checked(runtime, (status, count))
    return runtime


def cuda_runtime() -> Any:
    """The module of the CUDA runtime, without checking the machine.

    Raises:
        EngineError: when cuda-python is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError("a GPU is used through cuda-python, which is not installed", hint=INSTALL) from error
    return runtime


def driver_version() -> int:
    """The newest CUDA that the driver supports, 1000 * major + 10 * minor; 0 if no driver is loaded.

    Raises:
        EngineError: when cuda-python is not installed.
    """
    runtime = cuda_runtime()
    try:
        version: int = checked(runtime, runtime.cudaDriverGetVersion())
    except RuntimeError:  # cuda-python 12 does not find the driver's library; 13 answers 0
        return 0
    return version


def checked(runtime: Any, answer: tuple[Any, ...]) -> Any:
    """The result of a call of the runtime API, which returns (status, result, ...).

    Raises:
        EngineError: with the name of the status, unless it is cudaSuccess.
    """
    status, *results = answer
    if status != runtime.cudaError_t.cudaSuccess:
        text = runtime.cudaGetErrorString(status)[1]
        text = text.decode() if isinstance(text, bytes) else str(text)
        raise EngineError(f"CUDA: {status.name}: {text}", hint=_HINTS.get(status.name, ""))
    return results[0] if results else None


_HINTS: Final = {
    "cudaErrorMemoryAllocation": "decode fewer images at a time: batch_size (--batch-size)",
    "cudaErrorInsufficientDriver": DRIVER,
}


def dotted(version: int) -> str:
    """Format a version, as 13.4 for 13040."""
    return f"{version // 1000}.{version % 1000 // 10}"
