"""`tarflow tune`: find the fastest decoding plan on this machine, and save it next to the bundle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tarflow_runtimes.cli.lists import count, items, weight
from tarflow_runtimes.cli.options import BundleArgument, Engine, EngineDir, Json, Tf32, load_options
from tarflow_runtimes.cli.shell import command, new_app, note, print_json, require
from tarflow_runtimes.errors import InputError

if TYPE_CHECKING:
    from tarflow_runtimes.measure.tune import BlockTuned

app = new_app()


@command(app)
def tune(
    bundle: BundleArgument = None,
    *,
    engine: Engine = "cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    batch: Annotated[str, typer.Option(metavar="LIST", help="Batch sizes, such as 1,16.")] = "1,16",
    guidance: Annotated[str, typer.Option(metavar="LIST", help="Guidance weights; only 0 or not 0 matters.")] = "0",
    tolerance: Annotated[
        float | None, typer.Option(metavar="MOVE", help="Tolerance of parallel decoding. [default: 0.00001]")
    ] = None,
    draws: Annotated[int, typer.Option(metavar="COUNT", help="Number of noise samples to measure on.")] = 3,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of the first noise sample.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="File for the plans. [default: next to the bundle]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure for each block whether parallel decoding is faster on this machine, and with which window.

    `--decode auto` then uses the plan, which is valid for this bundle, engine, machine and version; plans for others in
    the same file are kept. No data are needed: the inputs of the blocks are made from random noise.
    """
    batches = items("--batch", batch, count)
    weights = items("--guidance", guidance, weight)
    require(draws >= 1, f"--draws must be at least 1, got {draws}", "3 is usual")
    require(0 <= seed < 2**63, f"--seed must be in 0 .. 2^63 - 1, got {seed}", "leave it out for 0")
    good = tolerance is None or (math.isfinite(tolerance) and tolerance >= 0.0)
    require(good, f"--tolerance must be a finite number and not negative, got {tolerance}", "1e-5 is usual")

    import tarflow_runtimes as tfr
    from tarflow_runtimes.decode.plan import DEFAULT_TOLERANCE
    from tarflow_runtimes.decode.tuned import plans_path, read_plans, write_plans

    with tfr.load(bundle, engine=engine, **load_options(tf32=tf32, engine_dir=engine_dir)) as flow:
        path = output or plans_path(flow.bundle.path)
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such folder", hint="choose another file with --output")
        read_plans(path, flow.identity())  # a damaged file is refused before the work, not after it
        plans = tfr.tune(
            flow,
            batches,
            weights,
            tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
            draws=draws,
            seed=seed,
            on_block=_tell,
        )
        write_plans(path, plans.entries)
    for entry in plans.entries:
        gain = entry.sequential_seconds / entry.seconds
        note(f"batch {entry.batch}, {_guided(entry.branches)}: {gain:.2f}x over sequential")
    note(f"wrote {path}")
    if as_json:
        from tarflow_runtimes.decode.tuned import entry_json

        print_json({"file": str(path), "plans": [entry_json(entry) for entry in plans.entries]})


def _tell(found: BlockTuned) -> None:
    from tarflow_runtimes.decode.plan import Parallel

    how = "sequential"
    if isinstance(found.strategy, Parallel):
        how = f"parallel, window {found.strategy.window or 'whole'}, from {found.strategy.init}"
    gain = found.sequential_seconds / found.seconds
    where = f"batch {found.batch}, {_guided(1 + (found.guidance > 0.0))}, block {found.block}"
    note(f"{where}: {how} ({1e3 * found.seconds:.1f} ms, {gain:.2f}x over sequential)")


def _guided(branches: int) -> str:
    return "guided" if branches > 1 else "unguided"
