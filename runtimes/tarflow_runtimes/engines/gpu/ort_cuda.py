"""`open_ort_cuda`: engine `ort-cuda`, ONNX Runtime's CUDA provider on the first GPU."""

from __future__ import annotations

import contextlib
import io
from typing import Final

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.doctor.requirements import INSTALL, owners
from tarflow_runtimes.engines.gpu.cuda import CudaDevice
from tarflow_runtimes.engines.gpu.engine import DeviceEngine
from tarflow_runtimes.engines.gpu.ort import NAME, OrtMaker
from tarflow_runtimes.engines.onnxruntime import import_onnxruntime
from tarflow_runtimes.errors import EngineError

PROVIDER: Final = "CUDAExecutionProvider"


def open_ort_cuda(bundle: Bundle, *, tf32: bool = False) -> DeviceEngine:
    """Open the engine; with `tf32` the inputs of a float32 bundle's matrix products may be rounded to 11 bits.

    Raises:
        EngineError: when ONNX Runtime is missing or built without CUDA, there is no driver or GPU, or the bundle has no
            graphs for this engine.
    """
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
        "use_tf32": str(int(tf32)),
        "arena_extend_strategy": "kSameAsRequested",
    }
    precision = "tf32" if tf32 else bundle.precision
    return DeviceEngine(bundle, OrtMaker(bundle, device, precision=precision, execution=PROVIDER, options=options))
