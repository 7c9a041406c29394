"""`gradient`: the vector-Jacobian product of a block, d/d patches of (cotangent . z + log|det|), [B, N, D].

Written by hand: it runs the block's forward pass, saves the activations, and runs the backward pass.
With s = exp(-a), z = (x - b) s:  g_x = g_z s,  g_b = -g_z s,  g_a = -g_z z - 1 (the -1 is log|det|'s share).

`vjp_forward` and `vjp_backward` are its two halves. If z is not known beforehand, they run the forward pass once
instead of twice, which is two thirds of the arithmetic. The outputs of one are inputs of the other.

Layer norm is written out, because its backward pass needs the mean and the deviation, which TensorRT's native
LayerNormalization does not return. Every weight is used in one orientation: x W^T forward, g W back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from tarflow_export._graphs.builder import GraphBuilder
from tarflow_export._graphs.layers import (
    LAYER_NORM_EPSILON,
    affine,
    attention_weights,
    block_input,
    block_output,
    causal_mask,
    embed,
    label_input,
    linear,
    matrix,
    merge_heads,
    query_key_value,
    residual,
    scale_and_shift,
    shift_later,
    split_heads,
)
from tarflow_export._weights import MLP_EXPANSION


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Norm:
    """Saved by a layer norm for its backward pass: the normalised input [B*N, W] and 1/deviation [B*N, 1]."""

    normed: ir.Value
    inverse_deviation: ir.Value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    """Saved by attention for its backward pass; q is scaled by 1/sqrt(E), p are the attention weights (float32)."""

    norm: _Norm
    q: ir.Value
    k: ir.Value
    v: ir.Value
    p: ir.Value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Mlp:
    """Saved by the perceptron for its backward pass: GELU'(u) of its hidden values u, [B*N, 4W]."""

    norm: _Norm
    slope: ir.Value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    attention: _Attention
    mlp: _Mlp


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Saved:
    """Everything that the backward pass needs.

    `difference` = x - b and `scale` = exp(-a), [B, N, D] in block order; without nvp the affine map needs neither.
    """

    layers: tuple[_Layer, ...]
    difference: ir.Value | None
    scale: ir.Value | None


def build_gradient(op: GraphBuilder) -> ir.Model:
    """The gradient graph of one block."""
    x, cotangent = block_input(op, "patches"), block_input(op, "cotangent")
    saved, _, _ = _forward(op, x)
    block_output(op, _backward(op, saved, cotangent), "gradient")
    return op.model()


def build_vjp_forward(op: GraphBuilder) -> ir.Model:
    """Its first half: `patches`, `labels` -> `z`, `log_det` and the saved activations."""
    saved, z, log_det = _forward(op, block_input(op, "patches"))
    block_output(op, z, "z")
    op.output(log_det, "log_det", "float32", ["B"])
    for value, dtype, shape in _kept(op, saved):
        op.output(value, str(value.name), dtype, shape)
    return op.model()


def build_vjp_backward(op: GraphBuilder) -> ir.Model:
    """Its second half: the saved activations of `vjp_forward`, `cotangent` -> `gradient`."""
    first = GraphBuilder("vjp_forward", op.config, op.layout)
    saved, _, _ = _forward(first, block_input(first, "patches"))
    cotangent = block_input(op, "cotangent")
    inputs = {value: op.input(str(value.name), dtype, shape) for value, dtype, shape in _kept(first, saved)}
    block_output(op, _backward(op, _replaced(saved, inputs), cotangent), "gradient")
    return op.model()


def _kept(op: GraphBuilder, saved: _Saved) -> Iterator[tuple[ir.Value, str, list[int | str]]]:
    """Each saved value, its dtype and its shape."""
    config, rows = op.config, "B*N"
    for layer in saved.layers:
        for norm in (layer.attention.norm, layer.mlp.norm):
            yield norm.normed, "float32", [rows, config.width]
            yield norm.inverse_deviation, "float32", [rows, 1]
        for value in (layer.attention.q, layer.attention.k, layer.attention.v):
            yield value, op.layout.linear, ["B", config.heads, config.patches, config.head_dim]
        yield layer.attention.p, "float32", ["B", config.heads, config.patches, config.patches]
        yield layer.mlp.slope, "float32", [rows, MLP_EXPANSION * config.width]
    for each in (saved.difference, saved.scale):
        if each is not None:
            yield each, "float32", ["B", config.patches, config.patch_values]


def _replaced(saved: Any, values: Mapping[ir.Value, ir.Value]) -> Any:
    """The same with other values in place of its own."""
    if isinstance(saved, tuple):
        return tuple(_replaced(one, values) for one in saved)
    if dataclasses.is_dataclass(saved) and not isinstance(saved, type):
        fields = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
        return type(saved)(**{name: _replaced(one, values) for name, one in fields.items()})
    return values.get(saved)


def _forward(op: GraphBuilder, x: ir.Value) -> tuple[_Saved, ir.Value, ir.Value]:
    """Patches [B, N, D] in block order -> what is kept, z [B, N, D] in block order, log|det| [B]."""
    config = op.config
    h = embed(op, x, label_input(op, ["B"]))
    mask = causal_mask(op)
    layers = []
    for layer in range(config.layers):
        h, attention = _attention(op, h, mask, layer)
        h, mlp = _mlp(op, h, layer)
        layers.append(_Layer(attention=attention, mlp=mlp))
    with op.scope("affine"):
        out = op.Reshape(op.widen(linear(op, h, "proj_out")), [-1, config.patches, op.affine_values])
        a, b = scale_and_shift(op, shift_later(op, out))
        difference = op.Sub(x, b)
        scale = None if a is None else op.Exp(op.Neg(a))
        z, log_det = affine(op, difference, a, scale)
    kept = None if scale is None else difference
    return _Saved(layers=tuple(layers), difference=kept, scale=scale), z, log_det


def _backward(op: GraphBuilder, saved: _Saved, g_z: ir.Value) -> ir.Value:
    """The cotangent [B, N, D] -> the gradient [B, N, D], both in block order."""
    config = op.config
    with op.scope("affine.backward"):
        if saved.scale is None or saved.difference is None:
            g_x, g_shifted = g_z, op.Neg(g_z)
        else:
            g_x = op.Mul(g_z, saved.scale)
            g_a = op.Sub(op.Neg(op.Mul(g_x, saved.difference)), 1.0)
            g_shifted = op.Concat(g_a, op.Neg(g_x), axis=-1)
        # Undo the shift: (a, b) of the first patch are constants, those of the last patch are not used.
        g_out = op.Pad(op.Slice(g_shifted, [1], [config.patches], [1]), [0, 0, 0, 0, 1, 0])
        g = op.Reshape(g_out, [-1, op.affine_values])
    with op.scope("proj_out.backward"):
        g = op.widen(_linear_backward(op, g, "proj_out"))
    for layer in reversed(range(config.layers)):
        g = _mlp_backward(op, g, saved.layers[layer].mlp, layer)
        g = _attention_backward(op, g, saved.layers[layer].attention, layer)
    with op.scope("embed.backward"):
        g = op.widen(_linear_backward(op, g, "proj_in"))
        return op.Add(g_x, op.Reshape(g, [-1, config.patches, config.patch_values]))


def _linear_backward(op: GraphBuilder, g: ir.Value, name: str) -> ir.Value:
    """`g W`, [rows, out] -> [rows, in], in the dtype of linear layers."""
    return op.MatMul(op.narrow(g), matrix(op, name))


def _norm(op: GraphBuilder, h: ir.Value, name: str) -> tuple[ir.Value, _Norm]:
    """Layer norm from its formula: (h - mean) / sqrt(variance + eps) * weight + bias."""
    centred = op.Sub(h, op.ReduceMean(h, [-1]))
    variance = op.ReduceMean(op.Mul(centred, centred), [-1])
    inverse_deviation = op.Reciprocal(op.Sqrt(op.Add(variance, LAYER_NORM_EPSILON)))
    normed = op.Mul(centred, inverse_deviation)
    result = op.Add(op.Mul(normed, op.weight(f"{name}.weight")), op.weight(f"{name}.bias"))
    return result, _Norm(normed=normed, inverse_deviation=inverse_deviation)


def _norm_backward(op: GraphBuilder, g: ir.Value, saved: _Norm, name: str) -> ir.Value:
    """(gw - mean(gw) - normed * mean(gw * normed)) / deviation with gw = g * weight."""
    gw = op.Mul(g, op.weight(f"{name}.weight"))
    along = op.Mul(saved.normed, op.ReduceMean(op.Mul(gw, saved.normed), [-1]))
    return op.Mul(op.Sub(op.Sub(gw, op.ReduceMean(gw, [-1])), along), saved.inverse_deviation)


def _attention(op: GraphBuilder, h: ir.Value, mask: ir.Value, layer: int) -> tuple[ir.Value, _Attention]:
    """As in the forward graph, saving what the backward pass needs."""
    config, name = op.config, f"attn_blocks.{layer}.attention"
    shape = [-1, config.patches, config.heads, config.head_dim]
    with op.scope(f"layer_{layer}.attention"):
        normed, norm = _norm(op, h, f"{name}.norm")
        q, k, v = query_key_value(op, normed, layer)
        q = op.Mul(q, op.linear_constant(config.head_dim**-0.5))
        q, k, v = (split_heads(op, x, shape) for x in (q, k, v))
        p = attention_weights(op, q, k, mask)
        attended = op.MatMul(op.narrow(p), v)  # (B, H, N, E)
        h = residual(op, h, linear(op, merge_heads(op, attended), f"{name}.proj"))
    return h, _Attention(norm=norm, q=q, k=k, v=v, p=p)


def _attention_backward(op: GraphBuilder, g: ir.Value, saved: _Attention, layer: int) -> ir.Value:
    """Softmax backward: g_logits = p * (g_p - rowsum(g_p * p)); masked entries have p = 0 and contribute nothing."""
    config, name = op.config, f"attn_blocks.{layer}.attention"
    shape = [-1, config.patches, config.heads, config.head_dim]
    with op.scope(f"layer_{layer}.attention.backward"):
        g_attended = split_heads(op, _linear_backward(op, g, f"{name}.proj"), shape)  # (B, H, N, E)
        g_p = op.widen(op.MatMul(g_attended, op.Transpose(saved.v, perm=[0, 1, 3, 2])))  # (B, H, N, N)
        along = op.ReduceSum(op.Mul(g_p, saved.p), [-1])
        g_logits = op.narrow(op.Mul(saved.p, op.Sub(g_p, along)))
        g_q = op.Mul(op.MatMul(g_logits, saved.k), op.linear_constant(config.head_dim**-0.5))
        g_k = op.MatMul(op.Transpose(g_logits, perm=[0, 1, 3, 2]), saved.q)
        g_v = op.MatMul(op.Transpose(op.narrow(saved.p), perm=[0, 1, 3, 2]), g_attended)
        g_qkv = op.Concat(*(merge_heads(op, x) for x in (g_q, g_k, g_v)), axis=1)  # (B*N, 3W)
        g_normed = op.widen(_linear_backward(op, g_qkv, f"{name}.qkv"))
        return op.Add(g, _norm_backward(op, g_normed, saved.norm, f"{name}.norm"))


def _mlp(op: GraphBuilder, h: ir.Value, layer: int) -> tuple[ir.Value, _Mlp]:
    """GELU(u) = u cdf(u), GELU'(u) = cdf(u) + u exp(-u^2 / 2) / sqrt(2 pi)."""
    name = f"attn_blocks.{layer}.mlp"
    with op.scope(f"layer_{layer}.mlp"):
        normed, norm = _norm(op, h, f"{name}.norm")
        u = op.widen(linear(op, normed, f"{name}.main.0"))
        cdf = op.Mul(op.Add(op.Erf(op.Mul(u, math.sqrt(0.5))), 1.0), 0.5)
        density = op.Mul(op.Exp(op.Mul(op.Mul(u, u), -0.5)), 1.0 / math.sqrt(2.0 * math.pi))
        slope = op.Add(cdf, op.Mul(u, density))
        h = residual(op, h, linear(op, op.Mul(u, cdf), f"{name}.main.2"))
    return h, _Mlp(norm=norm, slope=slope)


def _mlp_backward(op: GraphBuilder, g: ir.Value, saved: _Mlp, layer: int) -> ir.Value:
    """g_u = g_hidden GELU'(u)."""
    name = f"attn_blocks.{layer}.mlp"
    with op.scope(f"layer_{layer}.mlp.backward"):
        g_u = op.Mul(op.widen(_linear_backward(op, g, f"{name}.main.2")), saved.slope)
        g_normed = op.widen(_linear_backward(op, g_u, f"{name}.main.0"))
        return op.Add(g, _norm_backward(op, g_normed, saved.norm, f"{name}.norm"))
