"""`step`: S finished patches of each image -> the S patches after them, with the attention caches as graph state.

x_{i+1} = z_{i+1} * exp(a_i) + b_i, where (a, b) = (a, b)[0] + g_i * ((a, b)[0] - (a, b)[G-1]) mixes the branches of an
image by its own guidance g; the logits of each branch of each image are divided by its own temperature.

Both ONNX Runtime and TensorRT accept this formulation and compute it correctly: TensorScatter on axis -2 directly from
a graph input to a graph output, attention over the cache with an additive float mask, and the position as device data:
it is an index of Gather but never of Slice, which would make it a host shape.

`next_patches` is also the body of the decode loop (`decode_loop.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from tarflow_export._graphs.builder import GraphBuilder, Operand
from tarflow_export._graphs.layers import (
    MASKED,
    attention_weights,
    label_input,
    layer_norm,
    linear,
    merge_heads,
    mlp,
    query_key_value,
    residual,
    scale_and_shift,
    split_heads,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fed:
    """The inputs of an evaluation.

    `patches` [B, S, D] at block positions `position` [B] and after; `noise` [B, N, D], `guidance` [B, 2, N], `labels`
    and `inverse_temperature` [G, B], and of each layer the `caches` of keys and values, [R, H, N, E], as graph inputs.
    `kv_positions` int64 [L] is 0 .. L-1, the cache entries that attention reads; None for all N.
    """

    patches: ir.Value
    noise: ir.Value
    guidance: ir.Value
    position: ir.Value
    labels: ir.Value | None
    inverse_temperature: ir.Value
    caches: Sequence[tuple[ir.Value, ir.Value]]
    kv_positions: ir.Value | None = None


def build_step(op: GraphBuilder) -> ir.Model:
    """The step graph of one block."""
    patches, values = op.config.patches, op.config.patch_values
    fed = Fed(
        patches=op.input("patches", "float32", ["B", "S", values]),
        noise=op.input("noise", "float32", ["B", patches, values]),
        guidance=op.input("guidance", "float32", ["B", 2, patches]),
        position=op.input("position", "int64", ["B"]),
        labels=label_input(op, ["G", "B"]),
        inverse_temperature=op.input("inverse_temperature", "float32", ["G", "B"]),
        caches=cache_inputs(op),
    )
    op.output(next_patches(op, fed), "next", "float32", ["B", "S", values])
    return op.model()


def cache_inputs(op: GraphBuilder) -> list[tuple[ir.Value, ir.Value]]:
    """Declare the caches of each layer."""
    dtype, shape = op.layout.linear, _cache_shape(op)
    return [
        (op.input(f"key_{layer}", dtype, shape), op.input(f"value_{layer}", dtype, shape))
        for layer in range(op.config.layers)
    ]


def next_patches(op: GraphBuilder, fed: Fed, *, single: bool = False) -> ir.Value:
    """The patches one position further, [B, S, D]; declares the written caches as outputs. `single`: S is 1."""
    inputs = _Inputs(op, fed, single=single)
    h = _embed(op, inputs)
    for layer in range(op.config.layers):
        h = _attention(op, h, inputs, layer)
        h = mlp(op, h, layer)
    a, b = _guided(op, h, inputs)
    with op.scope("affine"):
        following = op.Gather(op.order, op.Add(inputs.positions, 1), axis=0)  # (B, S), order of the data
        z = op.GatherND(fed.noise, op.Unsqueeze(following, [2]), batch_dims=1)  # (B, S, D)
        return op.Add(z if a is None else op.Mul(z, op.Exp(a)), b)


class _Inputs:
    """The inputs of an evaluation, and values derived from them for every layer."""

    def __init__(self, op: GraphBuilder, fed: Fed, *, single: bool) -> None:
        self.fed, self.single = fed, single
        with op.scope("positions"):
            self.branches = op.Shape(fed.inverse_temperature, start=0, end=1)  # (G)
            self.steps: Operand = [1] if single else op.Shape(fed.patches, start=1, end=2)  # (S)
            window = None if single else op.Range(0, op.Squeeze(self.steps, [0]), 1)  # (S)

            def places(first: ir.Value) -> ir.Value:
                """The range first .. first + S - 1, [., S]."""
                column = op.Unsqueeze(first, [1])
                return column if window is None else op.Add(column, window)

            self.positions = places(fed.position)  # (B, S)
            # Row g*B + b of everything below is branch g of image b.
            tiling = op.Concat(self.branches, [1], axis=0)
            self.write_indices = op.Reshape(op.Expand(fed.position, tiling), [-1])  # (R)
            self.heads_shape = op.Concat([-1], self.steps, [op.config.heads, op.config.head_dim], axis=0)
        with op.scope("mask"):
            rows = places(self.write_indices)  # (R, S)
            columns = op.Range(0, op.config.patches, 1) if fed.kv_positions is None else fed.kv_positions
            self.mask = op.Where(op.LessOrEqual(columns, op.Unsqueeze(rows, [1, 3])), 0.0, MASKED)  # (R, 1, S, L)
        self.length = None if fed.kv_positions is None else op.Shape(fed.kv_positions)  # (1): L
        with op.scope("query_scale"):
            scale = op.Mul(fed.inverse_temperature, op.config.head_dim**-0.5)  # (G, B)
            self.query_scale = op.narrow(op.Reshape(scale, [-1, 1, 1, 1]))  # (R, 1, 1, 1)


def _cache_shape(op: GraphBuilder) -> list[int | str]:
    return ["R", op.config.heads, op.config.patches, op.config.head_dim]


def _embed(op: GraphBuilder, inputs: _Inputs) -> ir.Value:
    """[B, S, D] -> hidden states [R*S, W]: embedded once, then tiled over the branches with their class rows."""
    width, labels = op.config.width, inputs.fed.labels
    with op.scope("embed"):
        h = op.widen(linear(op, op.Reshape(inputs.fed.patches, [-1, op.config.patch_values]), "proj_in"))
        places = op.Gather(op.order, inputs.positions, axis=0)  # (B, S), order of the data
        shape = op.Concat([-1], inputs.steps, [width], axis=0)
        h = op.Add(op.Reshape(h, shape), op.Gather(op.weight("pos_embed"), places, axis=0))  # (B, S, W)
        if labels is None:
            h = op.Expand(h, op.Concat(inputs.branches, [1, 1, 1], axis=0))
        else:
            rows = op.Gather(op.weight("class_embed"), labels, axis=0)  # (G, B, W)
            h = op.Add(h, op.Unsqueeze(rows, [2]))
        return op.Reshape(h, [-1, width])


def _attention(op: GraphBuilder, h: ir.Value, inputs: _Inputs, layer: int) -> ir.Value:
    """`h + proj(softmax(q K^T / (tau sqrt(E)) + mask) V)` with the S keys and values written into the caches K, V."""
    name = f"attn_blocks.{layer}.attention"
    with op.scope(f"layer_{layer}.attention"):
        q, k, v = query_key_value(op, layer_norm(op, h, f"{name}.norm"), layer)
        q, k, v = (_split(op, x, inputs) for x in (q, k, v))
        q = op.Mul(q, inputs.query_scale)
        read = []
        for kind, cache, update in zip(("key", "value"), inputs.fed.caches[layer], (k, v), strict=True):
            present = op.TensorScatter(cache, update, inputs.write_indices, axis=-2, mode="linear")
            op.output(present, f"next_{kind}_{layer}", op.layout.linear, _cache_shape(op))
            read.append(present if inputs.length is None else op.Slice(present, [0], inputs.length, [2]))
        keys, values = read  # (R, H, L, E)
        attended = op.MatMul(op.narrow(attention_weights(op, q, keys, inputs.mask)), values)  # (R, H, S, E)
        return residual(op, h, linear(op, _merge(op, attended, inputs), f"{name}.proj"))


def _split(op: GraphBuilder, x: ir.Value, inputs: _Inputs) -> ir.Value:
    """[R*S, W] -> [R, H, S, E]; with S = 1 the numbers already lie in that order."""
    if inputs.single:
        return op.Reshape(x, [-1, op.config.heads, 1, op.config.head_dim])
    return split_heads(op, x, inputs.heads_shape)


def _merge(op: GraphBuilder, x: ir.Value, inputs: _Inputs) -> ir.Value:
    """[R, H, S, E] -> [R*S, W]."""
    return op.Reshape(x, [-1, op.config.width]) if inputs.single else merge_heads(op, x)


def _guided(op: GraphBuilder, h: ir.Value, inputs: _Inputs) -> tuple[ir.Value | None, ir.Value]:
    """Hidden states [R*S, W] -> guided (a, b), each [B, S, D]."""
    with op.scope("guidance"):
        shape = op.Concat(inputs.branches, [-1], inputs.steps, [op.affine_values], axis=0)
        out = op.Reshape(op.widen(linear(op, h, "proj_out")), shape)  # (G, B, S, 2D)
        first = op.Gather(out, 0, axis=0)
        last = op.Gather(out, -1, axis=0)
        by_position = op.Transpose(inputs.fed.guidance, perm=[0, 2, 1])  # (B, N, 2)
        weights = op.GatherND(by_position, op.Unsqueeze(inputs.positions, [2]), batch_dims=1)  # (B, S, 2)
        g_a, g_b = op.split(weights, 2, axis=2)
        a, b = scale_and_shift(op, first)
        a_difference, b_difference = scale_and_shift(op, op.Sub(first, last))
        b = op.Add(b, op.Mul(g_b, b_difference))
        if a is not None and a_difference is not None:
            a = op.Add(a, op.Mul(g_a, a_difference))
        return a, b
