"""Run as a script: import a package, load a library or query the driver, and print the result as one line of JSON.

It imports only the standard library, so that a process starts in a few milliseconds. The libraries that it loads may
abort, hang or write to stdout, which then affects only this process.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

NAMED = re.compile(
    r"(libcuda\.|cudart|cublas|cudnn|curand|cufft|nvrtc|nvinfer|nvonnx|tensorrt|onnxruntime)[^/]*\.(so|dll)"
)
"""Shared libraries that are reported."""

NO_DEVICE, CAPABILITY_MAJOR, CAPABILITY_MINOR = 100, 75, 76
"""CUDA_ERROR_NO_DEVICE and two values of CUdevice_attribute in cuda.h."""


def probe_module(name: str) -> dict[str, Any]:
    """Import a package: version, file, the libraries that this loaded, and the targets that it can build for."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return {}
        return {"problem": one_line(error)}
    except Exception as error:  # noqa: BLE001 - whatever a broken package raises is the finding
        return {"problem": one_line(error)}
    return {
        "version": str(getattr(module, "__version__", "")),
        "file": str(getattr(module, "__file__", None) or ""),
        "libraries": loaded_libraries(),
        "targets": build_targets(module),
    }


def build_targets(module: Any) -> list[str]:
    """The members SM80, ... of TensorRT for RTX's ComputeCapability, as `sm_80`."""
    members = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
    return [f"sm_{name[2:]}" for name in members if re.fullmatch(r"SM\d+", name)]


def probe_provider() -> dict[str, Any]:
    """Load ONNX Runtime's CUDA provider, after searching for the libraries that it needs as ONNX Runtime does."""
    try:
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]
    except Exception:  # noqa: BLE001 - the module's own probe says why
        return {}
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return {}
    found: dict[str, Any] = {"built": True, "cuda": str(getattr(onnxruntime, "cuda_version", "") or "")}
    folder = Path(onnxruntime.__file__).parent / "capi"
    pattern = "{}.dll" if sys.platform == "win32" else "lib{}.so"
    try:
        onnxruntime.preload_dlls()
        for name, mode in (("shared", ctypes.RTLD_GLOBAL), ("cuda", ctypes.DEFAULT_MODE)):
            ctypes.CDLL(str(folder / pattern.format(f"onnxruntime_providers_{name}")), mode=mode)
    except Exception as error:  # noqa: BLE001 - as above
        found["problem"] = one_line(error)
    return found


def probe_driver() -> dict[str, Any]:
    """The driver's version, the newest CUDA that it supports, and the GPUs that CUDA sees (CUDA_VISIBLE_DEVICES)."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        return {"problem": one_line(error)}
    nvml = _Nvml()
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    found: dict[str, Any] = {"version": nvml.driver_version(), "cuda": divmod(number.value // 10, 100), "gpus": []}
    status = cuda.cuInit(0)
    if status not in {0, NO_DEVICE}:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(text))
        return found | {"problem": f"cuInit failed: {(text.value or b'unknown error').decode()} ({status})"}
    count = ctypes.c_int()
    if status == 0:
        cuda.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        device, memory = ctypes.c_int(), ctypes.c_size_t()
        name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
        capability = (ctypes.c_int * 2)()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceGetPCIBusId(bus, len(bus), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        for place, attribute in enumerate((CAPABILITY_MAJOR, CAPABILITY_MINOR)):
            cuda.cuDeviceGetAttribute(ctypes.byref(capability, 4 * place), attribute, device)
        gpu = {"name": name.value.decode(), "capability": list(capability), "memory": memory.value}
        found["gpus"].append(gpu | {"free": nvml.free_memory(bus.value)})
    return found


class _Nvml:
    """NVIDIA's management library, which reports driver version and free memory without using GPU memory itself.

    All results are empty or None if it is missing.
    """

    def __init__(self) -> None:
        self._library: Any = None
        try:
            library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        except OSError:
            return
        if library.nvmlInit_v2() == 0:
            self._library = library

    def driver_version(self) -> str:
        """The driver's version, such as `580.65.06`."""
        text = ctypes.create_string_buffer(96)
        if self._library is None or self._library.nvmlSystemGetDriverVersion(text, len(text)) != 0:
            return ""
        return text.value.decode()

    def free_memory(self, bus: bytes) -> int | None:
        """Free bytes of the GPU at that PCI address."""
        device, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
        if self._library is None or self._library.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(device)) != 0:
            return None
        return memory[1] if self._library.nvmlDeviceGetMemoryInfo(device, memory) == 0 else None


def probe_library(file: str) -> dict[str, Any]:
    """Load a library by file name: first from NVIDIA's wheels, then from the system's search path."""
    wheels = [path for folder in sys.path for path in Path(folder).glob(f"nvidia/*/*/**/{file}")]
    problem = ""
    for candidate in (*map(str, wheels), file):
        try:
            ctypes.CDLL(candidate)
        except OSError as error:
            problem = problem or one_line(error)
        else:
            return {"file": next((path for path in loaded_libraries() if path.endswith(file)), candidate)}
    return {"problem": problem}


def probe_native(file: str) -> dict[str, Any]:
    """The native kernel's library, and the kernel that it runs here."""
    try:
        library = ctypes.CDLL(file)
        library.tarflow_native_kernel.restype = ctypes.c_char_p
        return {"file": file, "kernel": library.tarflow_native_kernel(ctypes.c_int64(0)).decode(), "problem": ""}
    except (OSError, AttributeError) as error:
        return {"problem": one_line(error)}


def loaded_libraries() -> list[str]:
    """Files of the reported libraries that this process has loaded; empty if the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[5] for line in lines if NAMED.search(line)})


def one_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    answer = globals()[f"probe_{kind}"](*rest)
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
