"""Options shared by several commands, in particular those that choose or build engines."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.lists import count, items, size, weight
from tarflow_runtimes.cli.shell import note, require
from tarflow_runtimes.decode.batches import BATCH_SIZE
from tarflow_runtimes.errors import InputError

if TYPE_CHECKING:
    from tarflow_runtimes.bundle.reader import Bundle
    from tarflow_runtimes.engines.trt.profiles import Profile
    from tarflow_runtimes.engines.trt.supply import Building, OnBuilding, Supply

BundleArgument = Annotated[
    Path | None, typer.Argument(metavar="BUNDLE", help="A .tarflow folder. [default: the digits of the package]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Json = Annotated[bool, typer.Option("--json", help="Print a report as one JSON object on stdout.")]

EXPERIMENTAL = ("ort-cuda", "trt", "trt-rtx")
"""Engines that have not been tested on a GPU."""

ENGINES_HELP = (
    f"Engine: cpu (native, else ort-cpu), auto, native, ort-cpu; on GPUs {', '.join(EXPERIMENTAL)} (experimental)."
)

Engine = Annotated[str, typer.Option(metavar="NAME", help=ENGINES_HELP)]

Tf32 = Annotated[bool, typer.Option("--tf32", help="Let a GPU round the inputs of float32 matrix products to 11 bits.")]

Batch = Annotated[
    str, typer.Option(metavar="LIST", help="Batch sizes to optimise for; the largest is the most that runs at once.")
]
Guidance = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Guidance weights; only 0 or not 0 matters. [default: 0,1 with classes, else 0]"),
]
Window = Annotated[
    str, typer.Option(metavar="LIST", help="Windows of parallel decoding; 1 for sequential decoding only.")
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", help="trt-rtx: GPU architectures, as sm_89,sm_120. [default: the GPU here, else all common]"
    ),
]
EngineDir = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where engines are stored. [default: the user's cache folder]")
]

BatchSize = Annotated[int, typer.Option("--batch-size", metavar="COUNT", help="Images that run together.")]

MaxSize = Annotated[str, typer.Option(metavar="SIZE", help="What engines may take; those not used for longest go.")]


def load_options(*, tf32: bool, engine_dir: Path | None) -> dict[str, Any]:
    """The arguments of `load` for an engine; each build is reported once on stderr, with its reason."""
    told: set[tuple[int, str]] = set()

    def on_building(building: Building) -> None:
        if (building.block, building.kind) not in told:
            told.add((building.block, building.kind))
            note(f"building the {building.kind} engine of block {building.block}: {building.reason}")

    return {"tf32": tf32, "engine_dir": engine_dir, "on_building": on_building}


def check_engine(engine: str) -> None:
    """Refuse an engine that needs no build."""
    from tarflow_runtimes.engines.trt.package import ENGINES

    if engine not in ENGINES:
        raise InputError(
            f"--engine must be {' or '.join(ENGINES)}, got {engine!r}", hint="the other engines need no build"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """The options of the commands that build or look up engines: which engines, and where they are stored.

    Raises:
        InputError: when one is not what it should be.
    """

    tf32: Tf32 = False
    batch: Batch = "1,8,64"
    guidance: Guidance = None
    window: Window = "16"
    target: Target = None
    engine_dir: EngineDir = None
    max_size: MaxSize = "20G"

    def __post_init__(self) -> None:
        _ = self.shapes, self.targets, self.max_bytes

    @property
    def shapes(self) -> tuple[list[int], list[float] | None, list[int]]:
        """Batches, guidance weights and windows."""
        weights = None if self.guidance is None else items("--guidance", self.guidance, weight)
        return items("--batch", self.batch, count), weights, items("--window", self.window, count)

    @property
    def targets(self) -> list[str] | None:
        """The GPU architectures."""
        return None if self.target is None else items("--target", self.target, str)

    @property
    def max_bytes(self) -> int:
        """What engines may take."""
        return size_of("--max-size", self.max_size)

    def wanted(self, bundle: Bundle) -> list[tuple[int, str, tuple[Profile, ...]]]:
        """Every engine of a bundle: block, kind, profiles; a window longer than the block is the block."""
        from tarflow_runtimes.engines.trt.profiles import profiles_for
        from tarflow_runtimes.engines.trt.supply import wanted_engines

        batches, weights, windows = self.shapes
        if weights is None:
            weights = [0.0, 1.0] if bundle.config.classes else [0.0]
        profiles = profiles_for(
            batches,
            branches={1 + (weight > 0.0) for weight in weights},
            windows={1, *(min(window, bundle.config.patches - 1) for window in windows)},
        )
        return list(wanted_engines(bundle, profiles))

    def supply(
        self, engine: str, bundle: Bundle, *, workspace: int | None = None, on_building: OnBuilding | None = None
    ) -> Supply:
        """The engines of a bundle for the GPU here, or for the targets."""
        from tarflow_runtimes.engines.trt.gpu import gpu_for
        from tarflow_runtimes.engines.trt.package import import_package
        from tarflow_runtimes.engines.trt.supply import Supply

        package = import_package(engine)
        return Supply(
            package,
            bundle,
            gpu=gpu_for(package),
            tf32=self.tf32,
            targets=self.targets,
            folder=self.engine_dir,
            workspace=workspace,
            max_bytes=self.max_bytes,
            on_building=on_building,
        )


def takes_build_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of `BuildOptions` in place of its parameter `chosen`."""

    @functools.wraps(function)
    def verb(*args: Any, **given: Any) -> None:
        function(*args, chosen=BuildOptions(**{name: given.pop(name) for name in options}), **given)

    options = inspect.signature(BuildOptions, eval_str=True).parameters
    parameters = inspect.signature(function, eval_str=True).parameters
    listed: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        listed += options.values() if name == "chosen" else [parameter]
    verb.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
    return verb


def size_of(option: str, text: str) -> int:
    """Read a number of bytes.

    Raises:
        InputError: when it is not a size.
    """
    try:
        return size(text)
    except ValueError as error:
        raise InputError(f"{option} {text}: {error}", hint="give a number and K, M, G or T") from None


def check_batch_size(batch_size: int) -> None:
    """Refuse what is no number of images."""
    require(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}", f"leave it out for {BATCH_SIZE}")
