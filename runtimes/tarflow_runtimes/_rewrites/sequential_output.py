"""Guidance and the affine map of one patch, with the noise and the weights of this step given by the caller.

Formula: (a, b) = out[0] + g (out[0] - out[G-1]);  next = z exp(a) + b.
Pattern: out = Gemm(h, W_out, b_out); between it and `next` only Reshape, Gather, Sub, Split, Mul, Add, Exp and what
    looks up `guidance` and `noise` by `position`; Exp is of the first half of a Split.
Rewrite, for S = 1 and all images at one position:
    one branch:   (a, b) = Split(out)
    two branches: first, last = Split(out, rows);  (a, b) = Split(first + g (first - last))
    next [B, D] = z exp(a) + b
with new inputs `z` [B, D] and, with two branches, `g` [1, 2D]. Without nvp there is no a.
"""

from __future__ import annotations

from typing import Any

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._rewrites._graph import Graph, PatternMismatch

EXPECTED = {"Reshape", "Gather", "Sub", "Split", "Mul", "Add", "Exp", "GatherND", "Unsqueeze", "Cast"}


def rewrite(graph: Graph, config: ModelConfig, *, branches: int, windows: bool) -> None:
    """Rewrite the end of the graph for `branches` (1 or 2); with `windows`, B counts patches, each with a row of g.

    Raises:
        PatternMismatch: when the end is of another form.
    """
    values = config.patch_values
    gemm = _last_gemm(graph, config)
    out = graph.after_cast(gemm.output[0])
    last = graph.producer("next", "Add")
    graph.remove([last])
    if branches == 2:
        first, second = "out_first", "out_last"
        graph.add("Split", [out], [first, second], axis=0, num_outputs=2)
        rows = "B" if windows else 1
        graph.declare_input("g", proto.FLOAT, (rows, values * (2 if config.nvp else 1)))
        weighted = graph.add("Mul", [graph.add("Sub", [first, second], ["out_difference"]), "g"], ["out_weighted"])
        out = graph.add("Add", [first, weighted], ["out_guided"])
    graph.declare_input("z", proto.FLOAT, ("B", values))
    graph.outputs["next"] = proto.value_info("next", proto.FLOAT, ("B", values))
    if not config.nvp:
        graph.add("Add", ["z", out], ["next"])
        return
    graph.add("Split", [out], ["affine_a", "affine_b"], axis=1, num_outputs=2)
    grown = graph.add("Mul", ["z", graph.add("Exp", ["affine_a"], ["affine_scale"])], ["affine_grown"])
    graph.add("Add", [grown, "affine_b"], ["next"])


def _last_gemm(graph: Graph, config: ModelConfig) -> Any:
    """The projection to (a, b), after a look at every node between it and `next`."""
    gemms: dict[int, Any] = {}
    seen: set[str] = set()
    todo = ["next"]
    while todo:
        name = todo.pop()
        if name in seen or name in graph.initializers:
            continue
        seen.add(name)
        if graph.dependencies(name) <= {"noise", "guidance", "position"}:
            continue
        node = graph.producer(name, "Gemm", *EXPECTED)
        if node.op_type == "Gemm":
            gemms[id(node)] = node
            continue
        if node.op_type == "Exp" and "Split" not in {graph.producer(value).op_type for value in _sources(graph, node)}:
            raise PatternMismatch(f"{node.name} is not of the first half of a Split")
        todo.extend(node.input)
    if len(gemms) != 1:
        raise PatternMismatch(f"next comes from {len(gemms)} projections, expected one")
    (gemm,) = gemms.values()
    outputs = config.patch_values * (2 if config.nvp else 1)
    graph.initializer(gemm.input[1], (outputs, config.width))
    return gemm


def _sources(graph: Graph, exp: Any) -> list[str]:
    """What the argument of Exp is a sum of, where that is the first output of a Split."""
    argument = graph.producer(exp.input[0])
    values = list(argument.input) if argument.op_type == "Add" else [exp.input[0]]
    return [value for value in values if graph.producer(value).output[0] == value]
