"""The gradient graph in two: its forward pass, which also gives z, and the way back from what that pass computed.

The gradient graph recomputes the block's forward pass from the block's input. Where z was not known before, as in the
score, that pass is the one that yields it: run once instead of twice, two thirds of the arithmetic are left.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._rewrites._graph import Graph, PatternMismatch

COTANGENT: Final = "cotangent"
ORDER: Final = "order"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitGradient:
    """Two serialised graphs: patches, labels -> z and `saved`; `saved`, cotangent -> gradient."""

    forward: bytes
    backward: bytes
    saved: tuple[str, ...]


def split_gradient(model: Any) -> SplitGradient:
    """Cut a float32 gradient graph (a ModelProto) where the cotangent comes in.

    Raises:
        PatternMismatch: when z cannot be had from what the way back reads, as in blocks without a scale.
    """
    graph = Graph(model)
    if COTANGENT not in graph.inputs or ORDER not in graph.initializers:
        raise PatternMismatch(f"expected an input {COTANGENT} and an initializer {ORDER}")
    saved = _saved(graph)
    z = _z(graph, saved)

    forward = Graph(model)
    ordered = forward.add("Mul", list(z), ["z_in_block_order"])
    forward.add("Gather", [ordered, ORDER], ["z"], axis=1)
    forward.outputs = {name: proto.value_info(name, proto.FLOAT, None) for name in ("z", *saved)}

    back = Graph(model)
    back.remove([back.producer(name) for name in saved])
    back.inputs = {COTANGENT: back.inputs[COTANGENT]}
    for name in saved:
        back.declare_input(name, proto.FLOAT, None)
    halves = SplitGradient(forward=forward.serialized(), backward=back.serialized(), saved=saved)
    if set(back.inputs) != {COTANGENT, *saved}:
        raise PatternMismatch("the way back reads inputs of the block")
    return halves


def _saved(graph: Graph) -> tuple[str, ...]:
    """Values that do not depend on the cotangent, read by nodes that do."""
    after = {COTANGENT}
    way_back = []
    for node in graph.needed():
        if any(name in after for name in node.input):
            after.update(node.output)
            way_back.append(node)
    constant = {*graph.initializers, *graph.inputs, ""}
    read = (name for node in way_back for name in node.input)
    return tuple(dict.fromkeys(name for name in read if name not in after and name not in constant))


def _z(graph: Graph, saved: tuple[str, ...]) -> tuple[str, str]:
    """The two saved values whose product is z in block order: x - b and exp(-a)."""
    differences = [name for name in saved if graph.producer(name).op_type == "Sub"]
    scales = [
        name
        for name in saved
        if graph.producer(name).op_type == "Exp" and graph.producer(graph.producer(name).input[0]).op_type == "Neg"
    ]
    if len(differences) != 1 or len(scales) != 1:
        raise PatternMismatch(f"found {len(differences)} differences and {len(scales)} scales, expected one of each")
    return differences[0], scales[0]
