"""`tarflow encode`: map images to latents."""

from __future__ import annotations

from typing import Annotated

import typer

from tarflow_runtimes.cli.image_verbs import BundleOption, Files, LabelsOption, opened
from tarflow_runtimes.cli.options import BatchSize, Engine, EngineDir, Json, Overwrite, Tf32, load_options
from tarflow_runtimes.cli.shell import command, new_app
from tarflow_runtimes.decode.batches import BATCH_SIZE

app = new_app()


@command(app)
def encode(
    files: Files,
    *,
    output: Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="z.npy, or z.npz with z and log_det.")],
    bundle: BundleOption = None,
    engine: Engine = "cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    labels: LabelsOption = None,
    batch_size: BatchSize = BATCH_SIZE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Map images to latents z [B, N, D], the noise that would produce them, and log|det| in nats.

    tarflow infer --noise z.npy --no-denoise maps them back.
    """
    import numpy as np

    from tarflow_runtimes.io.write import check_output, write_arrays

    target = check_output(output, kinds=(".npy", ".npz"), overwrite=overwrite)
    options = load_options(tf32=tf32, engine_dir=engine_dir) | {"engine": engine}
    with opened(files, bundle, options, labels=labels, batch_size=batch_size) as work:
        encoded = work.map(lambda flow, images, classes: flow.encode(images, labels=classes))
        z, log_det = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        written = write_arrays(target, z, key="z", arrays={"log_det": log_det})
        work.finish([{"log_det": float(value)} for value in log_det], written, as_json=as_json)
