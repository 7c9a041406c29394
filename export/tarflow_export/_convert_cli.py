"""`tarflow convert`: convert a bundle to another precision, without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tarflow_export._cli import progress_bar, show_table, summarise
from tarflow_runtimes.cli.options import Json
from tarflow_runtimes.cli.shell import command, new_app, print_json
from tarflow_runtimes.errors import InputError

if TYPE_CHECKING:
    from tarflow_runtimes.bundle.config import Precision

app = new_app()


@command(app)
def convert(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A .tarflow folder, float32.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float16|bfloat16", help="Precision of linear layers, their activations and caches."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="int8", help="Weights of linear layers: 8 bits with a scale for every 128.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the comparison with PyTorch; the bundle records that.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a bundle to another precision, and compare it with what PyTorch computed for the export.

    Give --dtype or --weights. The bundle is written complete and verified, or not at all; tarflow verify verifies
    bfloat16 on a GPU. Exit codes: 0 done, 1 a comparison missed its tolerance, 2 bad input.
    """
    precision = _precision(dtype, weights)
    from tarflow_export._convert import convert_bundle  # noqa: PLC0415 - not before --help and the check above

    with progress_bar() as on_progress:
        report = convert_bundle(
            bundle,
            output,
            precision=precision,
            verify=not no_verify,
            overwrite=overwrite,
            on_progress=on_progress,
            on_verified=show_table,
        )
    if as_json:
        print_json(report.to_json())
    else:
        summarise(report)


def _precision(dtype: str | None, weights: str | None) -> Precision:
    """The precision given by the two options."""
    match dtype, weights:
        case "float16" | "bfloat16", None:
            return dtype
        case None, "int8":
            return "int8"
        case None, str():
            message = f"--weights must be int8, got {weights!r}"
        case str(), None:
            message = f"--dtype must be float16 or bfloat16, got {dtype!r}"
        case _:
            message = "a bundle has one precision: give one of --dtype and --weights"
    raise InputError(message, hint="--dtype float16, --dtype bfloat16 or --weights int8")
