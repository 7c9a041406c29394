"""`open_engine`: the engine of that name for a bundle, or an error; never a silent substitute."""

from __future__ import annotations

from typing import Final

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engine import Engine
from tarflow_runtimes._errors import EngineError

ENGINES: Final = ("ort-cpu",)
PLANNED: Final = ("ort-cuda", "trt", "trt-rtx")
INSTALL_ORT: Final = 'pip install "tarflow-sdk[ort]"'


def open_engine(name: str, bundle: Bundle) -> tuple[Engine, str]:
    """The engine called `name` (or chosen by `auto`) and why it was chosen.

    Raises:
        EngineError: for an unknown name, an engine that this version does not have, or one that is not installed.
    """
    if name in PLANNED:
        raise EngineError(
            f"engine {name} is not in this version of tarflow-sdk", hint=f"use engine ort-cpu: {INSTALL_ORT}"
        )
    if name not in (*ENGINES, "auto"):
        raise EngineError(f"unknown engine {name!r}", hint=f"valid are {', '.join((*ENGINES, 'auto', *PLANNED))}")
    from tarflow_runtimes._engines.ort_cpu import OrtCpuEngine

    reason = "auto: the only engine of this version" if name == "auto" else "asked for"
    return OrtCpuEngine(bundle), reason
