"""`Claims`: what shapes, file name, metadata and flags each say about a checkpoint's configuration.

If two sources disagree about a field, the error names both. A field that no source gives is either assumed, which is
reported, or is an error that asks for it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tarflow_sdk._config import SIZES, FlowConfig
from tarflow_sdk._errors import CheckpointError

DEFAULT_HEAD_DIM = 64
"""The head dimension of all models of the original code."""

SHAPES, FILE_NAME, METADATA = "the shapes", "the file name", "its metadata"
NAMING = re.compile(r".*_model_(\d+)_(\d+)_(\d+)_(\d+)_(\d+\.\d+|uniform)")
"""The original's `{data}_model_{patch_size}_{width}_{blocks}_{layers}_{noise}`, without the suffix."""


class Claims:
    """The first claim about each field and its source; `assumptions` describes the fields without a claim."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.assumptions: list[str] = []
        self._claims: dict[str, tuple[str, Any]] = {}

    def add(self, source: str, field: str, value: Any) -> None:
        """Record that `source` says `field` is `value`.

        Raises:
            CheckpointError: when an earlier source said otherwise.
        """
        first, known = self._claims.setdefault(field, (source, value))
        if not _agree(known, value):
            flags = [name for name in (first, source) if name.startswith("--")]
            hint = f"correct {flags[0] if flags else source}"
            if flags and FILE_NAME in (first, source):
                hint = f"{hint} or rename the file"
            raise CheckpointError(
                f"{self.path}: {first} says {field} is {known}, {source} says {value}",
                hint=f"give {flags[0]} or {flags[1]}" if flags[1:] else hint,
            )

    def get(self, field: str) -> Any:
        """The value claimed for `field`, or None."""
        return self._claims.get(field, ("", None))[1]

    def source(self, field: str) -> str:
        """The source of the claim about `field`."""
        return self._claims[field][0]


def _agree(known: Any, value: Any) -> bool:
    if isinstance(known, float) and isinstance(value, RoundedStd):
        return f"{known:.2f}" == f"{value:.2f}"
    return bool(known == value)


class RoundedStd(float):
    """Sigma as it appears in a file name, with two decimals."""

    __slots__ = ()


def claim_metadata(claims: Claims, config: FlowConfig) -> None:
    """Claims of the configuration inside one of our own files."""
    unknown = config.noise == "gaussian" and config.noise_std is None
    other = [name for kind, names in SIZES.items() for name in names if kind != config.data]
    claims.add(METADATA, "data", config.data)
    for field in dataclasses.fields(config):
        if field.name not in other and not (field.name == "noise_std" and unknown):
            claims.add(METADATA, field.name, getattr(config, field.name))
    claims.add(METADATA, "patches", config.patches)
    claims.add(METADATA, "patch_values", config.patch_values)


def claim_shapes(claims: Claims, tensors: dict[str, Tensor]) -> None:
    """Claims of the tensors: everything except the kind of data, the factors of D, the heads and the noise."""

    def shape(name: str, rank: int) -> list[int]:
        if name not in tensors:
            raise CheckpointError(f"{claims.path}: lacks {name}")
        if tensors[name].ndim != rank or not tensors[name].numel():
            raise CheckpointError(f"{claims.path}: {name} has shape {list(tensors[name].shape)}, expected {rank} axes")
        return list(tensors[name].shape)

    def count(pattern: str) -> int:
        return len({found[1] for name in tensors if (found := re.match(pattern, name))})

    width, patch_values = shape("blocks.0.proj_in.weight", 2)
    patches, _ = shape("blocks.0.pos_embed", 2)
    rows, _ = shape("blocks.0.proj_out.weight", 2)
    if rows not in (patch_values, 2 * patch_values):
        raise CheckpointError(
            f"{claims.path}: blocks.0.proj_out.weight has {rows} rows, expected {2 * patch_values} "
            f"(or {patch_values} for nvp=False) for patches of {patch_values} values"
        )
    class_embed = "blocks.0.class_embed"
    said = {
        "width": width,
        "patch_values": patch_values,
        "patches": patches,
        "nvp": rows == 2 * patch_values,
        "classes": shape(class_embed, 3)[0] if class_embed in tensors else 0,
        "blocks": count(r"blocks\.(\d+)\."),
        "layers": count(r"blocks\.0\.attn_blocks\.(\d+)\."),
    }
    for field, value in said.items():
        claims.add(SHAPES, field, value)


def claim_file_name(claims: Claims) -> None:
    """Claims of a file name in the original's format; other names make no claims."""
    found = NAMING.fullmatch(claims.path.stem)
    if found is None:
        return
    *numbers, noise = found.groups()
    claims.add(FILE_NAME, "data", "image")
    for field, number in zip(("patch_size", "width", "blocks", "layers"), numbers, strict=True):
        claims.add(FILE_NAME, field, int(number))
    claims.add(FILE_NAME, "noise", "uniform" if noise == "uniform" else "gaussian")
    if noise != "uniform" and float(noise) > 0:  # 0.00 is a sigma that two decimals do not show
        claims.add(FILE_NAME, "noise_std", RoundedStd(noise))


def infer_config(claims: Claims, tensors: dict[str, Tensor], *, labels: Sequence[str] | None = None) -> FlowConfig:
    """The configuration that all claims agree on; `labels` replace the claimed names.

    Raises:
        CheckpointError: when two sources contradict each other, or a required field is unknown.
        ConfigError: when the fields do not describe a valid model.
    """
    claim_shapes(claims, tensors)
    claim_file_name(claims)
    if claims.get("noise") == "uniform" and claims.get("noise_std") is not None:
        raise CheckpointError(
            f"{claims.path}: {claims.source('noise')} says that the training noise is uniform, "
            f"{claims.source('noise_std')} gives it a sigma",
            hint="a model trained with uniform noise has no sigma: drop --noise-std",
        )
    if claims.get("noise") is None:
        claims.assumptions.append("noise gaussian, the original code's default")
    if claims.get("noise") != "uniform" and claims.get("noise_std") is None:
        claims.assumptions.append("noise_std unknown: denoising needs it")
    names = claims.get("labels") if labels is None else tuple(labels)
    noise_std = claims.get("noise_std")
    return FlowConfig(
        **_sizes(claims),
        width=claims.get("width"),
        blocks=claims.get("blocks"),
        layers=claims.get("layers"),
        head_dim=_head_dim(claims),
        classes=claims.get("classes"),
        nvp=claims.get("nvp"),
        noise=claims.get("noise") or "gaussian",
        noise_std=None if noise_std is None else float(noise_std),
        labels=names,
    )


def _sizes(claims: Claims) -> dict[str, int]:
    """The fields that describe the data: images, unless something says tokens."""
    if claims.get("data") == "tokens":
        return {"tokens": claims.get("patches"), "token_values": claims.get("patch_values")}
    side = _grid_side(claims)
    channels, patch_size = _split_patch(claims)
    return {"image_size": side * patch_size, "image_channels": channels, "patch_size": patch_size}


def _grid_side(claims: Claims) -> int:
    patches: int = claims.get("patches")
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(
            f"{claims.path}: pos_embed has {patches} rows, no square number: images must be square",
            hint=f"if the data are {patches} tokens of {claims.get('patch_values')} values, give --tokens",
        )
    return side


def _split_patch(claims: Claims) -> tuple[int, int]:
    """(C, p) of D = C * p * p."""
    values: int = claims.get("patch_values")
    given = {field: claims.get(field) for field in ("image_channels", "patch_size")}
    candidates = [(values // p**2, p) for p in range(1, math.isqrt(values) + 1) if values % p**2 == 0]
    for field, value in given.items():
        position = list(given).index(field)
        if value is not None and value not in [pair[position] for pair in candidates]:
            raise CheckpointError(
                f"{claims.path}: {claims.source(field)} says {field} is {value}, "
                f"but the shapes have patches of {values} values = image_channels * patch_size^2",
                hint=f"possible (image_channels, patch_size): {', '.join(map(str, candidates))}",
            )
    fitting = [
        (c, p) for c, p in candidates if given["image_channels"] in (None, c) and given["patch_size"] in (None, p)
    ]
    if not fitting:
        raise CheckpointError(
            f"{claims.path}: {claims.source('image_channels')} says image_channels is {given['image_channels']} and "
            f"{claims.source('patch_size')} says patch_size is {given['patch_size']}, "
            f"but the shapes have patches of {values} values = image_channels * patch_size^2",
            hint=f"possible (image_channels, patch_size): {', '.join(map(str, candidates))}",
        )
    if all(value is None for value in given.values()):
        # D = p^2 and D = 3 q^2 exclude each other, so at most one candidate is left.
        fitting = [(c, p) for c, p in candidates if c in (1, 3)]
        if fitting:
            claims.assumptions.append(
                f"image_channels {fitting[0][0]} and patch_size {fitting[0][1]}, "
                f"the only split of {values} values for grey or RGB images"
            )
    if not fitting:
        raise CheckpointError(
            f"{claims.path}: cannot tell the image channels from the patch size in patches of {values} values",
            hint="give --image-channels or --patch-size; possible (image_channels, patch_size): "
            + ", ".join(map(str, candidates))
            + "; or --tokens for data that are not images",
        )
    return fitting[0]


def _head_dim(claims: Claims) -> int:
    head_dim: int | None = claims.get("head_dim")
    if head_dim is not None:
        return head_dim
    width: int = claims.get("width")
    if width % DEFAULT_HEAD_DIM:
        raise CheckpointError(
            f"{claims.path}: width {width} is not a multiple of {DEFAULT_HEAD_DIM}, the usual head dimension",
            hint="the head dimension is not stored in original checkpoints: give --head-dim",
        )
    claims.assumptions.append(f"head_dim {DEFAULT_HEAD_DIM}, the original code's")
    return DEFAULT_HEAD_DIM
