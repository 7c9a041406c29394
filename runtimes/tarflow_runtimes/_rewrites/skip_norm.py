"""Add followed by LayerNormalization -> SkipLayerNormalization.

Formula: h = x + y; n = (h - mean(h)) / sqrt(var(h) + epsilon) * gamma + beta; both h and n are used.
Pattern: h = Add(x, y), n = LayerNormalization(h, gamma, beta) over the last axis.
Rewrite: n, _, _, h = SkipLayerNormalization(x, y, gamma, beta): one pass over the rows instead of two.

Source: onnxruntime docs/ContribOperators.md, com.microsoft.SkipLayerNormalization.
"""

from __future__ import annotations

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._rewrites._graph import Graph


def rewrite(graph: Graph) -> None:
    """Rewrite every residual that a norm follows; others stay as they are."""
    adds = {node.output[0]: node for node in graph.nodes if node.op_type == "Add" and not node.domain}
    for norm in [node for node in graph.nodes if node.op_type == "LayerNormalization"]:
        add = adds.get(norm.input[0])
        if add is None or len(norm.input) != 3 or len(norm.output) != 1 or proto.attribute(norm, "axis", -1) != -1:
            continue
        epsilon = proto.attribute(norm, "epsilon", 1e-5)
        graph.remove([add, norm])
        graph.add(
            "SkipLayerNormalization",
            [*add.input, *norm.input[1:]],
            [norm.output[0], "", "", add.output[0]],
            domain="com.microsoft",
            epsilon=epsilon,
        )
