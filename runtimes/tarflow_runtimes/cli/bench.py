"""`tarflow bench`: how fast a bundle decodes on this machine, as tables, a JSON file and a plot."""

from __future__ import annotations

import functools
import io
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tarflow_runtimes.cli.lists import count, items, weight
from tarflow_runtimes.cli.options import ENGINES_HELP, BundleArgument, EngineDir, Overwrite, Tf32, load_options
from tarflow_runtimes.cli.shell import command, json_text, new_app, note, printable, require

if TYPE_CHECKING:
    from rich.table import Table

    from tarflow_runtimes.io.write import Output
    from tarflow_runtimes.measure.bench_results import BenchResult, CaseResult

app = new_app()

NAMES = ("engine", "guidance", "batch", "decode")
"""Columns that identify the case of a row."""

WIDTH = 160
"""Minimal width available to tables, so that nothing is cut off; most need 80 to 100."""


@command(app)
def bench(
    bundle: BundleArgument = None,
    *,
    engine: Annotated[str, typer.Option(metavar="LIST", help=ENGINES_HELP)] = "cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    batch: Annotated[str, typer.Option(metavar="LIST", help="Batch sizes.")] = "1,16",
    decode: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="sequential, parallel, parallel:WINDOW, auto (the tuned plan); compared with the first.",
        ),
    ] = "sequential,auto",
    guidance: Annotated[str, typer.Option(metavar="LIST", help="Guidance weights, 0 for none.")] = "0",
    tolerance: Annotated[
        float | None, typer.Option(metavar="MOVE", help="Tolerance of parallel and auto. [default: 1e-5, or as tuned]")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="COUNT", help="Measurements of each combination.")] = 7,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of the noise, new in each round.")] = 0,
    no_ceilings: Annotated[
        bool, typer.Option("--no-ceilings", help="Do not measure the limits of the machine.")
    ] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE.json", help="Also write all results.")
    ] = None,
    plot_file: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw the time and the convergence of each block."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how fast a bundle decodes on this machine.

    Every combination of the lists is timed once per round, in turn. Separate the items of a LIST by commas.
    """
    engines = items("--engine", engine, str)
    batches = items("--batch", batch, count)
    decodes = items("--decode", decode, str)
    weights = items("--guidance", guidance, weight)
    require(rounds >= 1, f"--rounds must be at least 1, got {rounds}", "7 is usual")
    require(0 <= seed < 2**64, f"--seed must be in 0 .. 2^64 - 1, got {seed}", "leave it out for 0")
    good = tolerance is None or (math.isfinite(tolerance) and tolerance >= 0.0)
    require(good, f"--tolerance must be a finite number and not negative, got {tolerance}", "1e-5 is usual")

    # These load NumPy: not before --help and the checks above.
    from tarflow_runtimes.cli.progress import StepClock
    from tarflow_runtimes.io.write import check_output
    from tarflow_runtimes.measure.bench import bench as run_bench
    from tarflow_runtimes.measure.bench import parallel_of

    for word in decodes:
        parallel_of(word, tolerance)
    data = (
        None if json_file is None else check_output(json_file, kinds=(".json",), overwrite=overwrite, option="--json")
    )
    plot = None if plot_file is None else check_output(plot_file, kinds=(".png",), overwrite=overwrite, option="--plot")
    with StepClock("measuring") as clock:
        result = run_bench(
            bundle,
            engines=engines,
            options=load_options(tf32=tf32, engine_dir=engine_dir),
            batches=batches,
            decodes=decodes,
            guidance=weights,
            tolerance=tolerance,
            rounds=rounds,
            seed=seed,
            ceilings=not no_ceilings,
            on_progress=clock.show,
        )
    _write(result, data, plot)
    _print(result)
    for reason in dict.fromkeys(one.plans for one in result.engines if one.plans):
        note(f"auto is sequential: {reason}")
    for output in (data, plot):
        if output is not None:
            note(f"wrote {output.path}")


def _write(result: BenchResult, data: Output | None, plot: Output | None) -> None:
    """Write both files atomically, after all contents have been prepared."""
    from tarflow_runtimes.io.write import publish
    from tarflow_runtimes.measure.bench_plot import draw_plot

    files: list[tuple[Output, bytes]] = []
    if data is not None:
        files.append((data, f"{json_text(result.to_json())}\n".encode()))
    if plot is not None:
        buffer = io.BytesIO()
        draw_plot(result).save(buffer, format="PNG")
        files.append((plot, buffer.getvalue()))
    for output, content in files:
        publish(output.path, functools.partial(_save, content))


def _save(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _print(result: BenchResult) -> None:
    """The facts, then tables of the cases, of their steps and of their blocks."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    console.width = max(console.width, WIDTH) if sys.stdout.isatty() else WIDTH
    for name, text in _facts(result):
        typer.echo(f"{name:<10}  {printable(text)}")
    typer.echo("")
    with console.capture() as drawn:
        console.print(_case_table(result))
        if any(one.gflops is not None for one in result.cases):
            console.print(_step_table(result))
        console.print(_block_table(result))
    typer.echo("\n".join(line.rstrip() for line in drawn.get().rstrip().splitlines()))


def _facts(result: BenchResult) -> Iterable[tuple[str, str]]:
    head, memory = result.header, result.memory
    yield "bundle", f"{head['bundle']}, {head['precision']}, {head['patches']} patches, {head['blocks']} blocks"
    yield "machine", f"{head['processor']}, {head['cpus']} CPUs, {head['system']}"
    if result.ceilings is not None:
        for threads, rates in ((1, result.ceilings.one_thread), (result.ceilings.threads, result.ceilings.all_threads)):
            text = f"matrix product {rates.gemm_gflops:.0f} GFLOP/s, matrix-vector product {rates.gemv_gbs:.1f} GB/s"
            text += f", copy {rates.copy_gbs:.1f} GB/s ({result.ceilings.blas})"
            yield "ceilings", f"{threads} thread{'s' * (threads > 1)}: {text}"
    for one in result.engines:
        yield one.engine, f"load {one.load_ms:.0f} ms, first image {one.first_image_ms:.0f} ms"
    sizes = {"before": memory.start, "after the first image": memory.ready, "peak": memory.peak}
    process = ", ".join(f"{name} {1e-6 * size:.0f} MB" for name, size in sizes.items() if size is not None)
    yield "memory", f"weights {1e-6 * memory.weights:.1f} MB; process: {process or 'unknown'}"
    yield "measured", f"{head['date']}, {head['rounds']} rounds, medians, seed {head['seed']}"


def _case_table(result: BenchResult) -> Table:
    first = result.cases[0].case.decode
    times = ("first\nms", "p50\nms", "p95\nms", "images\n/s", f"speed-up on\n{first}", "largest\ndifference")
    table = _table("Decoding a batch", (*NAMES, *times))
    for one in result.cases:
        table.add_row(
            *_names(one),
            f"{one.first_ms:.1f}",
            f"{one.p50_ms:.2f}",
            f"{one.p95_ms:.2f}",
            _figures(one.images_per_s),
            f"{one.speedup:.2f}x",
            f"{one.max_difference:.0e}" if one.max_difference else "0",
        )
    return table


def _step_table(result: BenchResult) -> Table:
    """The table of sequential steps, with rates relative to the machine's limits."""
    title = "Sequential steps" + ("" if result.ceilings is None else " (share of the ceiling of all threads)")
    table = _table(title, (*NAMES, "step\nus", "slope\nus/index", "GFLOP/s", "GB/s"))
    ceilings = None if result.ceilings is None else result.ceilings.all_threads
    for one in result.cases:
        if one.gflops is not None and one.gbs is not None:
            table.add_row(
                *_names(one),
                f"{one.step_us:.1f}",
                "-" if one.slope_us is None else f"{one.slope_us:.3f}",
                _of(one.gflops, None if ceilings is None else ceilings.gemm_gflops),
                _of(one.gbs, None if ceilings is None else ceilings.gemv_gbs),
            )
    return table


def _block_table(result: BenchResult) -> Table:
    """Milliseconds per block, in the order in which they run, with the calls per image of parallel blocks."""
    order = [block.block for block in result.cases[0].blocks]
    columns = (*NAMES, *(f"block {block}\nms" for block in order))
    table = _table("Blocks (calls of an image: mean, most)", columns)
    for one in result.cases:
        cells = [
            f"{block.ms:.2f}" + (f" ({block.calls_mean:.1f}, {block.calls_max})" if block.settled else "")
            for block in one.blocks
        ]
        table.add_row(*_names(one), *cells)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column in ("engine", "decode") else "right")
    return table


def _names(one: CaseResult) -> tuple[str, ...]:
    return one.case.engine, f"{one.case.guidance:g}", str(one.case.batch), one.case.decode


def _figures(value: float) -> str:
    """Format a number with three digits and without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _of(value: float, ceiling: float | None) -> str:
    """Format a rate, and its share of the machine's limit."""
    return _figures(value) + ("" if ceiling is None else f" ({100 * value / ceiling:.0f}%)")
