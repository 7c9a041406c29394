"""What makes a portable step graph fast on ONNX Runtime's CPU: one file per rewrite, applied when a graph is loaded.

Either all of them apply, and the graph takes one patch at a time from a caller that looks its rows up, or none does
and the portable graph runs as it is. Every rewrite is compared with the portable graph by the tests. `advance`
and `half` are not among these: they make what engines on a GPU run.

Add and LayerNormalization stay apart: ONNX Runtime 1.32's SkipLayerNormalization takes 6.2 us on 8 rows of 128, the two
2.0 us together, and a step of the MNIST shape at 8 rows 259 us with it, 225 us without.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._rewrites import attention, sequential_input, sequential_output
from tarflow_runtimes._rewrites._graph import Graph


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SequentialGraph:
    """A serialised step graph for one patch at a time, and the initializers that its caller looks rows up in."""

    model: bytes
    inputs: tuple[str, ...]
    pos_embed: Any
    class_embed: Any | None


def sequential_graph(
    model: Any, config: ModelConfig, *, branches: int, temperature: bool, windows: bool = False
) -> SequentialGraph:
    """Rewrite the portable step graph (a ModelProto) for G = `branches`; `temperature` when any tau is not 1.

    With `windows` it takes S patches of one image, S the same in all inputs, instead of one patch of each image.

    Raises:
        PatternMismatch: when the graph is not of the form that the rewrites know.
    """
    graph = Graph(model)
    attention.rewrite(graph, config, branches=branches, temperature=temperature, windows=windows)
    tables = sequential_input.rewrite(graph, config)
    sequential_output.rewrite(graph, config, branches=branches, windows=windows)
    data = graph.serialized()
    return SequentialGraph(
        model=data, inputs=tuple(graph.inputs), pos_embed=tables.pos_embed, class_embed=tables.class_embed
    )
