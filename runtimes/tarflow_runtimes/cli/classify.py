"""`tarflow classify`: class posteriors of images."""

from __future__ import annotations

from typing import Annotated

import typer

from tarflow_runtimes.cli.image_verbs import BundleOption, Files, opened
from tarflow_runtimes.cli.options import BatchSize, Engine, EngineDir, Json, Overwrite, Tf32, load_options
from tarflow_runtimes.cli.shell import command, new_app
from tarflow_runtimes.decode.batches import BATCH_SIZE

app = new_app()


@command(app)
def classify(
    files: Files,
    *,
    bundle: BundleOption = None,
    engine: Engine = "cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="PATH", help="Also write the log posteriors [B, classes], .npy or .npz."
        ),
    ] = None,
    batch_size: BatchSize = BATCH_SIZE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Print the most probable class of each image and its probability, by Bayes' rule with a uniform prior."""
    import numpy as np

    from tarflow_runtimes.cli.labels import label_name
    from tarflow_runtimes.io.write import check_output, write_arrays

    target = None if output is None else check_output(output, kinds=(".npy", ".npz"), overwrite=overwrite)
    options = load_options(tf32=tf32, engine_dir=engine_dir) | {"engine": engine}
    with opened(files, bundle, options, labels=None, batch_size=batch_size) as work:
        posteriors = np.concatenate(work.map(lambda flow, images, _: flow.classify(images)))
        written = [] if target is None else write_arrays(target, posteriors, key="log_posteriors", arrays={})
        names = [label_name(label, work.flow.config.labels) for label in range(posteriors.shape[1])]
        rows = [
            {
                "label": names[int(row.argmax())],
                "class": int(row.argmax()),
                "probability": float(np.exp(row.max())),
                "log_posteriors": {name: float(value) for name, value in zip(names, row, strict=True)},
            }
            for row in posteriors
        ]
        work.finish(rows, written, as_json=as_json, table="{file}\t{label}\t{probability:.4f}")
