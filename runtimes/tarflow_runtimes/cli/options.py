"""The options that several verbs share, those that choose or build engines, and what they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.lists import count, items, size, weight
from tarflow_runtimes.cli.shell import note, require
from tarflow_runtimes.decode.batches import BATCH_SIZE
from tarflow_runtimes.errors import InputError

if TYPE_CHECKING:
    from tarflow_runtimes.bundle.config import ModelConfig
    from tarflow_runtimes.engines.trt.profiles import Profile
    from tarflow_runtimes.engines.trt.supply import Building

BundleArgument = Annotated[
    Path | None, typer.Argument(metavar="BUNDLE", help="A .tarflow folder. [default: the digits of the package]")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Report on stdout as one JSON object.")]

EXPERIMENTAL = ("ort-cuda", "trt", "trt-rtx")
"""Engines that are not proven on a GPU."""

ENGINES_HELP = f"What computes: auto, native, ort-cpu; on GPUs {', '.join(EXPERIMENTAL)} (experimental)."

Engine = Annotated[str, typer.Option(metavar="NAME", help=ENGINES_HELP)]

Tf32 = Annotated[bool, typer.Option("--tf32", help="Let a GPU round the factors of float32 products to 11 bits.")]

Batch = Annotated[
    str, typer.Option(metavar="LIST", help="Batches to choose kernels for; the largest is the most that runs at once.")
]
Guidance = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", help="Guidance weights; what counts is whether they are 0. [default: 0,1 with classes, else 0]"
    ),
]
Window = Annotated[
    str, typer.Option(metavar="LIST", help="Windows of parallel decoding; single patches always work. 1 for no more.")
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", help="trt-rtx: GPU architectures, as sm_89,sm_120. [default: the GPU here, else all common]"
    ),
]
EngineDir = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where engines are kept. [default: the user's cache folder]")
]

BatchSize = Annotated[int, typer.Option("--batch-size", metavar="COUNT", help="Images that run together.")]

DEFAULT_BATCH, DEFAULT_WINDOW, DEFAULT_BYTES = "1,8,64", "16", 20 << 30


def load_options(*, tf32: bool, engine_dir: Path | None) -> dict[str, Any]:
    """The arguments of `load` that go with an engine; builds are said on stderr, once each, with their reason."""
    told: set[tuple[int, str]] = set()

    def on_building(building: Building) -> None:
        if (building.block, building.kind) not in told:
            told.add((building.block, building.kind))
            note(f"building the {building.kind} engine of block {building.block}: {building.reason}")

    return {"tf32": tf32, "engine_dir": engine_dir, "on_building": on_building}


def check_engine(engine: str) -> None:
    """Refuse an engine that is not built."""
    from tarflow_runtimes.engines.trt.package import ENGINES

    if engine not in ENGINES:
        raise InputError(
            f"--engine must be {' or '.join(ENGINES)}, got {engine!r}", hint="the other engines need no build"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """The shapes that engines are built for, as options give them."""

    batches: Sequence[int]
    weights: Sequence[float] | None
    windows: Sequence[int]

    def profiles(self, config: ModelConfig) -> tuple[Profile, ...]:
        """The profiles of the advance graph; a window longer than the block is the block."""
        from tarflow_runtimes.engines.trt.profiles import profiles_for

        weights = self.weights if self.weights is not None else (0.0, 1.0) if config.classes else (0.0,)
        return profiles_for(
            self.batches,
            branches={1 + (weight > 0.0) for weight in weights},
            windows={1, *(min(window, config.patches - 1) for window in self.windows)},
        )


def shapes_of(batch: str, guidance: str | None, window: str) -> Shapes:
    """Read `--batch`, `--guidance` and `--window`.

    Raises:
        InputError: when one is not a list of numbers.
    """
    return Shapes(
        batches=items("--batch", batch, count),
        weights=None if guidance is None else items("--guidance", guidance, weight),
        windows=items("--window", window, count),
    )


def targets_of(target: str | None) -> list[str] | None:
    """Read `--target`."""
    return None if target is None else items("--target", target, str)


def size_of(option: str, text: str) -> int:
    """Read a number of bytes.

    Raises:
        InputError: when it is none.
    """
    try:
        return size(text)
    except ValueError as error:
        raise InputError(f"{option} {text}: {error}", hint="give a number and K, M, G or T") from None


def check_batch_size(batch_size: int) -> None:
    """Refuse what is no number of images."""
    require(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}", f"leave it out for {BATCH_SIZE}")
