"""Read image files and arrays, and check them against the shape of the model's data; tokens are always arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.errors import InputError

CHANNELS_OF_MODE = {"L": 1, "RGB": 3}
"""Pillow's modes that are accepted; palettes are expanded, alpha and 16 bits are refused."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """Images from one or more files, and where each came from.

    `values` is float32 [B, C, height, width] in the model's range, or [B, N, D] for a model of tokens; `sources` has B
    pairs of a file and the index in that file (None for a file with one image).
    """

    values: npt.NDArray[np.float32]
    sources: tuple[tuple[Path, int | None], ...]

    def name(self, index: int) -> str:
        """`photo.png`, or `arrays.npy[3]` for the fourth image of an array file."""
        path, place = self.sources[index]
        return str(path) if place is None else f"{path}[{place}]"


def read_images(paths: Sequence[Path], shape: Sequence[int]) -> ImageSet:
    """Read files in the order given, images of shape [C, height, width] or tokens of shape [N, D].

    An array file may contain any number of them.

    Raises:
        InputError: on a file that cannot be read or does not have the shape of the model's data.
    """
    is_image = len(shape) == 3
    takes = "image files, .npy or .npz" if is_image else f".npy or .npz files, float32 {_axes(shape)}"
    arrays: list[npt.NDArray[np.float32]] = []
    sources: list[tuple[Path, int | None]] = []
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}", hint=f"give {takes}")
        if path.suffix.lower() in (".npy", ".npz"):
            values = _read_array(path, shape)
            sources += [(path, place) for place in range(len(values))]
        elif not is_image:
            raise InputError(f"{path}: the model's data are tokens, not pictures", hint=f"give {takes}")
        else:
            values = _read_picture(path, shape)
            sources.append((path, None))
        arrays.append(values)
    return ImageSet(values=np.concatenate(arrays), sources=tuple(sources))


def _axes(shape: Sequence[int]) -> str:
    """The shape of an array of the model's data, as text."""
    return f"[B, {', '.join(map(str, shape))}]"


def _read_picture(path: Path, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Read one image [1, C, height, width]; 0 .. 255 maps to -1 .. 1."""
    from PIL import Image

    channels, height, width = shape
    if channels not in CHANNELS_OF_MODE.values():
        raise InputError(
            f"{path}: image files have 1 or 3 channels, the model has {channels}",
            hint="give a .npy array [B, C, height, width]",
        )
    try:
        with Image.open(path) as opened:
            picture = (
                opened.convert("RGB") if opened.mode == "P" and "transparency" not in opened.info else opened.copy()
            )
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path}: not an image that can be read", hint="give a PNG or another common image file, .npy or .npz"
        ) from error
    if picture.mode not in CHANNELS_OF_MODE:
        raise InputError(
            f"{path}: pixels of mode {picture.mode}, expected {' or '.join(CHANNELS_OF_MODE)} of 8 bits",
            hint="convert the image first; transparency must be flattened",
        )
    if CHANNELS_OF_MODE[picture.mode] != channels:
        raise InputError(
            f"{path}: {CHANNELS_OF_MODE[picture.mode]} channels, the model has {channels}",
            hint=f"convert the image to {'greyscale' if channels == 1 else 'RGB'} first",
        )
    if picture.size != (width, height):
        raise InputError(
            f"{path}: {picture.width}x{picture.height} pixels, the model has {width}x{height}",
            hint="crop and scale the image first",
        )
    pixels = np.asarray(picture, np.float32).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]) / np.float32(127.5) - np.float32(1)


def _read_array(path: Path, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    what, axes = ("images", "C, height, width") if len(shape) == 3 else ("tokens", "N, D")
    values = load_float32(path, key="images", what=what)
    if not values.ndim or values.shape[1:] != tuple(shape):
        raise InputError(f"{path}: shape {list(values.shape)}, expected {_axes(shape)}", hint=f"{what} are [B, {axes}]")
    return values


def load_float32(path: Path, *, key: str, what: str) -> npt.NDArray[np.float32]:
    """Read a finite float32 array from a `.npy` file, or the array `key` of an `.npz` file, without running any code.

    Raises:
        InputError: on a missing or damaged file, a wrong dtype, or a value that is not finite.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such file'}", hint="give a float32 .npy file"
        )
    try:
        with path.open("rb") as file:
            loaded: Any = np.load(file, allow_pickle=False)
            array = loaded if isinstance(loaded, np.ndarray) else loaded[key]
    except KeyError:
        raise InputError(f"{path}: holds no array named {key!r}", hint=f"save it as np.savez(..., {key}=...)") from None
    except Exception as error:  # damaged files raise ValueError, BadZipFile, EOFError, zlib.error, ...
        raise InputError(f"{path}: not a NumPy file that can be read", hint="give a float32 .npy file") from error
    if array.dtype != np.float32:
        raise InputError(
            f"{path}: dtype {array.dtype}, expected float32",
            hint="np.save(path, array.astype('float32')), in the model's range [-1, 1]"
            if what == "images"
            else "np.save(path, array.astype('float32'))",
        )
    if array.size == 0:
        raise InputError(f"{path}: shape {list(array.shape)} holds no {what}", hint="write at least one into it")
    if not np.isfinite(array).all():
        raise InputError(
            f"{path}: {int((~np.isfinite(array)).sum())} values are not finite", hint=f"{what} must be finite numbers"
        )
    return array
