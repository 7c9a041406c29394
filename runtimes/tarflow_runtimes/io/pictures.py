"""Files of model-range images: 8-bit values, grids, PNG with text, arrays; each appears whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.errors import InputError

PADDING: Final = 2
"""White pixels between the images of a grid."""

CAPTION_HEIGHT: Final = 14
"""Pixels above an image for its caption."""


def to_uint8(images: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Images [B, C, height, width] in [-1, 1] -> [B, height, width, C]: rint(127.5 * clip(x, -1, 1) + 127.5).

    Raises:
        InputError: when an image holds a value that is not finite, or these are tokens.
    """
    if images.ndim != 4:
        raise InputError("these are tokens, not images", hint="save as .npy or .npz")
    broken = int(np.sum(~np.isfinite(images).all(axis=(1, 2, 3))))
    if broken:
        raise InputError(
            f"{broken} of {len(images)} images hold values that are not finite",
            hint="lower the guidance, or check the model",
        )
    levels = np.rint(127.5 * np.clip(images.astype(np.float64), -1.0, 1.0) + 127.5).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def grid(
    levels: npt.NDArray[np.uint8], *, columns: int | None = None, captions: Sequence[str] | None = None
) -> npt.NDArray[np.uint8]:
    """Images [B, height, width, C] row by row on a white sheet [height, width, C], near-square unless told otherwise.

    Captions stand above their images; where every row has the same ones, above the first row only.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, height, width, channels = levels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    heads = 0 if captions is None else 1 if list(captions) == [captions[i % columns] for i in range(count)] else rows
    lefts = [column * (width + PADDING) for column in range(columns)]
    tops = [row * (height + PADDING) + min(row + 1, heads) * CAPTION_HEIGHT for row in range(rows)]
    shape = (tops[-1] + height, lefts[-1] + width)
    sheet = Image.fromarray(np.full(shape if channels == 1 else (*shape, channels), 255, np.uint8))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, image in enumerate(levels):
        row, left = index // columns, lefts[index % columns]
        sheet.paste(Image.fromarray(image[..., 0] if channels == 1 else image), (left, tops[row]))
        if captions is not None and row < heads:
            word = captions[index]
            while word and draw.textlength(word, font=font) > width:
                word = word[:-1]
            draw.text((left + width // 2, tops[row] - CAPTION_HEIGHT // 2), word, fill=0, font=font, anchor="mm")
    return np.asarray(sheet).reshape(*shape, channels)


def save_images(
    path: str | os.PathLike[str],
    images: npt.NDArray[np.float32],
    *,
    text: Mapping[str, str] | None = None,
    arrays: Mapping[str, Any] | None = None,
    first_index: int = 0,
) -> list[Path]:
    """Write images [B, C, height, width] and return the files written.

    `grid.png` is one sheet; `NAME.npy` the array; `NAME.npz` the array as `images` with `arrays` beside it; a name
    without an ending, or an existing folder, is a folder of one PNG file per image, `000000.png` being image
    `first_index` = 0. `text` goes into each PNG file. A file that is there already is replaced.

    Raises:
        InputError: on another ending, a missing or unwritable parent folder, or PNG with C other than 1 or 3.
    """
    target = Path(path)
    kind = "" if target.is_dir() else target.suffix.lower()
    if kind not in ("", ".png", ".npy", ".npz"):
        raise InputError(
            f"{path}: cannot tell what to write", hint="the name must end in .png, .npy or .npz, or be a folder"
        )
    if not target.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {target.parent} does not exist", hint=f"mkdir -p {target.parent}")
    if kind in ("", ".png") and images.ndim != 4:
        raise InputError(f"{path}: these are tokens, of which there is no picture", hint="save as .npy or .npz")
    if kind in ("", ".png") and images.shape[1] not in (1, 3):
        raise InputError(
            f"{path}: PNG files have 1 or 3 channels, the images have {images.shape[1]}", hint="save as .npy or .npz"
        )
    if kind == "" and target.exists() and not target.is_dir():
        raise InputError(f"{path}: is a file, not a folder", hint="give another name")
    try:
        if kind == "":
            return _save_folder(target, to_uint8(images), text or {}, first_index)
        with _beside(target) as scratch:
            if kind == ".png":
                save_png(scratch, grid(to_uint8(images)), text or {})
            else:
                with scratch.open("wb") as file:
                    if kind == ".npy":
                        np.save(file, images)
                    else:
                        np.savez(file, images=images, **(arrays or {}))
    except OSError as error:
        raise InputError(
            f"{path}: cannot write there: {error.strerror}", hint="give a folder that you may write to"
        ) from error
    return [target]


def save_png(path: Path, picture: npt.NDArray[np.uint8], text: Mapping[str, str]) -> None:
    """Write one picture [height, width, C] with text chunks; C is 1 or 3."""
    from PIL import Image, PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path, format="PNG", pnginfo=chunks)


def _save_folder(folder: Path, levels: npt.NDArray[np.uint8], text: Mapping[str, str], first_index: int) -> list[Path]:
    """One PNG file per image; all are made before the first gets its name."""
    names = [f"{first_index + index:06d}.png" for index in range(len(levels))]
    with tempfile.TemporaryDirectory(prefix=".tarflow-", dir=folder.absolute().parent) as scratch:
        for name, image in zip(names, levels, strict=True):
            save_png(Path(scratch) / name, image, text)
        created = not folder.exists()
        folder.mkdir(exist_ok=True)
        try:
            return [(Path(scratch) / name).replace(folder / name) for name in names]
        except BaseException:
            if created:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A scratch path in the target's folder that becomes the target when the body succeeds."""
    with tempfile.TemporaryDirectory(prefix=".tarflow-", dir=target.absolute().parent) as scratch:
        path = Path(scratch) / target.name
        yield path
        path.replace(target)
