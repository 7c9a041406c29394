"""Write the files of a bundle into a folder: blocks one by one, prior, manifest. The format is docs/BUNDLE.md."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tarflow_export._errors import ExportError
from tarflow_export._graphs.builder import IR_VERSION, OPSET
from tarflow_export._plan import Plan, block_file, block_order
from tarflow_export._weights import WEIGHTS_FILE, WeightLayout, block_tensors
from tarflow_runtimes._bundle import FORMAT, MANIFEST, SCHEMA_VERSION
from tarflow_sdk._model import FlowBlock, TarFlow

REFERENCE_FILE = "reference.npz"
PRIOR_FILE = "prior.npy"

TOOLS = ("tarflow-sdk", "torch", "onnx-ir", "onnxruntime", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file of the bundle: size in bytes and SHA-256."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the weights came from: file name (without folder) and SHA-256, both None for a model in memory."""

    file: str | None = None
    sha256: str | None = None


def write_blocks(
    folder: Path, plan: Plan, model: TarFlow, on_block: Callable[[int], None] | None = None
) -> dict[str, FileRecord]:
    """Graphs and weights of every block, and the prior where it is not one everywhere; the weights are streamed."""
    files = {}
    for k, block in enumerate(model.flow_blocks):
        (folder / block_file(k, "")).mkdir()
        for kind, graph in plan.graphs.items():
            name = block_file(k, f"{kind}.onnx")
            files[name] = write_bytes(folder / name, graph.serialized[block_order(k)])
        name = block_file(k, WEIGHTS_FILE)
        files[name] = _write_weights(folder / name, f"blocks.{k}", block, plan.layout)
        if on_block is not None:
            on_block(k)
    prior = model.var.detach().cpu().float().numpy()
    if bool(np.any(prior != 1.0)):
        np.save(folder / PRIOR_FILE, prior)
        files[PRIOR_FILE] = record_of(folder / PRIOR_FILE)
    return files


def _write_weights(path: Path, owner: str, block: FlowBlock, layout: WeightLayout) -> FileRecord:
    digest = hashlib.sha256()
    end = 0
    with path.open("wb") as file:
        for name, array in block_tensors(block, layout):
            if not np.isfinite(array).all():
                raise ExportError(
                    f"{owner}.{name} holds values beyond the range of {array.dtype}",
                    hint="export with --dtype float32"
                    if array.dtype == np.float16
                    else "train again: the weights are broken",
                )
            offset = layout.entries[name].offset
            for chunk in (bytes(offset - end), array.data.cast("B")):
                file.write(chunk)
                digest.update(chunk)
            end = offset + array.nbytes
    return FileRecord(size=end, sha256=digest.hexdigest())


def parameter_count(model: TarFlow) -> int:
    """Trained parameters; the prior's variance is a buffer."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a file and describe it."""
    path.write_bytes(data)
    return FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def record_of(path: Path) -> FileRecord:
    """Describe a file that is there."""
    with path.open("rb") as file:
        return FileRecord(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(
    folder: Path,
    plan: Plan,
    model: TarFlow,
    *,
    source: Source,
    files: Mapping[str, FileRecord],
    verification: Mapping[str, Any],
) -> None:
    """Everything a reader needs to know, `manifest.json`."""
    config, dtype = plan.config, plan.layout.dtype
    described = config.to_json()
    del described["schema_version"]
    kinds = tuple(plan.graphs)
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "config": described,
        "image_range": [-1.0, 1.0],
        "dtype": dtype,
        "precision": {
            "linear": dtype, "cache": dtype,
            "norm": "float32", "softmax": "float32", "residual": "float32", "affine": "float32", "io": "float32",
        },
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "graphs": {
            kind: {"inputs": list(graph.inputs), "outputs": list(graph.outputs)} for kind, graph in plan.graphs.items()
        },
        "blocks": [
            {
                "order": block_order(k),
                **{kind: block_file(k, f"{kind}.onnx") for kind in kinds},
                "weights": block_file(k, WEIGHTS_FILE),
            }
            for k in range(config.blocks)
        ],
        "cache": {
            "layout": ["R", "H", "N", "E"],
            "dtype": dtype,
            "layers": config.layers,
            "heads": config.heads,
            "patches": config.patches,
            "head_dim": config.head_dim,
        },
        "prior": PRIOR_FILE if PRIOR_FILE in files else None,
        "reference": REFERENCE_FILE if REFERENCE_FILE in files else None,
        "verification": verification,
        "plans": {},
        "checkpoint": {
            "file": source.file,
            "sha256": source.sha256,
            "parameters": parameter_count(model),
        },
        "tools": {"python": platform.python_version(), **{tool: _version(tool) for tool in TOOLS}},
        "files": {name: dataclasses.asdict(record) for name, record in sorted(files.items())},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", "utf-8")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
