"""`tarflow encode`, `denoise`, `log-prob`, `classify`: the verbs that take image files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.engine_options import Engine, EngineDir, Tf32, load_options
from tarflow_runtimes.cli.shell import command, new_app, note, print_json, require

if TYPE_CHECKING:
    from tarflow_runtimes import Flow
    from tarflow_runtimes.cli.image_input import ImageSet

BATCH_SIZE = 64
"""Images that run together unless told otherwise."""

encode_app, denoise_app, log_prob_app, classify_app = new_app(), new_app(), new_app(), new_app()

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILES",
        help="Image files of the model's size, or .npy and .npz arrays: [B, C, h, w] in -1 .. 1, or tokens [B, N, D].",
    ),
]
BundleOption = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="BUNDLE", help="A .tarflow folder. [default: the digits of the package]"),
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="LIST",
        help="Class of each image, by number or name; null for no class. A shorter list is repeated.",
    ),
]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="COUNT", help="Images that run together.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Report on stdout as one JSON object.")]


@command(encode_app)
def encode(
    files: Files,
    *,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="PATH", help="z.npy, or z.npz with log_det beside z.")
    ],
    bundle: BundleOption = None,
    engine: Engine = "ort-cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    labels: LabelsOption = None,
    batch_size: BatchOption = BATCH_SIZE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Map images to the noise that they would be drawn from, z [B, N, D], and log|det| in nats.

    tarflow infer --noise z.npy --no-denoise maps it back.
    """
    import numpy as np

    from tarflow_runtimes.cli.output import check_output, write_arrays

    target = check_output(output, kinds=(".npy", ".npz"), overwrite=overwrite)
    options = {"engine": engine, **load_options(tf32=tf32, engine_dir=engine_dir)}
    with _opened(files, bundle=bundle, options=options, labels=labels, batch_size=batch_size) as work:
        encoded = work.map(lambda flow, images, classes: flow.encode(images, labels=classes))
        z, log_det = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        written = write_arrays(target, z, key="z", arrays={"log_det": log_det})
        work.finish([{"log_det": float(value)} for value in log_det], written, as_json=as_json)


@command(denoise_app)
def denoise(
    files: Files,
    *,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="images.npy or images.npz; of pictures also grid.png, or folder/ (a PNG per image).",
        ),
    ],
    bundle: BundleOption = None,
    engine: Engine = "ort-cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    labels: LabelsOption = None,
    sigma: Annotated[
        float | None,
        typer.Option(metavar="SIGMA", help="Deviation of the noise, in -1 .. 1. [default: the training noise]"),
    ] = None,
    strength: Annotated[
        float, typer.Option(metavar="FACTOR", help="How far to go along the gradient; 1 is the full step.")
    ] = 1.0,
    batch_size: BatchOption = BATCH_SIZE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Take Gaussian noise out of images: one step of sigma^2 along the gradient of the log-probability."""
    import numpy as np

    from tarflow_runtimes.cli.output import check_output, check_pictures, write_pictures

    good = sigma is None or (sigma > 0.0 and math.isfinite(sigma))
    require(good, f"--sigma must be a positive number, got {sigma}", "leave it out for the training noise")
    good = strength >= 0.0 and math.isfinite(strength)
    require(good, f"--strength must be a finite number and not negative, got {strength}", "1 is the full step")
    target = check_output(output, kinds=(".png", "folder", ".npy", ".npz"), overwrite=overwrite)
    options = {"engine": engine, **load_options(tf32=tf32, engine_dir=engine_dir)}
    with _opened(files, bundle=bundle, options=options, labels=labels, batch_size=batch_size) as work:
        names = _png_names(work.images)
        check_pictures(target, work.flow.config, names=names)
        images = np.concatenate(
            work.map(lambda flow, images, classes: flow.denoise(images, labels=classes, sigma=sigma, strength=strength))
        )
        text = {f"tarflow:{key}": value for key, value in work.facts().items() if key != "bundle"}
        written = write_pictures(target, images, names=names, text=text, arrays={})
        work.finish([{} for _ in images], written, as_json=as_json)


@command(log_prob_app)
def log_prob(
    files: Files,
    *,
    bundle: BundleOption = None,
    engine: Engine = "ort-cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    labels: LabelsOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="Also write log_prob.npy, or .npz with bits_per_dim beside it where these are images.",
        ),
    ] = None,
    batch_size: BatchOption = BATCH_SIZE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Print the log-probability in nats of each image, and its bits/dim where it is no array of tokens.

    Images are taken as they are; no dequantisation noise is added.
    """
    import numpy as np

    from tarflow_runtimes.cli.output import check_output, write_arrays
    from tarflow_runtimes.model.density import PIXEL_SCALE_BITS

    target = None if output is None else check_output(output, kinds=(".npy", ".npz"), overwrite=overwrite)
    options = {"engine": engine, **load_options(tf32=tf32, engine_dir=engine_dir)}
    with _opened(files, bundle=bundle, options=options, labels=labels, batch_size=batch_size) as work:
        values = np.concatenate(work.map(lambda flow, images, classes: flow.log_prob(images, labels=classes)))
        columns, table = {"log_prob": values}, "{file}\t{log_prob:.3f}"
        if work.flow.config.data == "image":
            columns["bits_per_dim"] = -values / (work.flow.config.dims * math.log(2.0)) + PIXEL_SCALE_BITS
            table += "\t{bits_per_dim:.4f}"
        written = [] if target is None else write_arrays(target, values, key="log_prob", arrays=columns)
        rows = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
        work.finish(rows, written, as_json=as_json, table=table)


@command(classify_app)
def classify(
    files: Files,
    *,
    bundle: BundleOption = None,
    engine: Engine = "ort-cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="PATH", help="Also write the log posteriors [B, classes], .npy or .npz."
        ),
    ] = None,
    batch_size: BatchOption = BATCH_SIZE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Print the most probable class of each image and its probability, by Bayes' rule with a uniform prior."""
    import numpy as np

    from tarflow_runtimes.cli.labels import label_name
    from tarflow_runtimes.cli.output import check_output, write_arrays

    target = None if output is None else check_output(output, kinds=(".npy", ".npz"), overwrite=overwrite)
    options = {"engine": engine, **load_options(tf32=tf32, engine_dir=engine_dir)}
    with _opened(files, bundle=bundle, options=options, labels=None, batch_size=batch_size) as work:
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


@dataclasses.dataclass(kw_only=True)
class _Work:
    """One run of a verb: the images read, the model that takes them, and what came out."""

    flow: Flow
    images: ImageSet
    labels: list[int] | None
    batch_size: int
    seconds: float = 0.0

    def map(self, function: Callable[[Flow, Any, list[int] | None], Any]) -> list[Any]:
        """The function's result for each batch of images."""
        from tarflow_runtimes.cli.progress import StepClock

        total = len(self.images.values)
        results = []
        with StepClock("images") as clock:
            for start in range(0, total, self.batch_size):
                part = slice(start, min(start + self.batch_size, total))
                labels = None if self.labels is None else self.labels[part]
                results.append(function(self.flow, self.images.values[part], labels))
                clock.show(part.stop, total)
        self.seconds = clock.seconds
        return results

    def facts(self) -> dict[str, Any]:
        """What ran: bundle, digest, engine, precision."""
        bundle, engine = self.flow.bundle, self.flow.engine
        return {
            "bundle": str(bundle.path),
            "digest": bundle.digest,
            "engine": engine.name,
            "precision": engine.precision,
        }

    def finish(
        self, rows: Sequence[dict[str, Any]], written: Sequence[Path], *, as_json: bool, table: str = ""
    ) -> None:
        """Say what came out: JSON, or a row of the table for each image, on stdout; a line about files on stderr."""
        from tarflow_runtimes.cli.labels import label_name
        from tarflow_runtimes.cli.output import counted

        named = [{"file": self.images.name(index)} | row for index, row in enumerate(rows)]
        if self.labels is not None:
            words = [label_name(label, self.flow.config.labels) for label in self.labels]
            named = [row | {"label": word} for row, word in zip(named, words, strict=True)]
        if as_json:
            files = [str(path) for path in written]
            print_json(self.facts() | {"images": named, "files": files, "seconds": self.seconds})
        elif table:
            for row in named:
                typer.echo(table.format(**row))
        if written:
            what = str(written[0]) if len(written) == 1 else f"{len(written)} files to {written[0].parent}"
            count = counted(len(rows), self.flow.config)
            note(f"wrote {what} ({count}, {self.seconds:.1f} s, {self.flow.engine_name})")


@contextlib.contextmanager
def _opened(
    paths: list[Path], *, bundle: Path | None, options: dict[str, Any], labels: str | None, batch_size: int
) -> Iterator[_Work]:
    """Open the model; read the images and labels that a verb was given."""
    require(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}", f"leave it out for {BATCH_SIZE}")

    import tarflow_runtimes as tfr
    from tarflow_runtimes.cli.image_input import read_images
    from tarflow_runtimes.cli.labels import check_labels, parse_labels, spread

    with tfr.load(bundle, **options) as flow:
        config = flow.config
        listed = parse_labels(labels, classes=config.classes, names=config.labels)
        images = read_images(paths, config)
        check_labels(listed, len(images.values))
        classes = spread(listed, len(images.values))
        yield _Work(flow=flow, images=images, labels=classes, batch_size=batch_size)


def _png_names(images: ImageSet) -> list[str]:
    """A PNG file for each image, called after the file that it came from; numbered where two would be the same."""
    stems = [path.stem + ("" if place is None else f"_{place:06d}") for path, place in images.sources]
    if len(set(stems)) < len(stems):
        stems = [f"{index:06d}_{stem}" for index, stem in enumerate(stems)]
    return [f"{stem}.png" for stem in stems]
