"""Convert model-range images to 8-bit values, grids and PNG files with text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

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
        InputError: when an image has a value that is not finite, or the data are tokens.
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
    """Arrange images [B, height, width, C] row by row in a white grid [height, width, C], near-square by default.

    Captions are above their images; if all rows have the same captions, above the first row only.
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


def save_png(path: Path, picture: npt.NDArray[np.uint8], text: Mapping[str, str]) -> None:
    """Write one image [height, width, C] with text chunks; C is 1 or 3."""
    from PIL import Image, PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path, format="PNG", pnginfo=chunks)
