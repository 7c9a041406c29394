"""`open_engine`: the engine of that name for a bundle, or an error; never a silent substitute."""

from __future__ import annotations

from typing import Final

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engine import Engine
from tarflow_runtimes._errors import EngineError, InputError

ENGINES: Final = ("ort-cpu", "ort-cuda")
PLANNED: Final = ("trt", "trt-rtx")
WEIGHTS: Final = ("stored", "int8")
"""What sampling multiplies with: the weights as the bundle has them, or their linear layers rounded to 8 bits."""
INSTALL_ORT: Final = 'pip install "tarflow-sdk[ort]"'


def open_engine(name: str, bundle: Bundle, weights: str, dtype: str | None = None) -> tuple[Engine, str]:
    """The engine called `name` (or chosen by `auto`), sampling with `weights`, and why it was chosen.

    `dtype` is what an engine on a GPU computes in; None is what the bundle is stored in.

    Raises:
        EngineError: for an unknown name, an engine that this version does not have, or one that cannot run here.
        InputError: for weights other than those of WEIGHTS, or weights or a dtype that the engine does not have.
    """
    if weights not in WEIGHTS:
        raise InputError(
            f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}", hint="stored are the bundle's own"
        )
    if name not in (*ENGINES, *PLANNED, "auto"):
        raise EngineError(f"unknown engine {name!r}", hint=f"valid are {', '.join((*ENGINES, 'auto', *PLANNED))}")
    reason = "asked for"
    if name == "auto":
        name, reason = _choose(weights)
    if name in PLANNED:
        raise EngineError(
            f"engine {name} is not in this version of tarflow-sdk", hint=f"use engine ort-cpu: {INSTALL_ORT}"
        )
    if name == "ort-cpu":
        if dtype not in {None, bundle.dtype}:
            raise InputError(f"engine ort-cpu computes in what the bundle is stored in, {bundle.dtype}, not {dtype}")
        from tarflow_runtimes._engines.ort_cpu import OrtCpuEngine

        return OrtCpuEngine(bundle, weights), reason
    if weights != "stored":
        raise InputError(f"weights {weights} are for engine ort-cpu, not {name}", hint="engines on a GPU have a dtype")
    from tarflow_runtimes._engines.ort_cuda import open_ort_cuda

    return open_ort_cuda(bundle, dtype), reason


def _choose(weights: str) -> tuple[str, str]:
    """What `auto` takes, and why."""
    if weights != "stored":
        return "ort-cpu", f"auto: weights {weights} are for ort-cpu"
    from tarflow_runtimes._doctor import choose, gather

    return choose(gather())
