"""`open_graph`: a graph of a bundle for TensorRT at a precision, and the digest by which its engine is known.

The advance graph keeps its axes B, G, S and L symbolic, so that one engine with one copy of the weights takes every
batch, both numbers of branches, and single patches as well as windows: a profile each.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engines.device_engine import chosen_dtype
from tarflow_runtimes._errors import EngineError
from tarflow_runtimes._rewrites import half
from tarflow_runtimes._rewrites._graph import PatternMismatch
from tarflow_runtimes._rewrites.advance import advance_graph
from tarflow_runtimes._trt._network import Graph

KINDS: Final = ("advance", "forward", "gradient")


@contextlib.contextmanager
def open_graph(bundle: Bundle, block: int, kind: str, precision: str) -> Iterator[Graph]:
    """The `kind` graph of a block; its folder lasts as long as the context.

    Raises:
        EngineError: when the bundle cannot have this precision, or its graphs are of a form that is not known.
        BundleError: when the graph is damaged.
    """
    chosen_dtype(bundle, precision)
    files = bundle.blocks[block]
    path: Path = files.step if kind == "advance" else getattr(files, kind)
    model = proto.parse_model(path.read_bytes(), where=str(path))
    proto.check_external_data(model, files.weights, where=str(path))
    with tempfile.TemporaryDirectory(prefix="tarflow-", ignore_cleanup_errors=True) as name:
        folder = files.weights.parent
        try:
            data = advance_graph(model, bundle.config) if kind == "advance" else bytes(model.SerializeToString())
            if precision in half.DTYPES and bundle.dtype == "float32":
                data = half.rewrite(data, precision, files.weights, folder=Path(name))
                folder = Path(name)
        except PatternMismatch as error:
            raise EngineError(
                f"block {block} of bundle {bundle.path.name} cannot be rewritten for TensorRT: {error}",
                hint="export the checkpoint again, or use engine ort-cpu",
            ) from error
        made = proto.parse_model(data, where=kind).graph
        yield Graph(
            kind=kind,
            block=block,
            precision=precision,
            model=data,
            folder=folder,
            digest=_digest(data, made, folder),
            inputs={value.name: _shape(value) for value in made.input},
            outputs={value.name: _shape(value) for value in made.output},
            cache_updates=sum(node.op_type == "TensorScatter" for node in made.node),
            cache_entries=bundle.config.patches,
        )


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or int(dim.dim_value) for dim in value.type.tensor_type.shape.dim)


def _digest(model: bytes, graph: Any, folder: Path) -> str:
    """SHA-256 of the model and of the files that hold its external tensors."""
    digest = hashlib.sha256(model)
    places = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    for place in sorted(places):
        with (folder / place).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
