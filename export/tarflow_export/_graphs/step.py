"""`step`: S finished patches of each image -> the S patches after them, with the attention caches as graph state.

x_{i+1} = z_{i+1} * exp(a_i) + b_i, where (a, b) = (a, b)[0] + g_i * ((a, b)[0] - (a, b)[G-1]) mixes the branches of an
image by its own guidance g; the logits of each branch of each image are divided by its own temperature.

The formulation is the one that both ONNX Runtime and TensorRT take and compute rightly: TensorScatter on axis -2
straight from a graph input to a graph output, attention over the whole cache under an additive float mask, and the
position as device data: it indexes Gathers and never a Slice, which would make it a host shape.
"""

from __future__ import annotations

import onnx_ir as ir

from tarflow_export._graphs.builder import GraphBuilder
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


class _Inputs:
    """The inputs of the step graph, and what every layer derives from them."""

    def __init__(self, op: GraphBuilder) -> None:
        patches, values = op.config.patches, op.config.patch_values
        self.patches = op.input("patches", "float32", ["B", "S", values])
        self.noise = op.input("noise", "float32", ["B", patches, values])
        self.guidance = op.input("guidance", "float32", ["B", 2, patches])
        self.position = op.input("position", "int64", ["B"])
        self.labels = label_input(op, ["G", "B"])
        self.inverse_temperature = op.input("inverse_temperature", "float32", ["G", "B"])
        shape: list[int | str] = ["R", op.config.heads, patches, op.config.head_dim]
        self.caches = [
            (op.input(f"key_{layer}", op.layout.linear, shape), op.input(f"value_{layer}", op.layout.linear, shape))
            for layer in range(op.config.layers)
        ]
        with op.scope("positions"):
            self.branches = op.Shape(self.inverse_temperature, start=0, end=1)  # (G)
            self.steps = op.Shape(self.patches, start=1, end=2)  # (S)
            window = op.Range(0, op.Squeeze(self.steps, [0]), 1)  # (S)
            self.positions = op.Add(op.Unsqueeze(self.position, [1]), window)  # (B, S)
            # Row g*B + b of everything below is branch g of image b.
            tiling = op.Concat(self.branches, [1], axis=0)
            self.write_indices = op.Reshape(op.Expand(self.position, tiling), [-1])  # (R)
            self.heads_shape = op.Concat([-1], self.steps, [op.config.heads, op.config.head_dim], axis=0)
        with op.scope("mask"):
            rows = op.Add(op.Unsqueeze(self.write_indices, [1]), window)  # (R, S)
            visible = op.LessOrEqual(op.Range(0, patches, 1), op.Unsqueeze(rows, [1, 3]))  # (R, 1, S, N)
            self.mask = op.Where(visible, 0.0, MASKED)
        with op.scope("query_scale"):
            scale = op.Mul(self.inverse_temperature, op.config.head_dim**-0.5)  # (G, B)
            self.query_scale = op.narrow(op.Reshape(scale, [-1, 1, 1, 1]))  # (R, 1, 1, 1)


def build_step(op: GraphBuilder) -> ir.Model:
    """The step graph of one block."""
    config = op.config
    inputs = _Inputs(op)
    h = _embed(op, inputs)
    for layer in range(config.layers):
        h = _attention(op, h, inputs, layer)
        h = mlp(op, h, layer)
    a, b = _guided(op, h, inputs)
    with op.scope("affine"):
        following = op.Gather(op.order, op.Add(inputs.positions, 1), axis=0)  # (B, S), order of the data
        z = op.GatherND(inputs.noise, op.Unsqueeze(following, [2]), batch_dims=1)  # (B, S, D)
        x = op.Add(z if a is None else op.Mul(z, op.Exp(a)), b)
    op.output(x, "next", "float32", ["B", "S", config.patch_values])
    return op.model()


def _embed(op: GraphBuilder, inputs: _Inputs) -> ir.Value:
    """[B, S, D] -> hidden states [R*S, W]: embedded once, then tiled over the branches with their class rows."""
    width = op.config.width
    with op.scope("embed"):
        h = op.widen(linear(op, op.Reshape(inputs.patches, [-1, op.config.patch_values]), "proj_in"))
        places = op.Gather(op.order, inputs.positions, axis=0)  # (B, S), order of the data
        shape = op.Concat([-1], inputs.steps, [width], axis=0)
        h = op.Add(op.Reshape(h, shape), op.Gather(op.weight("pos_embed"), places, axis=0))  # (B, S, W)
        if inputs.labels is None:
            h = op.Expand(h, op.Concat(inputs.branches, [1, 1, 1], axis=0))
        else:
            rows = op.Gather(op.weight("class_embed"), inputs.labels, axis=0)  # (G, B, W)
            h = op.Add(h, op.Unsqueeze(rows, [2]))
        return op.Reshape(h, [-1, width])


def _attention(op: GraphBuilder, h: ir.Value, inputs: _Inputs, layer: int) -> ir.Value:
    """`h + proj(softmax(q K^T / (tau sqrt(E)) + mask) V)` with the S keys and values written into the caches K, V."""
    config, name = op.config, f"attn_blocks.{layer}.attention"
    shape: list[int | str] = ["R", config.heads, config.patches, config.head_dim]
    with op.scope(f"layer_{layer}.attention"):
        q, k, v = query_key_value(op, layer_norm(op, h, f"{name}.norm"), layer)
        q, k, v = (split_heads(op, x, inputs.heads_shape) for x in (q, k, v))
        q = op.Mul(q, inputs.query_scale)
        written = []
        for kind, cache, update in zip(("key", "value"), inputs.caches[layer], (k, v), strict=True):
            present = op.TensorScatter(cache, update, inputs.write_indices, axis=-2, mode="linear")
            op.output(present, f"next_{kind}_{layer}", op.layout.linear, shape)
            written.append(present)
        keys, values = written
        attended = op.MatMul(op.narrow(attention_weights(op, q, keys, inputs.mask)), values)  # (R, H, S, E)
        return residual(op, h, linear(op, merge_heads(op, attended), f"{name}.proj"))


def _guided(op: GraphBuilder, h: ir.Value, inputs: _Inputs) -> tuple[ir.Value | None, ir.Value]:
    """Hidden states [R*S, W] -> guided (a, b), each [B, S, D]."""
    with op.scope("guidance"):
        shape = op.Concat(inputs.branches, [-1], inputs.steps, [op.affine_values], axis=0)
        out = op.Reshape(op.widen(linear(op, h, "proj_out")), shape)  # (G, B, S, 2D)
        first = op.Gather(out, 0, axis=0)
        last = op.Gather(out, -1, axis=0)
        by_position = op.Transpose(inputs.guidance, perm=[0, 2, 1])  # (B, N, 2)
        weights = op.GatherND(by_position, op.Unsqueeze(inputs.positions, [2]), batch_dims=1)  # (B, S, 2)
        g_a, g_b = op.split(weights, 2, axis=2)
        a, b = scale_and_shift(op, first)
        a_difference, b_difference = scale_and_shift(op, op.Sub(first, last))
        b = op.Add(b, op.Mul(g_b, b_difference))
        if a is not None and a_difference is not None:
            a = op.Add(a, op.Mul(g_a, a_difference))
        return a, b
