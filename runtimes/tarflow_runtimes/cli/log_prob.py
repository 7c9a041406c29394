"""`tarflow log-prob`: log-probability and bits/dim of images."""

from __future__ import annotations

from typing import Annotated

import typer

from tarflow_runtimes.cli.image_verbs import BundleOption, Files, LabelsOption, opened
from tarflow_runtimes.cli.options import BatchSize, Engine, EngineDir, Json, Overwrite, Tf32, load_options
from tarflow_runtimes.cli.shell import command, new_app
from tarflow_runtimes.decode.batches import BATCH_SIZE

app = new_app()


@command(app)
def log_prob(
    files: Files,
    *,
    bundle: BundleOption = None,
    engine: Engine = "cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    labels: LabelsOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="Also write log_prob.npy, or .npz with log_prob and, for images, bits_per_dim.",
        ),
    ] = None,
    batch_size: BatchSize = BATCH_SIZE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Print the log-probability of each image in nats (natural logarithms), and its bits/dim unless it is tokens.

    No dequantisation noise is added to the images.
    """
    import numpy as np

    from tarflow_runtimes.io.write import check_output, write_arrays
    from tarflow_runtimes.model.density import bits_per_dim_of

    target = None if output is None else check_output(output, kinds=(".npy", ".npz"), overwrite=overwrite)
    options = load_options(tf32=tf32, engine_dir=engine_dir) | {"engine": engine}
    with opened(files, bundle, options, labels=labels, batch_size=batch_size) as work:
        values = np.concatenate(work.map(lambda flow, images, classes: flow.log_prob(images, labels=classes)))
        columns, table = {"log_prob": values}, "{file}\t{log_prob:.3f}"
        if work.flow.config.data == "image":
            columns["bits_per_dim"] = bits_per_dim_of(values, work.flow.config)
            table += "\t{bits_per_dim:.4f}"
        written = [] if target is None else write_arrays(target, values, key="log_prob", arrays=columns)
        rows = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
        work.finish(rows, written, as_json=as_json, table=table)
