"""Shared code of the commands that read image files: `encode`, `denoise`, `log-prob`, `classify`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.options import check_batch_size
from tarflow_runtimes.cli.shell import counted, note, print_json
from tarflow_runtimes.decode.batches import cut

if TYPE_CHECKING:
    from tarflow_runtimes import Flow
    from tarflow_runtimes.io.read import ImageSet

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


@dataclasses.dataclass(kw_only=True)
class Work:
    """One run of a command: the input images, the model, and the results."""

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
            for part in cut(total, self.batch_size):
                labels = None if self.labels is None else self.labels[part]
                results.append(function(self.flow, self.images.values[part], labels))
                clock.show(part.stop, total)
        self.seconds = clock.seconds
        return results

    def facts(self) -> dict[str, Any]:
        """Facts about the run: bundle, digest, engine, precision."""
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
        """Report the results: JSON, or one table row per image, on stdout; a line about files on stderr."""
        from tarflow_runtimes.cli.labels import label_name

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
            count = counted(len(rows), self.flow.config.data)
            note(f"wrote {what} ({count}, {self.seconds:.1f} s, {self.flow.engine_name})")


@contextlib.contextmanager
def opened(
    paths: list[Path], bundle: Path | None, options: dict[str, Any], *, labels: str | None, batch_size: int
) -> Iterator[Work]:
    """Open the model; read the images and labels of a command."""
    check_batch_size(batch_size)

    import tarflow_runtimes as tfr
    from tarflow_runtimes.cli.labels import check_labels, parse_labels, spread
    from tarflow_runtimes.io.read import read_images

    with tfr.load(bundle, **options) as flow:
        config = flow.config
        listed = parse_labels(labels, classes=config.classes, names=config.labels)
        images = read_images(paths, config.shape)
        check_labels(listed, len(images.values))
        classes = spread(listed, len(images.values))
        yield Work(flow=flow, images=images, labels=classes, batch_size=batch_size)


def png_names(images: ImageSet) -> list[str]:
    """PNG file names, one per image, named after its source file, and numbered if two would be the same."""
    stems = [path.stem + ("" if place is None else f"_{place:06d}") for path, place in images.sources]
    if len(set(stems)) < len(stems):
        stems = [f"{index:06d}_{stem}" for index, stem in enumerate(stems)]
    return [f"{stem}.png" for stem in stems]
