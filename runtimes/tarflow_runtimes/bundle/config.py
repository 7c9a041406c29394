"""`ModelConfig`: the configuration of a model, and the values that the fields of a bundle may have.

Axis letters used in this package: `B` images, `N` patches, `D` values per patch (C * p * p), `W` width, `C` image
channels, `H` heads, `E` head dimension, `L` layers per block, `K` flow blocks, `G` guidance branches (1 or 2),
`R` = G * B cache rows, `S` patches in one call of a step graph. "Images" are whatever the data of the model are.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, get_args

from tarflow_runtimes.errors import InputError

Order = Literal["identity", "reversed"]
Precision = Literal["float32", "float16", "bfloat16", "int8"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)

SIZES: Final[dict[str, tuple[str, ...]]] = {
    "image": ("image_size", "image_channels", "patch_size"),
    "tokens": ("tokens", "token_values"),
}
"""The fields that describe each kind of data; those of the other kind are None."""

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
    models. The rules are those of the training core's `FlowConfig`, in the same words; neither imports the other.

    Raises:
        InputError: on a field out of range or a contradiction between two fields.
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

    def __post_init__(self) -> None:
        self._check_kind()
        for name in (*SIZES[self.data], "width", "blocks", "layers", "head_dim", "classes"):
            value, least = getattr(self, name), 0 if name == "classes" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be an integer >= {least}, got {value!r}")
        if not isinstance(self.nvp, bool):
            raise InputError(f"nvp must be true or false, got {self.nvp!r}")
        self._check_grid()
        self._check_noise()
        self._check_labels()

    def _check_kind(self) -> None:
        given = [name for names in SIZES.values() for name in names if getattr(self, name) is not None]
        hint = " or ".join(f"{', '.join(names)} ({kind})" for kind, names in SIZES.items())
        if not given:
            raise InputError("model configuration does not say what the data are", hint=f"give {hint}")
        if len({kind for kind, names in SIZES.items() for name in names if name in given}) > 1:
            raise InputError(f"data are images or tokens, not both: got {', '.join(given)}", hint=f"give {hint}")
        if missing := [name for name in SIZES[self.data] if name not in given]:
            raise InputError(
                f"model configuration is incomplete: {', '.join(given)} without {', '.join(missing)}",
                hint=f"give {hint}",
            )

    def _check_grid(self) -> None:
        if self.image_size is not None and self.patch_size is not None and self.image_size % self.patch_size:
            raise InputError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.head_dim:
            raise InputError(f"width {self.width} is not a multiple of head_dim {self.head_dim}")
        if self.tokens == 1:
            raise InputError("tokens must be an integer >= 2, got 1", hint="a flow needs a token to start from")
        if self.patches < 2:
            raise InputError(f"patch_size {self.patch_size} leaves one patch of a {self.image_size} pixel image")
        if self.blocks * self.layers * self.patches**2 * self.width > MODEL_LIMIT:
            raise InputError("the model is too large: blocks * layers * patches^2 * width is above 2^44")
        if self.dims > IMAGE_LIMIT:
            raise InputError("the data are too large: an image has more than 2^31 values")

    def _check_noise(self) -> None:
        if self.noise not in ("gaussian", "uniform"):
            raise InputError(f"noise must be 'gaussian' or 'uniform', got {self.noise!r}")
        if self.noise == "uniform" and self.data == "tokens":
            raise InputError("uniform noise dequantises 8-bit images; a model of tokens has noise 'gaussian'")
        if self.noise_std is None:
            return
        if self.noise == "uniform":
            raise InputError("noise_std has no meaning for a model trained with uniform noise")
        is_number = isinstance(self.noise_std, (int, float)) and not isinstance(self.noise_std, bool)
        if not is_number or not 0.0 < self.noise_std < 10.0:
            raise InputError(f"noise_std must be a number in (0, 10), got {self.noise_std!r}")

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if not isinstance(self.labels, tuple) or not all(isinstance(name, str) and name for name in self.labels):
            raise InputError(f"label names must be a tuple of non-empty strings, got {self.labels!r}")
        if len(self.labels) != self.classes or not self.labels:
            raise InputError(f"{len(self.labels)} label names for {self.classes} classes")
        if len(set(self.labels)) != len(self.labels):
            raise InputError("label names are not unique")

    @property
    def data(self) -> Literal["image", "tokens"]:
        """The kind of data, images or tokens."""
        return "image" if self.tokens is None and self.token_values is None else "tokens"

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
