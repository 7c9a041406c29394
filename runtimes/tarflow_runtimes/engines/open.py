"""`open_engine`: the engine of that name for a bundle, or an error; never a silent substitute."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.engines.api import Engine
from tarflow_runtimes.errors import EngineError, InputError

if TYPE_CHECKING:
    from tarflow_runtimes.engines.trt.supply import OnBuilding


CPU_ENGINES: Final = ("native", "ort-cpu")

CHOICES: Final = ("cpu", "auto")
"""Names that stand for the engine that is best on the CPU, and on the whole machine."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options for opening an engine.

    `tf32`: whether a GPU may round the inputs of float32 matrix products; `engine_dir`: where TensorRT engines are
    stored, None for the user's cache folder; `on_building` is called during builds.
    """

    tf32: bool = False
    engine_dir: Path | None = None
    on_building: OnBuilding | None = None


def open_engine(name: str, bundle: Bundle, options: Options) -> tuple[Engine, str]:
    """Open the engine called `name` (or chosen by `cpu` or `auto`); returns it and the reason for choosing it.

    Raises:
        EngineError: for an unknown name, an engine that is not installed, or one that cannot run here.
        InputError: for tf32 with an engine or bundle that does not support it.
    """
    if name not in (*ENGINES, *CHOICES):
        raise EngineError(f"unknown engine {name!r}", hint=f"valid are {', '.join((*ENGINES, *CHOICES))}")
    reason = "asked for"
    if name == "auto":
        from tarflow_runtimes.doctor import choose, gather

        name, reason = choose(gather(), bundle.precision)
    elif name == "cpu":
        from tarflow_runtimes.doctor.requirements import choose_cpu

        name, reason = choose_cpu(bundle.precision)
    if options.tf32 and (name in CPU_ENGINES or bundle.precision != "float32"):
        raise InputError(
            f"tf32 needs an engine on a GPU and a float32 bundle, not {name} and {bundle.precision}",
            hint="leave tf32 out",
        )
    return ENGINES[name](bundle, options), reason


def _open_native(bundle: Bundle, _: Options) -> Engine:
    from tarflow_runtimes.engines.native.engine import NativeEngine

    return NativeEngine(bundle)


def _open_ort_cpu(bundle: Bundle, _: Options) -> Engine:
    from tarflow_runtimes.engines.ort_cpu.engine import OrtCpuEngine

    return OrtCpuEngine(bundle)


def _open_ort_cuda(bundle: Bundle, options: Options) -> Engine:
    from tarflow_runtimes.engines.gpu.ort_cuda import open_ort_cuda

    return open_ort_cuda(bundle, tf32=options.tf32)


def _open_trt(engine: str, bundle: Bundle, options: Options) -> Engine:
    from tarflow_runtimes.engines.trt.engine import open_trt

    return open_trt(bundle, engine, tf32=options.tf32, folder=options.engine_dir, on_building=options.on_building)


ENGINES: Final[dict[str, Callable[[Bundle, Options], Engine]]] = {
    "native": _open_native,
    "ort-cpu": _open_ort_cpu,
    "ort-cuda": _open_ort_cuda,
    "trt": functools.partial(_open_trt, "trt"),
    "trt-rtx": functools.partial(_open_trt, "trt-rtx"),
}
"""The engines by name, and the functions that open them and import their packages."""
