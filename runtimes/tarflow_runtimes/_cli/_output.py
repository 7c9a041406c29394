"""`-o`: where pictures and arrays go; checked before any work, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._errors import InputError

Kind = Literal[".png", ".npy", ".npz", "folder"]

PADDING = 2
"""Pixels between the images of a grid."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A place to write to, known to be writable and free: `kind` says what is written there."""

    path: Path
    kind: Kind
    overwrite: bool


def check_output(text: str, *, kinds: Sequence[Kind], overwrite: bool, option: str = "-o") -> Output:
    """Read `-o` and make sure that it can be written; creates nothing.

    Raises:
        InputError: on another ending, a missing or unwritable parent folder, or an existing file without `overwrite`.
    """
    path = Path(text)
    is_folder = "folder" in kinds and (text.endswith(("/", os.sep)) or path.is_dir())
    kind: Any = "folder" if is_folder else path.suffix.lower()
    if kind not in kinds:
        endings = ", ".join("/ (a folder)" if kind == "folder" else kind for kind in kinds)
        raise InputError(f"{option} {text}: cannot tell what to write", hint=f"the name must end in {endings}")
    parent = path.parent
    if not parent.is_dir():
        raise InputError(f"{option} {text}: the folder {parent} does not exist", hint=f"mkdir -p {parent}")
    if path.is_dir() != is_folder and path.exists():
        raise InputError(f"{option} {text}: is {'a folder' if path.is_dir() else 'not a folder'}", hint="give another name")
    if path.exists() and not is_folder and not overwrite:
        raise InputError(f"{option} {text}: exists already", hint="add --overwrite, or give another name")
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {text}: cannot write there ({error.strerror})", hint="give a folder that you may write to") from error
    return Output(path=path, kind=kind, overwrite=overwrite)


def check_pictures(output: Output, *, channels: int, names: Sequence[str]) -> None:
    """Make sure that images of these channels can be PNG files, and that a folder holds none of these names yet.

    Raises:
        InputError: when not.
    """
    if output.kind not in (".png", "folder"):
        return
    if channels not in (1, 3):
        raise InputError(f"-o {output.path}: PNG files have 1 or 3 channels, the model has {channels}", hint="write the images as an array: -o images.npy")
    if output.kind == "folder" and not output.overwrite:
        taken = [name for name in names if (output.path / name).exists()]
        if taken:
            raise InputError(f"-o {output.path}: holds {taken[0]} already", hint="add --overwrite, or give another folder")


def write_pictures(
    output: Output, pixels: npt.NDArray[np.float32], *, names: Sequence[str], arrays: Mapping[str, Any], text: Mapping[str, str]
) -> list[Path]:
    """Write images [B, C, height, width] as a grid, a folder of files, or arrays; returns the files written.

    `arrays` joins the images in an `.npz` file; `text` goes into each PNG file.
    """
    if output.kind in (".npy", ".npz"):
        return write_arrays(output, pixels, key="images", arrays=arrays)
    levels = to_uint8(pixels)
    if output.kind == ".png":
        _publish(output.path, lambda path: _save_png(path, grid(levels), text))
        return [output.path]
    created = not output.path.exists()
    if created:
        output.path.mkdir()
    try:
        with _scratch_folder(output.path) as scratch:
            for name, image in zip(names, levels, strict=True):
                _save_png(scratch / name, image, text)
            for name in names:
                (scratch / name).replace(output.path / name)
    except BaseException:
        if created:
            shutil.rmtree(output.path, ignore_errors=True)
        raise
    return [output.path / name for name in names]


def write_arrays(output: Output, main: npt.NDArray[Any], *, key: str, arrays: Mapping[str, Any]) -> list[Path]:
    """Write `main` as an `.npy` file, or with `arrays` beside it as an `.npz` file; returns the file written."""

    def save(path: Path) -> None:
        with path.open("wb") as file:
            if output.kind == ".npy":
                np.save(file, main)
            else:
                np.savez(file, **{key: main, **arrays})

    _publish(output.path, save)
    return [output.path]


def to_uint8(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Images [B, C, height, width] in [-1, 1] to [B, height, width, C] in 0 .. 255: rint(127.5 clip(x) + 127.5)."""
    levels = np.rint(127.5 * np.clip(pixels.astype(np.float64), -1.0, 1.0) + 127.5).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def grid(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Images [B, height, width, C] side by side, row by row, in a near-square [height, width, C]."""
    count, height, width, channels = levels.shape
    if count == 1:
        return levels[0]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + PADDING) - PADDING, columns * (width + PADDING) - PADDING, channels), 255, np.uint8)
    for index, image in enumerate(levels):
        top, left = index // columns * (height + PADDING), index % columns * (width + PADDING)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _save_png(path: Path, image: npt.NDArray[np.uint8], text: Mapping[str, str]) -> None:
    from PIL import Image, PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, format="PNG", pnginfo=chunks)


def _publish(path: Path, save: Callable[[Path], None]) -> None:
    """Write beside `path` and rename into place, so that a reader never sees half a file."""
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
