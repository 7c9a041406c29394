"""`open_engine`: the engine of that name for a bundle, or an error; never a silent substitute."""

from __future__ import annotations

from typing import Final

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engine import Engine
from tarflow_runtimes._errors import EngineError, InputError

ENGINES: Final = ("ort-cpu",)
PLANNED: Final = ("ort-cuda", "trt", "trt-rtx")
WEIGHTS: Final = ("stored", "int8")
"""What sampling multiplies with: the weights as the bundle has them, or their linear layers rounded to 8 bits."""
INSTALL_ORT: Final = 'pip install "tarflow-sdk[ort]"'


def open_engine(name: str, bundle: Bundle, weights: str) -> tuple[Engine, str]:
    """The engine called `name` (or chosen by `auto`), sampling with `weights`, and why it was chosen.

    Raises:
        EngineError: for an unknown name, an engine that this version does not have, or one that is not installed.
        InputError: for weights other than those of WEIGHTS.
    """
    if weights not in WEIGHTS:
        raise InputError(
            f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}", hint="stored are the bundle's own"
        )
    if name in PLANNED:
        raise EngineError(
            f"engine {name} is not in this version of tarflow-sdk", hint=f"use engine ort-cpu: {INSTALL_ORT}"
        )
    if name not in (*ENGINES, "auto"):
        raise EngineError(f"unknown engine {name!r}", hint=f"valid are {', '.join((*ENGINES, 'auto', *PLANNED))}")
    from tarflow_runtimes._engines.ort_cpu import OrtCpuEngine

    reason = "auto: the only engine of this version" if name == "auto" else "asked for"
    return OrtCpuEngine(bundle, weights), reason
