"""`tarflow-export`: export a checkpoint to a verified bundle."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tarflow_runtimes.cli.build import build_engines, check_builds
from tarflow_runtimes.cli.options import BuildOptions, EngineDir, Json
from tarflow_runtimes.cli.shell import command, new_app, note, print_json, run
from tarflow_runtimes.engines.trt.folder import EngineFolder

if TYPE_CHECKING:
    from tarflow_export._report import ExportReport, OnProgress
    from tarflow_export._verify import Verified

# Before PyTorch loads: its threads then sleep instead of spinning while they wait for each other, which saves a quarter
# of the processor time when other work runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = new_app()


@command(app)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors, .pth or .pt file.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The bundle to write. [default: STEM.tarflow in this folder]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16, for linear layers and caches.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="The data are tokens [N, D], not images cut into patches.")
    ] = False,
    image_channels: Annotated[int | None, typer.Option(help="Where the checkpoint does not say.")] = None,
    patch_size: Annotated[int | None, typer.Option(help="Where the checkpoint does not say.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Where the checkpoint does not say. [default: 64]")] = None,
    noise_std: Annotated[
        float | None, typer.Option(help="Sigma of the training noise, if the checkpoint does not say.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file with the names of the classes, one per line.")] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the comparison with PyTorch; the bundle records that.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(metavar="trt|trt-rtx", help="Also build TensorRT engines (experimental), as tarflow build does."),
    ] = None,
    engine_dir: EngineDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs that runs without PyTorch, and compare it with PyTorch.

    The bundle is written complete and verified, or not at all. Exit codes: 0 done, 1 a comparison missed its
    tolerance, 2 bad input.
    """
    from tarflow_export._export import export_bundle

    if engine is not None:
        check_builds(engine)
    elif engine_dir is not None:
        raise typer.BadParameter("--engine-dir needs --engine")
    options: dict[str, Any] = {
        "dtype": dtype,
        "overwrite": overwrite,
        "tokens": tokens,
        "image_channels": image_channels,
        "patch_size": patch_size,
        "head_dim": head_dim,
        "noise_std": noise_std,
        "labels": None if labels is None else _read_labels(labels),
        "verify": not no_verify,
    }
    if dry_run:
        _plan(checkpoint, output, as_json=as_json, **options)
        return
    if engine is not None:
        EngineFolder(engine_dir)  # refused before the export, not after it
    with progress_bar() as on_progress:
        report = export_bundle(checkpoint, output, on_progress=on_progress, on_verified=show_table, **options)
    facts = report.to_json()
    if engine is not None:
        facts["build"] = build_engines(report.path, engine, BuildOptions(engine_dir=engine_dir))
    if as_json:
        print_json(facts)
    else:
        summarise(report)


def _read_labels(path: Path) -> list[str]:
    """Read the names of the classes, one per line; empty lines at the end are ignored."""
    from tarflow_export._errors import ExportError

    try:
        names = path.read_text("utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ExportError(f"--labels {path}: {reason}", hint="give a text file with one name per line") from error
    names = [name.strip() for name in names]
    if not all(names):
        raise ExportError(f"--labels {path}: holds an empty line", hint="give one name per line, in class order")
    return names


def _plan(checkpoint: Path, output: Path | None, *, as_json: bool, **options: Any) -> None:
    from tarflow_export._export import plan_of
    from tarflow_export._report import plan_lines

    facts = plan_of(checkpoint, output, **options)
    if as_json:
        print_json(facts)
        return
    for line in plan_lines(facts):
        typer.echo(line)


def show_table(verified: Verified) -> None:
    """Print all comparisons on stderr, including missed ones: the error that follows names only the worst."""
    from rich.console import Console

    from tarflow_export._report import parity_table

    # Wide enough for all columns if there is no terminal with a known width.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)
    console.print(parity_table(verified.records, verified.floors))


def summarise(report: ExportReport) -> None:
    """Print what was written on stderr, and its path on stdout."""
    from tarflow_export._report import size

    for assumption in report.assumptions:
        note(f"assumed: {assumption}")
    match report.verification["status"]:
        case "skipped":
            note("not verified: --no-verify")
        case "unverified":
            note("not verified: no processor computes in bfloat16; tarflow verify does it on a GPU")
    seconds = sum(report.seconds.values())
    note(f"wrote {size(report.nbytes)}, {report.parameters:,} parameters, in {seconds:.1f} s")
    typer.echo(report.path)


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A progress bar on stderr that names the stage, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=f"{stage:<9}", completed=done, total=total)


def main() -> NoReturn:
    """Entry point of the console script `tarflow-export`."""
    run(app, sys.argv[1:], name="tarflow-export", extra="export")
