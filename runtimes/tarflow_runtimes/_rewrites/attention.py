"""Attention over the whole masked cache -> GroupQueryAttention over the part that is written.

Formula: softmax(q K^T / (tau sqrt(E)) + mask) V with K, V the caches after this step's k, v are written.
Pattern, for each layer:
    qkv [R, 3W] -Split-> three of (Reshape, Transpose) -> q, k, v [R, H, 1, E]
    next_key = TensorScatter(key, k, position), next_value likewise
    MatMul(Mul(q, scale), Transpose(next_key)) -Add(mask)-> Softmax -MatMul(next_value)-> Transpose -> Reshape [R, W]
Rewrite, for S = 1 (one patch of each row) or for S patches of one image:
    GroupQueryAttention(Reshape(qkv * [1/tau, 1, 1]), key, value, lengths, total) -> Reshape [R, W]
The operator reads position + 1 = `lengths` + 1 rows of the caches instead of N masked ones, and writes in place.
For windows of S patches of one image, the operator takes one row at a time: each branch has its own, with caches
`key_l`, `value_l` for the first and `key_l_null`, `value_l_null` for the second.
The temperature stays a factor on q: the columns of `query_factor` [R, 3W], which the caller fills, are 1/tau for q and
1 for k and v; without temperature there is no such input.

Source: onnxruntime docs/ContribOperators.md, com.microsoft.GroupQueryAttention (packed query, shared past and present).
"""

from __future__ import annotations

import math
from typing import Any, Final

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._rewrites._graph import Graph, PatternMismatch

TO_HEADS, TO_COLUMNS = [0, 2, 1, 3], [0, 1, 3, 2]

MASKED = -1e4
"""What is added to logits that must not count is at most this: exp of it is 0."""


NULL_BRANCH: Final = "_null"
"""What the names of the second branch's caches end with where a graph takes windows."""


def rewrite(graph: Graph, config: ModelConfig, *, branches: int, temperature: bool, windows: bool) -> None:
    """Rewrite every layer. New inputs: `lengths` int32 [R], `total` int32 [1], and `query_factor` when `temperature`.

    Raises:
        PatternMismatch: when a layer is of another form; the graph is then half-rewritten and must be dropped.
    """
    graph.declare_input("lengths", proto.INT32, ("R",))
    graph.declare_input("total", proto.INT32, (1,))
    for layer in range(config.layers):
        qkv, attended, replaced = _match(graph, config, layer)
        packed = qkv
        if temperature:
            if "query_factor" not in graph.inputs:
                cache_type = graph.inputs["key_0"].type.tensor_type.elem_type
                graph.declare_input("query_factor", cache_type, ("R", 3 * config.width))
            packed = graph.add("Mul", [packed, "query_factor"], [f"scaled_qkv_{layer}"])
        graph.remove(replaced)
        if windows and branches == 2:
            thirds = [f"qkv_{layer}", f"qkv_{layer}{NULL_BRANCH}"]
            graph.add("Split", [packed], thirds, axis=0, num_outputs=2)
            _second_caches(graph, layer)
            rows = [
                _attention(graph, config, third, rows=(1, -1), layer=layer, suffix=suffix)
                for third, suffix in zip(thirds, ("", NULL_BRANCH), strict=True)
            ]
            flat = graph.add("Concat", rows, [f"attended_rows_{layer}"], axis=0)
        else:
            flat = _attention(graph, config, packed, rows=(1, -1) if windows else (-1, 1), layer=layer, suffix="")
        graph.replace(attended, flat)


def _attention(graph: Graph, config: ModelConfig, qkv: str, *, rows: tuple[int, int], layer: int, suffix: str) -> str:
    """GroupQueryAttention of `qkv` [., 3W], seen as `rows` = (R, S), over the caches of that suffix -> [., W]."""
    packed = graph.add("Reshape", [qkv, graph.shape(*rows, 3 * config.width)], [f"packed_qkv_{layer}{suffix}"])
    key, value = f"key_{layer}{suffix}", f"value_{layer}{suffix}"
    out = graph.add(
        "GroupQueryAttention",
        [packed, "", "", key, value, "lengths", "total"],
        [f"attended_{layer}{suffix}", f"next_{key}", f"next_{value}"],
        domain="com.microsoft",
        num_heads=config.heads,
        kv_num_heads=config.heads,
        scale=config.head_dim**-0.5,
    )
    return graph.add("Reshape", [out, graph.shape(-1, config.width)], [f"flat_attended_{layer}{suffix}"])


def _second_caches(graph: Graph, layer: int) -> None:
    """Declare the caches of the second branch like those of the first."""
    for name in (f"key_{layer}", f"value_{layer}"):
        for values, declared in ((graph.inputs, name), (graph.outputs, f"next_{name}")):
            tensor = values[declared].type.tensor_type
            shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
            second = f"{declared}{NULL_BRANCH}"
            values[second] = proto.value_info(second, tensor.elem_type, shape)


def _match(graph: Graph, config: ModelConfig, layer: int) -> tuple[str, str, list[Any]]:
    """The packed projection, the attended value [R, W], and the two nodes that make the new caches."""
    key, value = f"next_key_{layer}", f"next_value_{layer}"
    scatters = [graph.producer(name, "TensorScatter") for name in (key, value)]
    for scatter, cache in zip(scatters, (f"key_{layer}", f"value_{layer}"), strict=True):
        linear = proto.attribute(scatter, "mode", b"linear") == b"linear" and proto.attribute(scatter, "axis", -2) in (
            -2,
            2,
        )
        if scatter.input[0] != cache or not linear or graph.dependencies(scatter.input[2]) != {"position"}:
            raise PatternMismatch(f"{scatter.name} does not write {cache} at the position")
    logits = graph.consumer(_transposed(graph.consumer(key, "Transpose"), TO_COLUMNS), "MatMul")
    scaled = graph.producer(logits.input[0], "Mul")
    _check_scale(graph, scaled.input[1], config)
    masked = graph.consumer(graph.after_cast(logits.output[0]), "Add")
    _check_mask(graph, masked.input[1])
    softmax = graph.consumer(masked.output[0], "Softmax")
    if proto.attribute(softmax, "axis", -1) not in (-1, 3):
        raise PatternMismatch(f"{softmax.name} is not over the last axis")
    mixed = graph.consumer(graph.after_cast(softmax.output[0]), "MatMul")
    if list(mixed.input) != [graph.after_cast(softmax.output[0]), value]:
        raise PatternMismatch(f"{mixed.name} does not multiply the weights with {value}")
    merged = _transposed(graph.consumer(mixed.output[0], "Transpose"), TO_HEADS)
    attended = graph.consumer(merged, "Reshape").output[0]
    thirds = [_split_output(graph, name) for name in (scaled.input[0], scatters[0].input[1], scatters[1].input[1])]
    split = graph.producer(thirds[0], "Split")
    if proto.attribute(split, "axis", 0) not in (1, -1) or list(split.output) != thirds or len(split.input) > 1:
        raise PatternMismatch(f"{split.name} does not split q, k and v")
    graph.initializer(graph.producer(split.input[0], "Gemm").input[1], (3 * config.width, config.width))
    return split.input[0], attended, scatters


def _check_mask(graph: Graph, mask: str) -> None:
    """The mask must be 0 up to the position and a large negative number after it."""
    where = graph.producer(mask, "Where")
    visible = graph.producer(where.input[0], "LessOrEqual")
    kept, masked = (graph.number(name) for name in where.input[1:])
    places = [graph.dependencies(name) for name in visible.input]
    if kept != 0.0 or not masked <= MASKED or places != [set(), {"position"}]:
        raise PatternMismatch(f"{where.name} does not mask what lies after the position")


def _check_scale(graph: Graph, scale: str, config: ModelConfig) -> None:
    """The factor on q must be 1/(tau sqrt(E)), spread over the rows."""
    node = graph.producer(scale)
    while node.op_type in ("Cast", "Reshape", "Expand", "Unsqueeze"):
        node = graph.producer(node.input[0])
    values = list(node.input)
    is_product = node.op_type == "Mul" and values[0] == "inverse_temperature"
    if not is_product or not math.isclose(graph.number(values[1]), config.head_dim**-0.5, rel_tol=1e-6):
        raise PatternMismatch(f"{node.name} is not 1/(tau sqrt(E))")


def _transposed(node: Any, perm: list[int]) -> str:
    if proto.attribute(node, "perm") != perm:
        raise PatternMismatch(f"{node.name} is not the permutation {perm}")
    return str(node.output[0])


def _split_output(graph: Graph, heads: str) -> str:
    """Back from [R, H, S, E] to the third of the packed projection that it is."""
    transpose = graph.producer(heads, "Transpose")
    _transposed(transpose, TO_HEADS)
    return str(graph.producer(transpose.input[0], "Reshape").input[0])
