"""`import_onnxruntime`: import the optional dependency, and check its version and that it is installed once."""

from __future__ import annotations

import functools
import re
from typing import Any

from tarflow_runtimes.doctor.requirements import INSTALL, MINIMUM_ORT, owners
from tarflow_runtimes.errors import EngineError


@functools.cache
def import_onnxruntime(engine: str = "ort-cpu") -> Any:
    """The module onnxruntime; errors name the `engine` that needs it.

    Raises:
        EngineError: when it is missing, too old, or when two distributions have written into its folder.
    """
    install = INSTALL[engine]
    found = owners("onnxruntime")
    if len(found) > 1:
        raise EngineError(
            f"installed packages overwrite each other in the folder onnxruntime/: {', '.join(found)}",
            hint=f"pip uninstall -y {' '.join(owner.split()[0] for owner in found)}, then {install}",
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"engine {engine} needs ONNX Runtime, which is not installed", hint=install) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise EngineError(
            "the installed onnxruntime is damaged: it has no InferenceSession", hint=f"{install} --force-reinstall"
        )
    version = tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if version < MINIMUM_ORT[engine]:
        wanted = ".".join(map(str, MINIMUM_ORT[engine]))
        raise EngineError(
            f"onnxruntime {onnxruntime.__version__} is too old for engine {engine}, {wanted} is needed",
            hint=f"{install} --upgrade",
        )
    return onnxruntime
