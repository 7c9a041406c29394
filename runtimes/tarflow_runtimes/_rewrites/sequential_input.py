"""The embedding of one patch: everything but the patch itself is looked up by the caller.

Formula: h = W_in x + b_in + pos_embed[position] + class_embed[label].
Pattern: patches -Reshape-> Gemm(W_in, b_in) -Reshape-> Add(pos_embed gathered at the position)
    -> Add(class_embed gathered at the labels) or Expand over the branches -Reshape-> h [R, W]
Rewrite, for S = 1 and all images at one position:
    h = Add(Gemm(rows [R, D], W_in, b_in), embedding [R, W])
with new inputs `rows`, the patch once per branch, and `embedding`; the thirty small nodes that made shapes, indices and
masks from `position` fall away, because nothing reads them any more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._rewrites._graph import Graph, PatternMismatch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingTables:
    """The initializers that the caller looks rows up in; `class_embed` is None on models without classes."""

    pos_embed: Any
    class_embed: Any | None


def rewrite(graph: Graph, config: ModelConfig) -> EmbeddingTables:
    """Rewrite the start of the graph; returns the tables behind `embedding`.

    Raises:
        PatternMismatch: when the start is of another form.
    """
    reshape = graph.only("patches", "Reshape")
    gemm = graph.consumer(graph.after_cast(reshape.output[0]), "Gemm")
    graph.initializer(gemm.input[1], (config.width, config.patch_values))
    projected = graph.after_cast(gemm.output[0])
    placed = graph.consumer(graph.consumer(projected, "Reshape").output[0], "Add")
    pos_embed = _table(graph, placed.input[1], {"position"}, (config.patches, config.width))
    class_embed = None
    if config.classes:
        added = graph.consumer(placed.output[0], "Add")
        unsqueeze = graph.producer(added.input[1], "Unsqueeze")
        class_embed = _table(graph, unsqueeze.input[0], {"labels"}, (config.classes + 1, config.width))
    else:
        added = graph.consumer(placed.output[0], "Expand")
    hidden = graph.consumer(added.output[0], "Reshape").output[0]

    graph.declare_input("rows", proto.FLOAT, ("R", config.patch_values))
    graph.declare_input("embedding", proto.FLOAT, ("R", config.width))
    graph.replace(reshape.output[0], "rows")
    graph.replace(hidden, graph.add("Add", [projected, "embedding"], ["embedded"]))
    return EmbeddingTables(pos_embed=pos_embed, class_embed=class_embed)


def _table(graph: Graph, value: str, inputs: set[str], shape: tuple[int, ...]) -> Any:
    gather = graph.producer(value, "Gather")
    if proto.attribute(gather, "axis", 0) != 0 or graph.dependencies(gather.input[1]) != inputs:
        raise PatternMismatch(f"{gather.name} does not look rows up by {' and '.join(inputs)}")
    return graph.initializer(gather.input[0], shape)
