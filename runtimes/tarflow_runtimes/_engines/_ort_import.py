"""`import_onnxruntime`: the optional dependency, found, of a version that works, and not installed twice."""

from __future__ import annotations

import functools
import re
from typing import Any, Final

from tarflow_runtimes._engines._installed import owners
from tarflow_runtimes._errors import EngineError

MINIMUM_VERSION: Final = (1, 28)
INSTALL: Final = 'pip install "tarflow-sdk[ort]"'


@functools.cache
def import_onnxruntime() -> Any:
    """The module onnxruntime.

    Raises:
        EngineError: when it is missing, too old, or when two distributions have written into its folder.
    """
    found = owners("onnxruntime")
    if len(found) > 1:
        raise EngineError(
            f"installed packages overwrite each other in the folder onnxruntime/: {', '.join(found)}",
            hint=f"pip uninstall -y {' '.join(owner.split()[0] for owner in found)}, then {INSTALL}",
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError("engine ort-cpu needs ONNX Runtime, which is not installed", hint=INSTALL) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise EngineError(
            "the installed onnxruntime is damaged: it has no InferenceSession", hint=f"{INSTALL} --force-reinstall"
        )
    version = tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if version < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise EngineError(
            f"onnxruntime {onnxruntime.__version__} is too old, {wanted} is needed",
            hint=f'pip install "onnxruntime>={wanted}"',
        )
    return onnxruntime
