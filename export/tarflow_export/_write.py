"""The files of a bundle (docs/BUNDLE.md): graphs, blocks one by one and the prior, written; the manifest of them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from tarflow_export._graphs import IR_VERSION, OPSET
from tarflow_export._plan import Plan, block_file, block_order
from tarflow_export._weights import WEIGHTS_FILE, Floats, block_tensors
from tarflow_runtimes.bundle.reader import FORMAT, PORTABLE, SCHEMA_VERSION

REFERENCE_FILE: Final = "reference.npz"
PRIOR_FILE: Final = "prior.npy"

TOOLS: Final = ("tarflow-sdk", "torch", "onnx-ir", "onnxruntime", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file of the bundle: size in bytes and SHA-256."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """The contents of a bundle, in addition to its plan.

    `weight(block, name)` gives the float32 tensors of the state dict, `class_embed` with its null row; `prior` is the
    variance [N, D] or None; `checkpoint` and `converted` are the manifest's.
    """

    weight: Callable[[int, str], Floats]
    prior: Floats | None
    checkpoint: Mapping[str, Any]
    converted: Mapping[str, Any] | None = None


def write_files(
    folder: Path, plan: Plan, contents: Contents, on_block: Callable[[int], None] | None = None
) -> dict[str, FileRecord]:
    """Graphs, weights of every block, and the prior where it is not one everywhere; the weights are streamed."""
    files = {}
    for graph in plan.graphs:
        if graph.file is not None:
            files[graph.file] = write_bytes(folder / graph.file, graph.serialized)
    for k in range(plan.config.blocks):
        for graph in plan.portable:
            name = block_file(k, f"{graph.kind}.onnx")
            files[name] = write_bytes(folder / name, graph.serialized)
        name = block_file(k, WEIGHTS_FILE)
        files[name] = _write_weights(folder / name, k, plan, contents)
        if on_block is not None:
            on_block(k)
    if contents.prior is not None:
        np.save(folder / PRIOR_FILE, contents.prior)
        files[PRIOR_FILE] = record_of(folder / PRIOR_FILE)
    return files


def _write_weights(path: Path, block: int, plan: Plan, contents: Contents) -> FileRecord:
    digest, end, layout = hashlib.sha256(), 0, plan.layout
    tensors = block_tensors(
        layout,
        lambda name: contents.weight(block, name),
        is_reversed=block_order(block) == "reversed",
        owner=f"blocks.{block}",
    )
    with path.open("wb") as file:
        for name, array in tensors:
            offset = layout.entries[name].offset
            for chunk in (bytes(offset - end), array.view(np.uint8).data):
                file.write(chunk)
                digest.update(chunk)
            end = offset + array.nbytes
    return FileRecord(size=end, sha256=digest.hexdigest())


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a file, creating its folder if it is missing, and describe it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def record_of(path: Path) -> FileRecord:
    """Describe an existing file."""
    with path.open("rb") as file:
        return FileRecord(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def manifest_of(
    plan: Plan, contents: Contents, files: Mapping[str, FileRecord], verification: Mapping[str, Any]
) -> bytes:
    """The bytes of `manifest.json`: everything a reader needs to know."""
    config, linear = plan.config, plan.layout.linear
    graphs: dict[str, dict[str, Any]] = {}
    for graph in plan.graphs:
        graphs.setdefault(graph.provider, {})[graph.kind] = graph.to_json()
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "data": config.data,
        "config": dataclasses.asdict(config),
        "image_range": [-1.0, 1.0] if config.data == "image" else None,
        "precision": plan.layout.precision,
        "dtypes": {
            "weights": plan.layout.precision, "linear": linear, "cache": linear,
            "norm": "float32", "softmax": "float32", "residual": "float32", "affine": "float32", "io": "float32",
        },
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "tensors": {name: entry.to_json() for name, entry in plan.layout.entries.items()},
        "graphs": graphs,
        "blocks": [
            {
                "order": block_order(k),
                "weights": block_file(k, WEIGHTS_FILE),
                **{kind: block_file(k, f"{kind}.onnx") for kind in graphs[PORTABLE]},
            }
            for k in range(config.blocks)
        ],
        "cache": {
            "layout": ["R", "H", "N", "E"],
            "dtype": linear,
            "layers": config.layers,
            "heads": config.heads,
            "patches": config.patches,
            "head_dim": config.head_dim,
        },
        "prior": PRIOR_FILE if PRIOR_FILE in files else None,
        "reference": REFERENCE_FILE if REFERENCE_FILE in files else None,
        "verification": verification,
        "checkpoint": contents.checkpoint,
        "converted": contents.converted,
        "tools": {"python": platform.python_version(), **{tool: _version(tool) for tool in TOOLS}},
        "files": {name: dataclasses.asdict(record) for name, record in sorted(files.items())},
    }  # fmt: skip
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
