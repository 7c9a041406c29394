"""`open_bundle`: read a bundle directory (docs/BUNDLE.md), and refuse one that is damaged or unsafe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.config import PRECISIONS, SIZES, ModelConfig, Order, Precision
from tarflow_runtimes.errors import BundleError, EngineError, InputError

MANIFEST: Final = "manifest.json"
FORMAT: Final = "tarflow-bundle"
SCHEMA_VERSION: Final = 2
PORTABLE: Final = "portable"
"""The provider of the graphs that run on any runtime, stored in the folder of every block."""

T = TypeVar("T")
C = TypeVar("C", bound=str)

_FETCH_HINT = "export the checkpoint again, or fetch the bundle again"
_UNSAFE_HINT = "do not use this bundle; fetch it from its source"

_ITEM_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}
"""Size in bytes of the dtypes in `weights.bin`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One flow block: its order of patches, and the absolute paths of its weights and portable graphs, by kind."""

    order: Order
    weights: Path
    portable: Mapping[str, Path]

    @property
    def is_reversed(self) -> bool:
        """Whether the block processes patches from last to first."""
        return self.order == "reversed"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A tensor: its dtype and shape, and its place in every `weights.bin` (bytes)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle: its manifest and the paths of its files.

    `digest` is the SHA-256 of manifest.json, which identifies the bundle; `precision` is one of PRECISIONS and
    `cache_dtype` the dtype of linear activations and caches; `tensors` is the table of tensors in every `weights.bin`;
    `graphs` are the run-ready graphs, provider -> kind -> path; `prior_variance` is [N, D], or None when it is one
    everywhere.
    """

    path: Path
    manifest: Mapping[str, Any]
    config: ModelConfig
    precision: Precision
    cache_dtype: str
    digest: str
    tensors: Mapping[str, Tensor]
    blocks: tuple[Block, ...]
    graphs: Mapping[str, Mapping[str, Path]]
    prior_variance: npt.NDArray[np.float32] | None
    reference: Path | None
    digests: Mapping[Path, str] | None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, or None."""
        return self.config.labels

    @property
    def block_bytes(self) -> int:
        """Size in bytes of the weights of one block."""
        return max(1, *(tensor.offset + tensor.nbytes for tensor in self.tensors.values()))

    def graph(self, provider: str, kind: str, block: int) -> Path:
        """The file of a graph that runs `block`.

        Raises:
            EngineError: when a bundle of this precision has no graphs of that provider.
        """
        if provider == PORTABLE:
            return self.blocks[block].portable[kind]
        if provider not in self.graphs:
            raise EngineError(
                f"bundle {self.path.name} is of {self.precision} and has no graphs for {provider}",
                hint="open the bundle that it was converted from, or tarflow convert that one to another precision",
            )
        if kind not in self.graphs[provider]:
            raise BundleError(f"bundle {self.path.name} has no graph {provider}/{kind}", hint=_FETCH_HINT)
        return self.graphs[provider][kind]

    def name(self, file: Path) -> str:
        """The name of a file in the manifest."""
        return file.relative_to(self.path).as_posix()

    def read(self, file: Path) -> bytes:
        """The contents of a file of the bundle, checked to be unchanged since the bundle was opened.

        Raises:
            BundleError: when the file is gone or has changed.
        """
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {file}: {error.strerror}", hint=_FETCH_HINT) from error
        if self.digests is not None and hashlib.sha256(data).hexdigest() != self.digests[file]:
            raise BundleError(f"{file} has changed since the bundle was opened", hint="open the bundle again")
        return data

    def tensor(self, block: int, name: str) -> npt.NDArray[Any]:
        """The contents of a tensor of a block; bfloat16 values are returned as uint16 bits.

        Raises:
            BundleError: when the file is gone or too short.
        """
        entry, weights = self.tensors[name], self.blocks[block].weights
        dtype = np.dtype("uint16" if entry.dtype == "bfloat16" else entry.dtype).newbyteorder("<")
        try:
            with weights.open("rb") as file:
                array = np.fromfile(file, dtype, math.prod(entry.shape), offset=entry.offset)
        except OSError as error:
            raise BundleError(f"cannot read {weights}: {error.strerror}", hint=_FETCH_HINT) from error
        if array.nbytes != entry.nbytes:
            raise BundleError(f"{weights} ends before tensor {name}", hint=_FETCH_HINT)
        return array.reshape(entry.shape)


def open_bundle(path: str | os.PathLike[str], verify_digests: bool = True) -> Bundle:
    """Read the bundle directory at `path` and check manifest, paths, sizes and, by default, SHA-256 digests.

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
    return read_bundle(root, _read_manifest(root), verify_digests)


def read_bundle(root: Path, raw: bytes, verify_digests: bool = True) -> Bundle:
    """The bundle in `root` whose manifest's bytes are `raw`; an exporter has them before they lie there.

    Raises:
        BundleError: as `open_bundle`.
    """
    manifest = _Fields(_parse(root, raw), root, "")
    _check_version(manifest)
    config = _read_config(manifest)
    files, digests = _check_files(root, manifest.child("files"), verify_digests=verify_digests)
    if config.data == "image" and manifest.value("image_range", list) != [-1.0, 1.0]:
        raise manifest.error("image_range", "is not [-1, 1]")
    precision = manifest.choice("precision", PRECISIONS)
    cache_dtype = "float32" if precision == "int8" else precision
    _check_cache(manifest.child("cache"), config, cache_dtype)
    blocks = _read_blocks(manifest, config, files)
    return Bundle(
        path=root,
        manifest=manifest.data,
        config=config,
        precision=precision,
        cache_dtype=cache_dtype,
        digest=hashlib.sha256(raw).hexdigest(),
        tensors=_read_tensors(manifest.child("tensors"), config, min(one.weights.stat().st_size for one in blocks)),
        blocks=blocks,
        graphs=_read_graphs(manifest.child("graphs"), files),
        prior_variance=_read_prior(manifest, config, files),
        reference=_file(manifest, "reference", files) if manifest.data.get("reference") is not None else None,
        digests=digests if verify_digests else None,
    )


class _Fields:
    """A JSON object whose fields are read one by one; errors name the field."""

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
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, f"must be of type {kind.__name__}, got {type(value).__name__}")
        return value

    def count(self, name: str, minimum: int = 1) -> int:
        value = self.value(name, int)
        if value < minimum:
            raise self.error(name, f"must be at least {minimum}, got {value}")
        return value

    def choice(self, name: str, choices: tuple[C, ...]) -> C:
        value: Any = self.value(name, str)
        if value not in choices:
            raise self.error(name, f"must be one of {', '.join(choices)}, got {value!r}")
        chosen: C = value
        return chosen

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
            hint="upgrade tarflow-sdk"
            if version > SCHEMA_VERSION
            else f"make a new one: tarflow-export CHECKPOINT -o {manifest.root.name} --overwrite",
        )


def _read_config(manifest: _Fields) -> ModelConfig:
    data, fields = manifest.choice("data", tuple(SIZES)), manifest.child("config").data
    given = {field.name: fields.get(field.name) for field in dataclasses.fields(ModelConfig)}
    labels = given["labels"]
    try:
        config = ModelConfig(**given | {"labels": tuple(labels) if isinstance(labels, list) else labels})
    except InputError as error:
        raise manifest.error("config:", str(error)) from error
    if config.data != data:
        raise manifest.error("data", f"is {data!r}, but config describes data of kind {config.data!r}")
    return config


def _check_cache(fields: _Fields, config: ModelConfig, dtype: str) -> None:
    expected: dict[str, int | str | list[str]] = {
        "layers": config.layers, "heads": config.heads, "patches": config.patches, "head_dim": config.head_dim,
        "layout": ["R", "H", "N", "E"], "dtype": dtype,
    }  # fmt: skip
    for name, value in expected.items():
        if fields.value(name, type(value)) != value:
            raise fields.error(name, f"contradicts the model: expected {value}, got {fields.data[name]}")


def _confined(root: Path, name: str) -> Path:
    """The absolute path of the bundle's file `name`; refuses paths outside the directory and symbolic links."""

    def refuse(problem: str) -> BundleError:
        return BundleError(f"bundle {root.name}: path {name!r} {problem}", hint=_UNSAFE_HINT)

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


def _check_files(root: Path, fields: _Fields, *, verify_digests: bool) -> tuple[dict[str, Path], dict[Path, str]]:
    """Check every file, and that there are no others; returns name -> absolute path, and path -> digest."""
    paths, digests = {}, {}
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
        paths[name], digests[path] = path, digest.lower()
    for found in sorted(root.rglob("*")):
        name = found.relative_to(root).as_posix()
        if name not in paths and name != MANIFEST and (found.is_symlink() or not found.is_dir()):
            raise BundleError(
                f"bundle {root.name}: holds {name}, which its manifest does not list",
                hint=f"remove {name}, if it is yours",
            )
    return paths, digests


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


def _read_blocks(manifest: _Fields, config: ModelConfig, files: Mapping[str, Path]) -> tuple[Block, ...]:
    entries = manifest.value("blocks", list)
    if len(entries) != config.blocks:
        raise manifest.error("blocks", f"must have {config.blocks} entries, got {len(entries)}")
    blocks = []
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise manifest.error(f"blocks[{k}]", "must be an object")
        fields = _Fields(entry, manifest.root, f"blocks[{k}].")
        weights = _file(fields, "weights", files)
        portable = {kind: _file(fields, kind, files) for kind in ("forward", "step", "gradient")}
        if {path.parent for path in portable.values()} != {weights.parent}:
            raise fields.error("weights", "must lie beside the graphs of its block")
        blocks.append(Block(order=fields.choice("order", get_args(Order)), weights=weights, portable=portable))
    return tuple(blocks)


def _read_graphs(fields: _Fields, files: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """The run-ready graphs: provider -> kind -> path."""
    providers = {provider: fields.child(provider) for provider in fields.data if provider != PORTABLE}
    return {
        provider: {kind: _file(kinds.child(kind), "file", files) for kind in kinds.data}
        for provider, kinds in providers.items()
    }


def _read_tensors(fields: _Fields, config: ModelConfig, size: int) -> dict[str, Tensor]:
    """The table of tensors, checked to lie within `size` bytes."""
    tensors = {}
    for name in fields.data:
        entry = fields.child(name)
        shape = entry.value("shape", list)
        dtype, offset, nbytes = (
            entry.choice("dtype", tuple(_ITEM_BYTES)),
            entry.count("offset", 0),
            entry.count("bytes"),
        )
        if not all(isinstance(axis, int) and axis > 0 for axis in shape) or nbytes != _ITEM_BYTES[dtype] * math.prod(
            shape
        ):
            raise entry.error("shape", f"does not make {nbytes} bytes of {dtype}")
        if offset + nbytes > size:
            raise entry.error("offset", f"leads past the end of the weights, which have {size} bytes")
        tensors[name] = Tensor(dtype=dtype, shape=tuple(shape), offset=offset, nbytes=nbytes)
    needed = {"order": ("int64", (config.patches,)), "pos_embed": ("float32", (config.patches, config.width))}
    if config.classes:
        needed["class_embed"] = ("float32", (config.classes + 1, config.width))
    for name, (dtype, expected) in needed.items():
        if name not in tensors or (tensors[name].dtype, tensors[name].shape) != (dtype, expected):
            raise fields.error(name, f"must be {dtype} {list(expected)}")
    return tensors


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
