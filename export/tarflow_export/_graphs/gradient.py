"""`gradient`: the vector-Jacobian product of a block, d/d patches of (cotangent . z + log|det|), [B, N, D].

Written by hand: it recomputes the block's forward pass from its input, keeps what the way back needs, and walks back.
With s = exp(-a), z = (x - b) s:  g_x = g_z s,  g_b = -g_z s,  g_a = -g_z z - 1 (the -1 is log|det|'s share).

Layer norm is spelled out, because its backward pass needs the mean and the deviation, which TensorRT's native
LayerNormalization does not give. Every weight is used in one orientation: x W^T forward, g W back.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from tarflow_export._graphs.builder import GraphBuilder
from tarflow_export._graphs.layers import (
    LAYER_NORM_EPSILON,
    attention_weights,
    block_input,
    block_output,
    causal_mask,
    embed_image,
    label_input,
    linear,
    merge_heads,
    query_key_value,
    residual,
    scale_and_shift,
    shift_later,
    split_heads,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Norm:
    """What the way back through a layer norm needs: the normalised input and 1/deviation."""

    name: str
    normed: ir.Value
    inverse_deviation: ir.Value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    """What the way back through attention needs; q is scaled by 1/sqrt(E), p are the attention weights (float32)."""

    norm: _Norm
    q: ir.Value
    k: ir.Value
    v: ir.Value
    p: ir.Value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Mlp:
    """What the way back through the perceptron needs: its hidden values u before GELU, and their normal cdf."""

    norm: _Norm
    u: ir.Value
    cdf: ir.Value


def build_gradient(op: GraphBuilder) -> ir.Model:
    """The gradient graph of one block."""
    config = op.config
    x, cotangent = block_input(op, "patches"), block_input(op, "cotangent")
    h = embed_image(op, x, label_input(op, ["B"]))
    mask = causal_mask(op)
    saved: list[tuple[_Attention, _Mlp]] = []
    for layer in range(config.layers):
        h, attention = _attention(op, h, mask, layer)
        h, mlp = _mlp(op, h, layer)
        saved.append((attention, mlp))
    g_x, g_out = _affine_backward(op, x, h, cotangent)
    with op.scope("proj_out.backward"):
        g = op.widen(_linear_backward(op, g_out, "proj_out"))
    for layer in reversed(range(config.layers)):
        attention, mlp = saved[layer]
        g = _mlp_backward(op, g, mlp, layer)
        g = _attention_backward(op, g, attention, layer)
    with op.scope("embed.backward"):
        g = op.widen(_linear_backward(op, g, "proj_in"))
        g_x = op.Add(g_x, op.Reshape(g, [-1, config.patches, config.patch_values]))
    block_output(op, g_x, "gradient")
    return op.model()


def _affine_backward(op: GraphBuilder, x: ir.Value, h: ir.Value, g_z: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The affine map and its way back: (direct part of g_x [B, N, D], gradient of proj_out's result [B*N, 2D])."""
    config = op.config
    with op.scope("affine"):
        out = op.Reshape(op.widen(linear(op, h, "proj_out")), [-1, config.patches, op.affine_values])
        a, b = scale_and_shift(op, shift_later(op, out))
    with op.scope("affine.backward"):
        if a is None:
            g_x, g_shifted = g_z, op.Neg(g_z)
        else:
            s = op.Exp(op.Neg(a))
            g_x = op.Mul(g_z, s)
            g_a = op.Sub(op.Neg(op.Mul(g_x, op.Sub(x, b))), 1.0)
            g_shifted = op.Concat(g_a, op.Neg(g_x), axis=-1)
        # Undo the shift: the first patch's (a, b) are constants, the last patch's are not used.
        g_out = op.Pad(op.Slice(g_shifted, [1], [config.patches], [1]), [0, 0, 0, 0, 1, 0])
        return g_x, op.Reshape(g_out, [-1, op.affine_values])


def _linear_backward(op: GraphBuilder, g: ir.Value, name: str) -> ir.Value:
    """`g W`, [rows, out] -> [rows, in], in the dtype of linear layers."""
    return op.MatMul(op.halve(g), op.weight(f"{name}.weight"))


def _norm(op: GraphBuilder, h: ir.Value, name: str) -> tuple[ir.Value, _Norm]:
    """Layer norm from its formula: (h - mean) / sqrt(variance + eps) * weight + bias."""
    centred = op.Sub(h, op.ReduceMean(h, [-1]))
    variance = op.ReduceMean(op.Mul(centred, centred), [-1])
    inverse_deviation = op.Reciprocal(op.Sqrt(op.Add(variance, LAYER_NORM_EPSILON)))
    normed = op.Mul(centred, inverse_deviation)
    result = op.Add(op.Mul(normed, op.weight(f"{name}.weight")), op.weight(f"{name}.bias"))
    return result, _Norm(name=name, normed=normed, inverse_deviation=inverse_deviation)


def _norm_backward(op: GraphBuilder, g: ir.Value, saved: _Norm) -> ir.Value:
    """(gw - mean(gw) - normed * mean(gw * normed)) / deviation with gw = g * weight."""
    gw = op.Mul(g, op.weight(f"{saved.name}.weight"))
    along = op.Mul(saved.normed, op.ReduceMean(op.Mul(gw, saved.normed), [-1]))
    return op.Mul(op.Sub(op.Sub(gw, op.ReduceMean(gw, [-1])), along), saved.inverse_deviation)


def _attention(op: GraphBuilder, h: ir.Value, mask: ir.Value, layer: int) -> tuple[ir.Value, _Attention]:
    """As in the forward graph, keeping what the way back needs."""
    config, name = op.config, f"attn_blocks.{layer}.attention"
    shape = [-1, config.patches, config.heads, config.head_dim]
    with op.scope(f"layer_{layer}.attention"):
        normed, norm = _norm(op, h, f"{name}.norm")
        q, k, v = query_key_value(op, normed, layer)
        q = op.Mul(q, op.linear_constant(config.head_dim**-0.5))
        q, k, v = (split_heads(op, x, shape) for x in (q, k, v))
        p = attention_weights(op, q, k, mask)
        attended = op.MatMul(op.halve(p), v)  # (B, H, N, E)
        h = residual(op, h, linear(op, merge_heads(op, attended), f"{name}.proj"))
    return h, _Attention(norm=norm, q=q, k=k, v=v, p=p)


def _attention_backward(op: GraphBuilder, g: ir.Value, saved: _Attention, layer: int) -> ir.Value:
    """Softmax backward: g_logits = p * (g_p - rowsum(g_p * p)); the mask's entries have p = 0 and need no care."""
    config, name = op.config, f"attn_blocks.{layer}.attention"
    shape = [-1, config.patches, config.heads, config.head_dim]
    with op.scope(f"layer_{layer}.attention.backward"):
        g_attended = split_heads(op, _linear_backward(op, g, f"{name}.proj"), shape)  # (B, H, N, E)
        g_p = op.widen(op.MatMul(g_attended, op.Transpose(saved.v, perm=[0, 1, 3, 2])))  # (B, H, N, N)
        along = op.ReduceSum(op.Mul(g_p, saved.p), [-1])
        g_logits = op.halve(op.Mul(saved.p, op.Sub(g_p, along)))
        g_q = op.Mul(op.MatMul(g_logits, saved.k), op.linear_constant(config.head_dim**-0.5))
        g_k = op.MatMul(op.Transpose(g_logits, perm=[0, 1, 3, 2]), saved.q)
        g_v = op.MatMul(op.Transpose(op.halve(saved.p), perm=[0, 1, 3, 2]), g_attended)
        g_qkv = op.Concat(*(merge_heads(op, x) for x in (g_q, g_k, g_v)), axis=1)  # (B*N, 3W)
        g_normed = op.widen(_linear_backward(op, g_qkv, f"{name}.qkv"))
        return op.Add(g, _norm_backward(op, g_normed, saved.norm))


def _mlp(op: GraphBuilder, h: ir.Value, layer: int) -> tuple[ir.Value, _Mlp]:
    """GELU(u) = u * cdf(u), the cdf kept for the way back."""
    name = f"attn_blocks.{layer}.mlp"
    with op.scope(f"layer_{layer}.mlp"):
        normed, norm = _norm(op, h, f"{name}.norm")
        u = op.widen(linear(op, normed, f"{name}.main.0"))
        cdf = op.Mul(op.Add(op.Erf(op.Mul(u, math.sqrt(0.5))), 1.0), 0.5)
        h = residual(op, h, linear(op, op.Mul(u, cdf), f"{name}.main.2"))
    return h, _Mlp(norm=norm, u=u, cdf=cdf)


def _mlp_backward(op: GraphBuilder, g: ir.Value, saved: _Mlp, layer: int) -> ir.Value:
    """GELU'(u) = cdf(u) + u * exp(-u^2 / 2) / sqrt(2 pi)."""
    name = f"attn_blocks.{layer}.mlp"
    with op.scope(f"layer_{layer}.mlp.backward"):
        density = op.Mul(op.Exp(op.Mul(op.Mul(saved.u, saved.u), -0.5)), 1.0 / math.sqrt(2.0 * math.pi))
        slope = op.Add(saved.cdf, op.Mul(saved.u, density))
        g_u = op.Mul(op.widen(_linear_backward(op, g, f"{name}.main.2")), slope)
        g_normed = op.widen(_linear_backward(op, g_u, f"{name}.main.0"))
        return op.Add(g, _norm_backward(op, g_normed, saved.norm))
