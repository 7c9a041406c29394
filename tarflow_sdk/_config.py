"""`FlowConfig`: everything about a TarFlow model except its weights, as JSON-only fields.

The data of a model are square images, which are cut into patches, or tokens: arrays [N, D] such as the coordinates of N
atoms, which are used unchanged. For tokens, read "token" where this package says "patch" and "image".

Axis letters used in this package: `B` images, `N` patches, `D` patch size in values (C * p * p), `W` width,
`C` image channels, `H` heads, `E` head dimension, `L` layers per block, `K` flow blocks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from tarflow_sdk._errors import ConfigError

SCHEMA_VERSION = 1
"""Version of the JSON format of `FlowConfig.to_json`."""

MLP_EXPANSION = 4
"""Hidden width of the MLP divided by the width of the model; fixed by the architecture."""

NoiseKind = Literal["gaussian", "uniform"]
DataKind = Literal["image", "tokens"]

SIZES: dict[DataKind, tuple[str, ...]] = {
    "image": ("image_size", "image_channels", "patch_size"),
    "tokens": ("tokens", "token_values"),
}
"""The fields that describe each kind of data; those of the other kind are None."""

MODEL_LIMIT = 1 << 44
"""Of blocks * layers * patches^2 * width: counts of bytes then fit 64 bits."""

IMAGE_LIMIT = 1 << 31
"""Of the values of an image."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """Shape and training noise of a TarFlow model.

    The data are images, with `image_size`, `image_channels` and `patch_size`, or tokens: N = `tokens` of
    D = `token_values` values each. Exactly one of the two groups is given.

    A model is named `{patch_size}-{width}-{blocks}-{layers}-{noise_std}` in the literature, e.g. `4-128-4-4-0.10`.

    `noise_std` is sigma of the Gaussian noise added in training, in model units ([-1, 1] images); it is None for
    models trained with uniform dequantisation (`noise="uniform"`) and for models whose sigma is unknown.
    `classes` is 0 for unconditional models. `nvp=False` models learn shifts only (a = 0) and a prior variance.

    Raises:
        ConfigError: on a field out of range or a contradiction between two fields.

    Source: Zhai et al. 2024, "Normalizing Flows are Capable Generative Models", section 2 and appendix A.

    >>> FlowConfig(image_size=28, image_channels=1, patch_size=4, width=128, blocks=4, layers=4).patches
    49
    >>> FlowConfig(tokens=33, token_values=3, width=256, blocks=6, layers=6).shape
    (33, 3)
    """

    image_size: int | None = None
    image_channels: int | None = None
    patch_size: int | None = None
    tokens: int | None = None
    token_values: int | None = None
    width: int
    blocks: int
    layers: int
    head_dim: int = 64
    classes: int = 0
    nvp: bool = True
    noise: NoiseKind = "gaussian"
    noise_std: float | None = None
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check_kind()
        for name in (*SIZES[self.data], "width", "blocks", "layers", "head_dim", "classes"):
            value, least = getattr(self, name), 0 if name == "classes" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")
        if not isinstance(self.nvp, bool):
            raise ConfigError(f"nvp must be true or false, got {self.nvp!r}")
        self._check_grid()
        self._check_noise()
        self._check_labels()

    def _check_kind(self) -> None:
        given = [name for names in SIZES.values() for name in names if getattr(self, name) is not None]
        hint = " or ".join(f"{', '.join(names)} ({kind})" for kind, names in SIZES.items())
        if not given:
            raise ConfigError("model configuration does not say what the data are", hint=f"give {hint}")
        if len({kind for kind, names in SIZES.items() for name in names if name in given}) > 1:
            raise ConfigError(f"data are images or tokens, not both: got {', '.join(given)}", hint=f"give {hint}")
        if missing := [name for name in SIZES[self.data] if name not in given]:
            raise ConfigError(
                f"model configuration is incomplete: {', '.join(given)} without {', '.join(missing)}",
                hint=f"give {hint}",
            )

    def _check_grid(self) -> None:
        if self.image_size is not None and self.patch_size is not None and self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.head_dim:
            raise ConfigError(
                f"width {self.width} is not a multiple of head_dim {self.head_dim}",
                hint="the head dimension is not stored in original checkpoints: give --head-dim",
            )
        if self.tokens == 1:
            raise ConfigError("tokens must be an integer >= 2, got 1", hint="a flow needs a token to start from")
        if self.patches < 2:
            raise ConfigError(f"patch_size {self.patch_size} leaves one patch of a {self.image_size} pixel image")
        if self.blocks * self.layers * self.patches**2 * self.width > MODEL_LIMIT:
            raise ConfigError("the model is too large: blocks * layers * patches^2 * width is above 2^44")
        if self.dims > IMAGE_LIMIT:
            raise ConfigError("the data are too large: an image has more than 2^31 values")

    def _check_noise(self) -> None:
        if self.noise not in ("gaussian", "uniform"):
            raise ConfigError(f"noise must be 'gaussian' or 'uniform', got {self.noise!r}")
        if self.noise == "uniform" and self.data == "tokens":
            raise ConfigError("uniform noise dequantises 8-bit images; a model of tokens has noise 'gaussian'")
        if self.noise_std is None:
            return
        if self.noise == "uniform":
            raise ConfigError("noise_std has no meaning for a model trained with uniform noise")
        is_number = isinstance(self.noise_std, (int, float)) and not isinstance(self.noise_std, bool)
        if not is_number or not 0.0 < self.noise_std < 10.0:
            raise ConfigError(f"noise_std must be a number in (0, 10), got {self.noise_std!r}")

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if not isinstance(self.labels, tuple) or not all(isinstance(name, str) and name for name in self.labels):
            raise ConfigError(f"label names must be a tuple of non-empty strings, got {self.labels!r}")
        if len(self.labels) != self.classes or not self.labels:
            raise ConfigError(f"{len(self.labels)} label names for {self.classes} classes")
        if len(set(self.labels)) != len(self.labels):
            raise ConfigError("label names are not unique")

    @property
    def data(self) -> DataKind:
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
        """N, the number of patches (the paper's T), or of tokens."""
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

    @property
    def name(self) -> str:
        """The name in the literature, `{patch_size}-{width}-{blocks}-{layers}-{noise}`; for tokens `{N}x{D}-...`."""
        noise = "uniform" if self.noise == "uniform" else f"{self.noise_std or 0:.2f}"
        data = f"{self.tokens}x{self.token_values}" if self.patch_size is None else str(self.patch_size)
        return f"{data}-{self.width}-{self.blocks}-{self.layers}-{noise}"

    def to_json(self) -> dict[str, Any]:
        """The fields with a schema version, JSON values only; those of the other kind of data are null."""
        return {
            "schema_version": SCHEMA_VERSION,
            **dataclasses.asdict(self),
            "labels": list(self.labels) if self.labels else None,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FlowConfig:
        """The inverse of `to_json`; the fields of the other kind of data may be absent.

        Raises:
            ConfigError: on a newer schema version, an unknown field or a missing one.
        """
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"model configuration has schema_version {version!r}, this version reads {SCHEMA_VERSION}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"model configuration has unknown fields: {', '.join(unknown)}")
        if isinstance(fields.get("labels"), list):
            fields["labels"] = tuple(fields["labels"])
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(f"model configuration is incomplete: {error}") from error

    def to_file(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def from_file(cls, path: str | Path) -> FlowConfig:
        """Read a file that `to_file` wrote.

        Raises:
            ConfigError: when the file is not a JSON object or its fields are invalid.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot read a model configuration: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a JSON object, got {type(data).__name__}")
        return cls.from_json(data)
