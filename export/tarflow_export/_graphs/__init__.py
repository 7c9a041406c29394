"""The three graphs of a flow block, written by hand with onnx-ir: `forward`, `step` and `gradient`.

Each kind is made once per block order; all blocks of a model share the result, because their weights lie at the
same offsets of their own `weights.bin`.
"""

from tarflow_export._graphs.builder import GraphBuilder
from tarflow_export._graphs.forward import build_forward
from tarflow_export._graphs.gradient import build_gradient
from tarflow_export._graphs.step import build_step

__all__ = ["GRAPH_KINDS", "GraphBuilder", "build_forward", "build_gradient", "build_step"]

GRAPH_KINDS = {"forward": build_forward, "step": build_step, "gradient": build_gradient}
"""What makes each kind of graph, keyed by its name in the bundle."""
