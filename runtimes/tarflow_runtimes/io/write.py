"""Write images and arrays: targets are checked before any work, and files are written completely or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.errors import InputError
from tarflow_runtimes.io.pictures import grid, save_png, to_uint8

Kind = Literal[".png", ".npy", ".npz", ".json", "folder"]

PICTURES: Final[tuple[Kind, ...]] = (".png", "folder", ".npy", ".npz")
"""The kinds of output: one grid, a folder of images, or an array."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A target path that was checked to be writable and free.

    `name` is used in messages, `kind` is what will be written.
    """

    name: str
    path: Path
    kind: Kind
    overwrite: bool


def check_output(text: str, *, kinds: Sequence[Kind], overwrite: bool, option: str = "-o") -> Output:
    """Check that the path given by `option` (None if by a caller of the API) can be written; creates nothing.

    Raises:
        InputError: on an unknown suffix, a missing or unwritable parent folder, or an existing file without
            `overwrite`.
    """
    name, path = f"{option} {text}".lstrip(), Path(text)
    is_folder = "folder" in kinds and (text.endswith(("/", os.sep)) or path.is_dir())
    kind: Any = "folder" if is_folder else path.suffix.lower()
    if not text or kind not in kinds:
        endings = ", ".join("/ (a folder)" if kind == "folder" else kind for kind in kinds)
        raise InputError(f"{name}: cannot tell what to write", hint=f"the name must end in {endings}")
    parent = path.parent
    if not parent.is_dir():
        raise InputError(f"{name}: the folder {parent} does not exist", hint=f"mkdir -p {parent}")
    if path.is_dir() != is_folder and path.exists():
        raise InputError(f"{name}: is {'a folder' if path.is_dir() else 'not a folder'}", hint="give another name")
    if path.exists() and not is_folder and not overwrite:
        raise InputError(f"{name}: exists already", hint="add --overwrite, or give another name")
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else parent):
            pass
    except OSError as error:
        raise InputError(
            f"{name}: cannot write there ({error.strerror})", hint="give a folder that you may write to"
        ) from error
    return Output(name=name, path=path, kind=kind, overwrite=overwrite)


def check_pictures(output: Output, shape: Sequence[int], *, names: Sequence[str]) -> None:
    """Check that images of this shape can be PNG files, and that a folder does not contain these names yet.

    Raises:
        InputError: when the check fails.
    """
    if output.kind not in (".png", "folder"):
        return
    problem = ""
    if len(shape) != 3:
        problem = "the data are tokens, which cannot be written as pictures"
    elif shape[0] not in (1, 3):
        problem = f"PNG files have 1 or 3 channels, the images have {shape[0]}"
    if problem:
        raise InputError(f"{output.name}: {problem}", hint="write an array: .npy or .npz")
    taken = [name for name in names if (output.path / name).exists()] if output.kind == "folder" else []
    if taken and not output.overwrite:
        raise InputError(f"{output.name}: holds {taken[0]} already", hint="add --overwrite, or give another folder")


def write_pictures(
    output: Output,
    images: npt.NDArray[np.float32],
    *,
    names: Sequence[str],
    text: Mapping[str, str],
    arrays: Mapping[str, Any],
    columns: int | None = None,
    captions: Sequence[str] | None = None,
) -> list[Path]:
    """Write images as a grid, a folder of PNG files or an array, and tokens as an array; returns the files written.

    `names` are the files in a folder, `text` is stored in each PNG file, `arrays` are added to an `.npz` file, and
    `columns` and `captions` apply to a grid.
    """
    if output.kind in (".npy", ".npz"):
        return write_arrays(output, images, key="images", arrays=arrays)
    levels = to_uint8(images)
    if output.kind == ".png":
        sheet = grid(levels, columns=columns, captions=captions)
        publish(output.path, lambda path: save_png(path, sheet, text))
        return [output.path]
    with _new_folder(output.path), _scratch_folder(output.path) as scratch:
        for name, image in zip(names, levels, strict=True):
            save_png(scratch / name, image, text)
        for name in names:
            (scratch / name).replace(output.path / name)
    return [output.path / name for name in names]


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[None]:
    """Create the folder if it is missing, and remove it again if writing into it fails."""
    created = not path.exists()
    path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if created:
            shutil.rmtree(path, ignore_errors=True)
        raise


def write_arrays(output: Output, main: npt.NDArray[Any], *, key: str, arrays: Mapping[str, Any]) -> list[Path]:
    """Write `main` as an `.npy` file, or together with `arrays` as an `.npz` file; returns the file written."""

    def save(path: Path) -> None:
        with path.open("wb") as file:
            if output.kind == ".npy":
                np.save(file, main)
            else:
                np.savez(file, **{key: main, **arrays})

    publish(output.path, save)
    return [output.path]


def publish(path: Path, save: Callable[[Path], None]) -> None:
    """Write next to `path` and rename into place, so that a reader never sees a partial file."""
    with _scratch_folder(path.parent) as scratch:
        save(scratch / path.name)
        (scratch / path.name).replace(path)


@contextlib.contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=".tarflow-", dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
