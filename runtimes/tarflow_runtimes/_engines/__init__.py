"""`open_engine`: the engine of that name for a bundle, or an error; never a silent substitute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engine import Engine
from tarflow_runtimes._errors import EngineError, InputError

if TYPE_CHECKING:
    from tarflow_runtimes._trt._supply import OnBuilding

WEIGHTS: Final = ("stored", "int8")
"""What sampling multiplies with: the weights as the bundle has them, or their linear layers rounded to 8 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What an engine is opened with.

    `weights` is one of WEIGHTS; `dtype` what linear layers are computed in, None for what they are stored in;
    `engine_dir` where TensorRT's engines are kept, None for the user's cache folder; `on_building` hears of builds.
    """

    weights: str = "stored"
    dtype: str | None = None
    engine_dir: Path | None = None
    on_building: OnBuilding | None = None


def open_engine(name: str, bundle: Bundle, options: Options) -> tuple[Engine, str]:
    """The engine called `name` (or chosen by `auto`), and why it was chosen.

    Raises:
        EngineError: for an unknown name, an engine that is not installed, or one that cannot run here.
        InputError: for options that are unknown or that the engine does not have.
    """
    if options.weights not in WEIGHTS:
        raise InputError(
            f"weights must be one of {', '.join(WEIGHTS)}, got {options.weights!r}", hint="stored are the bundle's own"
        )
    if name not in (*ENGINES, "auto"):
        raise EngineError(f"unknown engine {name!r}", hint=f"valid are {', '.join((*ENGINES, 'auto'))}")
    reason = "asked for"
    if name == "auto":
        name, reason = _choose(options)
    if options.weights == "int8" and name != "ort-cpu":
        raise InputError(
            f"int8 weights are of engine ort-cpu, not of {name}", hint="leave weights out, or use engine ort-cpu"
        )
    return ENGINES[name](bundle, options), reason


def _choose(options: Options) -> tuple[str, str]:
    if options.weights == "int8":
        return "ort-cpu", "auto: the only engine with int8 weights"
    from tarflow_runtimes._doctor import choose, gather

    return choose(gather())


def _open_ort_cpu(bundle: Bundle, options: Options) -> Engine:
    from tarflow_runtimes._engines.ort_cpu import OrtCpuEngine

    if options.dtype not in {None, bundle.dtype}:
        raise InputError(
            f"engine ort-cpu computes in what the bundle is stored in, {bundle.dtype}, not in {options.dtype}",
            hint="leave the dtype out, or use an engine on a GPU",
        )
    return OrtCpuEngine(bundle, options.weights)


def _open_ort_cuda(bundle: Bundle, options: Options) -> Engine:
    from tarflow_runtimes._engines.ort_cuda import open_ort_cuda

    return open_ort_cuda(bundle, options.dtype)


def _open_trt(bundle: Bundle, options: Options) -> Engine:
    from tarflow_runtimes._engines.trt import open_trt

    return open_trt(bundle, "trt", options.dtype, folder=options.engine_dir, on_building=options.on_building)


def _open_trt_rtx(bundle: Bundle, options: Options) -> Engine:
    from tarflow_runtimes._engines.trt import open_trt

    return open_trt(bundle, "trt-rtx", options.dtype, folder=options.engine_dir, on_building=options.on_building)


ENGINES: Final[dict[str, Callable[[Bundle, Options], Engine]]] = {
    "ort-cpu": _open_ort_cpu,
    "ort-cuda": _open_ort_cuda,
    "trt": _open_trt,
    "trt-rtx": _open_trt_rtx,
}
"""The engines by name, and what opens each; their packages are imported then."""
