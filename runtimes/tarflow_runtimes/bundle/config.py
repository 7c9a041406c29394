"""`ModelConfig`: the configuration of a model, and the values that the fields of a bundle may have.

Axis letters used in this package: `B` images, `N` patches, `D` values per patch (C * p * p), `W` width, `C` image
channels, `H` heads, `E` head dimension, `L` layers per block, `K` flow blocks, `G` guidance branches (1 or 2),
`R` = G * B cache rows, `S` patches in one call of a step graph. "Images" are whatever the data of the model are.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, get_args

Order = Literal["identity", "reversed"]
Precision = Literal["float32", "float16", "bfloat16", "int8"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)
MODEL_LIMIT: Final = 1 << 44
"""Limit of blocks * layers * patches^2 * width, so that byte counts in engines fit 64 bits."""
IMAGE_LIMIT: Final = 1 << 31
"""Limit of the number of values in an image."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The configuration of the model in a bundle; the fields are those of the manifest's `config`.

    The data are square images of `image_size`, cut into patches, or `tokens` of `token_values` each; the fields of the
    other kind are None. `noise_std` is sigma of the training noise in model units ([-1, 1] images), None when unknown
    or when the model was trained with uniform dequantisation (`noise == "uniform"`). `classes` is 0 for unconditional
    models.
    """

    image_size: int | None = None
    image_channels: int | None = None
    patch_size: int | None = None
    tokens: int | None = None
    token_values: int | None = None
    width: int
    blocks: int
    layers: int
    head_dim: int
    classes: int
    nvp: bool
    noise: str
    noise_std: float | None
    labels: tuple[str, ...] | None

    @property
    def data(self) -> Literal["image", "tokens"]:
        """The kind of data, images or tokens."""
        return "image" if self.tokens is None else "tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, (C, height, width), or of the tokens, (N, D)."""
        if self.image_size is None or self.image_channels is None:
            return self.patches, self.patch_values
        return self.image_channels, self.image_size, self.image_size

    @property
    def patches(self) -> int:
        """N, the number of patches, or of tokens."""
        if self.image_size is None or self.patch_size is None:
            return self.tokens or 0
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """D, the number of values in a patch, C * p * p, or in a token."""
        if self.image_channels is None or self.patch_size is None:
            return self.token_values or 0
        return self.image_channels * self.patch_size**2

    @property
    def dims(self) -> int:
        """N * D, the number of values in an image."""
        return self.patches * self.patch_values

    @property
    def heads(self) -> int:
        """The number of attention heads, H = W / E."""
        return self.width // self.head_dim
