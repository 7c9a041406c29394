"""`import_onnxruntime`: the optional dependency, found, of a version that works, and not installed twice."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from typing import Any, Final

from tarflow_runtimes._errors import EngineError

MINIMUM_VERSION: Final = (1, 28)
INSTALL: Final = 'pip install "tarflow-sdk[ort]"'


@functools.cache
def import_onnxruntime() -> Any:
    """The module onnxruntime.

    Raises:
        EngineError: when it is missing, too old, or when two distributions have written into its folder.
    """
    owners = onnxruntime_owners()
    if len(owners) > 1:
        raise EngineError(
            f"installed packages overwrite each other in the folder onnxruntime/: {', '.join(owners)}",
            hint=f"pip uninstall -y {' '.join(owner.split()[0] for owner in owners)}, then {INSTALL}",
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


def onnxruntime_owners() -> list[str]:
    """Installed distributions that own files of the package `onnxruntime`, as `name version`, sorted."""
    owners = set()
    for distribution in importlib.metadata.distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if not name.startswith(("onnxruntime", "ort-")):
            continue
        if any(file.parts[:2] == ("onnxruntime", "__init__.py") for file in distribution.files or ()):
            owners.add(f"{name} {distribution.version}")
    return sorted(owners)
