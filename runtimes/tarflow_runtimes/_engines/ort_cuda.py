"""`open_ort_cuda`: engine `ort-cuda`, ONNX Runtime's CUDA provider on the first GPU."""

from __future__ import annotations

import contextlib
import io
from typing import Final

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._device.cuda import CudaDevice
from tarflow_runtimes._engines._installed import owners
from tarflow_runtimes._engines._ort_import import INSTALL, import_onnxruntime
from tarflow_runtimes._engines.device_engine import DeviceEngine, chosen_dtype
from tarflow_runtimes._engines.ort_programs import OrtMaker
from tarflow_runtimes._errors import EngineError

NAME: Final = "ort-cuda"
PROVIDER: Final = "CUDAExecutionProvider"


def open_ort_cuda(bundle: Bundle, dtype: str | None = None) -> DeviceEngine:
    """The engine, computing in `dtype` or what the bundle is stored in.

    Raises:
        EngineError: when ONNX Runtime is missing or built without CUDA, or there is no driver or GPU.
        InputError: for an unknown dtype.
    """
    dtype = chosen_dtype(bundle, dtype)
    ort = import_onnxruntime(NAME)
    if PROVIDER not in ort.get_available_providers():
        found = owners("onnxruntime")
        raise EngineError(
            f"engine ort-cuda needs ONNX Runtime for CUDA, onnxruntime {ort.__version__} is a build without it",
            hint=f"pip uninstall -y {' '.join(one.split()[0] for one in found) or 'onnxruntime'}, then {INSTALL[NAME]}",
        )
    device = CudaDevice()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; opening a session then says so
        ort.preload_dlls()  # CUDA's libraries as pip installs them lie where the loader does not look
    options = {
        "user_compute_stream": str(device.stream),
        "use_tf32": str(int(dtype == "tf32")),
        "arena_extend_strategy": "kSameAsRequested",
    }
    return DeviceEngine(bundle, OrtMaker(bundle, device, name=NAME, dtype=dtype, provider=PROVIDER, options=options))
