"""`tarflow denoise`: remove the training noise from images."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from tarflow_runtimes.cli.image_verbs import (
    BundleOption,
    Files,
    LabelsOption,
    opened,
    png_names,
)
from tarflow_runtimes.cli.options import BatchSize, Engine, EngineDir, Json, Overwrite, Tf32, load_options
from tarflow_runtimes.cli.shell import command, new_app, require
from tarflow_runtimes.decode.batches import BATCH_SIZE

app = new_app()


@command(app)
def denoise(
    files: Files,
    *,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="images.npy or images.npz; for images also grid.png, or folder/ (one PNG per image).",
        ),
    ],
    bundle: BundleOption = None,
    engine: Engine = "cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    labels: LabelsOption = None,
    sigma: Annotated[
        float | None,
        typer.Option(metavar="SIGMA", help="Standard deviation of the noise. [default: the training noise]"),
    ] = None,
    strength: Annotated[float, typer.Option(metavar="FACTOR", help="Fraction of the step along the gradient.")] = 1.0,
    batch_size: BatchSize = BATCH_SIZE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Remove Gaussian noise from images with one step of sigma^2 along the gradient of the log-probability."""
    import numpy as np

    from tarflow_runtimes.io.write import PICTURES, check_output, check_pictures, write_pictures

    good = sigma is None or (sigma > 0.0 and math.isfinite(sigma))
    require(good, f"--sigma must be a positive number, got {sigma}", "leave it out for the training noise")
    good = strength >= 0.0 and math.isfinite(strength)
    require(good, f"--strength must be a finite number and not negative, got {strength}", "1 is the full step")
    target = check_output(output, kinds=PICTURES, overwrite=overwrite)
    options = load_options(tf32=tf32, engine_dir=engine_dir) | {"engine": engine}
    with opened(files, bundle, options, labels=labels, batch_size=batch_size) as work:
        names = png_names(work.images)
        check_pictures(target, work.flow.config.shape, names=names)
        images = np.concatenate(
            work.map(lambda flow, images, classes: flow.denoise(images, labels=classes, sigma=sigma, strength=strength))
        )
        text = {f"tarflow:{key}": value for key, value in work.facts().items() if key != "bundle"}
        written = write_pictures(target, images, names=names, text=text, arrays={})
        work.finish([{} for _ in images], written, as_json=as_json)
