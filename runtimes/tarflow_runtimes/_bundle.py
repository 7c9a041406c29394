"""`open_bundle`: read a bundle directory, and refuse one that is damaged or unsafe. The format is docs/BUNDLE.md.

Axis letters used in this package: `B` images, `N` patches, `D` values per patch (C * p * p), `W` width, `C` image
channels, `H` heads, `E` head dimension, `L` layers per block, `K` flow blocks, `G` guidance branches (1 or 2),
`R` = G * B cache rows, `S` patches in one call of the step graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._errors import BundleError

MANIFEST: Final = "manifest.json"
FORMAT: Final = "tarflow-bundle"
SCHEMA_VERSION: Final = 1

MODEL_LIMIT: Final = 1 << 44
"""Of blocks * layers * patches^2 * width; the engines' counts of bytes then fit 64 bits."""
IMAGE_LIMIT: Final = 1 << 31
"""Of the values of an image."""

Order = Literal["identity", "reversed"]
T = TypeVar("T")

_FETCH_HINT = "export the checkpoint again, or fetch the bundle again"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of the model in a bundle; the fields are those of the manifest's `config`.

    `noise_std` is sigma of the training noise in model units ([-1, 1] images), None when unknown or when the model
    was trained with uniform dequantisation (`noise == "uniform"`). `classes` is 0 for unconditional models.
    """

    image_size: int
    image_channels: int
    patch_size: int
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
    def patches(self) -> int:
        """N, the number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """D = C * p * p, the number of values in a patch."""
        return self.image_channels * self.patch_size**2

    @property
    def dims(self) -> int:
        """N * D, the number of values in an image."""
        return self.patches * self.patch_values

    @property
    def heads(self) -> int:
        """H = W / E."""
        return self.width // self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockFiles:
    """The files of one flow block, absolute paths."""

    order: Order
    forward: Path
    step: Path
    gradient: Path
    weights: Path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle: its manifest and where its files are.

    `digest` is the SHA-256 of manifest.json, which identifies the bundle; `dtype` is that of linear weights and
    caches (`float32` or `float16`); `prior` is the prior's variance [N, D] or None when it is one everywhere.
    """

    path: Path
    manifest: Mapping[str, Any]
    config: ModelConfig
    dtype: str
    cache_dtype: str
    digest: str
    blocks: tuple[BlockFiles, ...]
    prior: npt.NDArray[np.float32] | None
    reference: Path | None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes, or None."""
        return self.config.labels


def open_bundle(path: str | os.PathLike[str], verify_digests: bool = True) -> Bundle:
    """Read the bundle directory at `path` and check it: manifest, paths, sizes, and SHA-256 unless told not to.

    Raises:
        BundleError: when anything in it is missing, damaged, unsafe or newer than this package.
    """
    root = Path(path)
    try:
        root = root.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise BundleError(f"bundle {path}: no such directory", hint="check the path") from error
    if not root.is_dir():
        raise BundleError(f"bundle {path}: expected a directory, got a file", hint="name the NAME.tarflow directory")
    raw = _read_manifest(root)
    manifest = _Fields(_parse(root, raw), root, "")
    _check_version(manifest)
    config = _read_config(manifest.child("config"))
    files = _check_files(root, manifest.child("files"), verify_digests=verify_digests)
    dtype = manifest.choice("dtype", ("float32", "float16"))
    if manifest.value("image_range", list) != [-1.0, 1.0]:
        raise manifest.error("image_range", "is not [-1, 1]")
    return Bundle(
        path=root,
        manifest=manifest.data,
        config=config,
        dtype=dtype,
        cache_dtype=_read_cache(manifest.child("cache"), config),
        digest=hashlib.sha256(raw).hexdigest(),
        blocks=_read_blocks(manifest, config, files),
        prior=_read_prior(manifest, config, files),
        reference=_file(manifest, "reference", files) if manifest.data.get("reference") is not None else None,
    )


class _Fields:
    """A JSON object that is read field by field, with errors that name the field."""

    def __init__(self, data: Mapping[str, Any], root: Path, where: str) -> None:
        self.data = data
        self.root = root
        self.where = where

    def error(self, name: str, problem: str) -> BundleError:
        return BundleError(f"bundle {self.root.name}: {MANIFEST}: {self.where}{name} {problem}", hint=_FETCH_HINT)

    def value(self, name: str, kind: type[T]) -> T:
        if name not in self.data:
            raise self.error(name, "is missing")
        value = self.data[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, f"must be of type {kind.__name__}, got {type(value).__name__}")
        return value

    def count(self, name: str, minimum: int = 1) -> int:
        value = self.value(name, int)
        if value < minimum:
            raise self.error(name, f"must be at least {minimum}, got {value}")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.value(name, str)
        if value not in choices:
            raise self.error(name, f"must be one of {', '.join(choices)}, got {value!r}")
        return value

    def child(self, name: str) -> _Fields:
        value: dict[str, Any] = self.value(name, dict)
        return _Fields(value, self.root, f"{self.where}{name}.")


def _read_manifest(root: Path) -> bytes:
    path = _confined(root, MANIFEST)
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"bundle {root}: cannot read {MANIFEST}: {error.strerror}", hint=_FETCH_HINT) from error


def _parse(root: Path, raw: bytes) -> Mapping[str, Any]:
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"bundle {root.name}: {MANIFEST} is not UTF-8 JSON: {error}", hint=_FETCH_HINT) from error
    if not isinstance(data, dict):
        raise BundleError(f"bundle {root.name}: {MANIFEST} must hold one JSON object", hint=_FETCH_HINT)
    return data


def _check_version(manifest: _Fields) -> None:
    if manifest.data.get("format") != FORMAT:
        raise manifest.error("format", f"must be {FORMAT!r}, got {manifest.data.get('format')!r}")
    version = manifest.value("schema_version", int)
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"bundle {manifest.root.name} has schema_version {version}, this tarflow-sdk reads {SCHEMA_VERSION}",
            hint="upgrade tarflow-sdk" if version > SCHEMA_VERSION else "export the checkpoint again",
        )


def _read_config(fields: _Fields) -> ModelConfig:
    labels = fields.data.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise fields.error("labels", "must be a list of names or null")
    noise_std = fields.value("noise_std", float) if fields.data.get("noise_std") is not None else None
    if noise_std is not None and not (math.isfinite(noise_std) and noise_std > 0.0):
        raise fields.error("noise_std", f"must be positive, got {noise_std}")
    config = ModelConfig(
        image_size=fields.count("image_size"),
        image_channels=fields.count("image_channels"),
        patch_size=fields.count("patch_size"),
        width=fields.count("width"),
        blocks=fields.count("blocks"),
        layers=fields.count("layers"),
        head_dim=fields.count("head_dim"),
        classes=fields.count("classes", 0),
        nvp=fields.value("nvp", bool),
        noise=fields.choice("noise", ("gaussian", "uniform")),
        noise_std=noise_std,
        labels=tuple(labels) if labels is not None else None,
    )
    if config.image_size % config.patch_size or config.width % config.head_dim or config.patches < 2:
        raise fields.error("patch_size", "or head_dim does not divide the image or the width")
    size = config.blocks * config.layers * config.patches**2 * config.width
    if size > MODEL_LIMIT or config.dims > IMAGE_LIMIT:
        raise fields.error("width", "or another size is too large")
    if config.labels is not None and (
        len(config.labels) != config.classes or len(set(config.labels)) != config.classes
    ):
        raise fields.error("labels", f"must be {config.classes} different names, got {len(config.labels)}")
    return config


def _read_cache(fields: _Fields, config: ModelConfig) -> str:
    expected = {"layers": config.layers, "heads": config.heads, "patches": config.patches, "head_dim": config.head_dim}
    for name, value in expected.items():
        if fields.value(name, int) != value:
            raise fields.error(name, f"contradicts config: expected {value}, got {fields.data[name]}")
    if fields.value("layout", list) != ["R", "H", "N", "E"]:
        raise fields.error("layout", "must be R, H, N, E")
    return fields.choice("dtype", ("float32", "float16"))


def _confined(root: Path, name: str) -> Path:
    """The absolute path of the bundle's file `name`; refuses to leave the directory or to follow a link."""

    def refuse(problem: str) -> BundleError:
        return BundleError(
            f"bundle {root.name}: path {name!r} {problem}", hint="do not use this bundle; fetch it from its source"
        )

    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or ":" in name or "\0" in name:
        raise refuse("is not a relative path with forward slashes")
    if not path.parts or ".." in path.parts or str(path) != name:
        raise refuse("leaves the bundle directory or is not in its plain form")
    here = root
    for part in path.parts:
        here = here / part
        try:
            mode = here.lstat().st_mode
        except OSError as error:
            raise BundleError(f"bundle {root.name}: file {name} is missing", hint=_FETCH_HINT) from error
        if stat.S_ISLNK(mode):
            raise refuse("passes through a symbolic link")
    if not stat.S_ISREG(mode):
        raise refuse("is not a regular file")
    return here


def _check_files(root: Path, fields: _Fields, *, verify_digests: bool) -> dict[str, Path]:
    """Every file of the manifest, checked: name -> absolute path."""
    paths = {}
    for name in fields.data:
        entry = fields.child(name)
        size, digest = entry.count("size", 0), entry.value("sha256", str)
        path = _confined(root, name)
        actual = path.stat().st_size
        if actual != size:
            raise BundleError(
                f"bundle {root.name}: file {name} has {actual} bytes, the manifest says {size}", hint=_FETCH_HINT
            )
        if verify_digests and _sha256(path) != digest.lower():
            raise BundleError(
                f"bundle {root.name}: file {name} is damaged: its SHA-256 differs from the manifest", hint=_FETCH_HINT
            )
        paths[name] = path
    return paths


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}", hint=_FETCH_HINT) from error


def _file(fields: _Fields, name: str, files: Mapping[str, Path]) -> Path:
    path = fields.value(name, str)
    if path not in files:
        _confined(fields.root, path)  # an unsafe path is the worse fault: name it first
        raise fields.error(name, f"names {path!r}, which is not in the list of files")
    return files[path]


def _read_blocks(manifest: _Fields, config: ModelConfig, files: Mapping[str, Path]) -> tuple[BlockFiles, ...]:
    entries = manifest.value("blocks", list)
    if len(entries) != config.blocks:
        raise manifest.error("blocks", f"must have {config.blocks} entries, got {len(entries)}")
    blocks = []
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise manifest.error(f"blocks[{k}]", "must be an object")
        fields = _Fields(entry, manifest.root, f"blocks[{k}].")
        order: Order = "identity" if fields.choice("order", ("identity", "reversed")) == "identity" else "reversed"
        paths = {name: _file(fields, name, files) for name in ("forward", "step", "gradient", "weights")}
        if len({path.parent for path in paths.values()}) != 1:
            raise fields.error("weights", "must lie beside the graphs of its block")
        blocks.append(BlockFiles(order=order, **paths))
    return tuple(blocks)


def _read_prior(manifest: _Fields, config: ModelConfig, files: Mapping[str, Path]) -> npt.NDArray[np.float32] | None:
    if manifest.data.get("prior") is None:
        return None
    path = _file(manifest, "prior", files)
    try:
        prior = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(
            f"bundle {manifest.root.name}: {path.name} is not a NumPy array: {error}", hint=_FETCH_HINT
        ) from error
    expected = (config.patches, config.patch_values)
    if not isinstance(prior, np.ndarray) or prior.dtype != np.float32 or prior.shape != expected:
        raise BundleError(
            f"bundle {manifest.root.name}: {path.name} must be float32 {list(expected)}", hint=_FETCH_HINT
        )
    if not bool(np.all(np.isfinite(prior) & (prior > 0.0))):
        raise BundleError(
            f"bundle {manifest.root.name}: {path.name} holds a variance that is not positive", hint=_FETCH_HINT
        )
    return prior
