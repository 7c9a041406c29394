"""`forward`: patches [B, N, D] -> z [B, N, D] and log|det| [B], one parallel pass.

z_i = (x_i - b_i) * exp(-a_i), log|det| = -sum(a). Attention is MatMul, additive mask and Softmax: the Attention
operator of opset 23 does not build in float32 on TensorRT.
"""

from __future__ import annotations

import onnx_ir as ir

from tarflow_export._graphs.builder import GraphBuilder
from tarflow_export._graphs.layers import (
    affine,
    attention_weights,
    block_input,
    block_output,
    causal_mask,
    embed,
    label_input,
    layer_norm,
    linear,
    merge_heads,
    mlp,
    query_key_value,
    residual,
    scale_and_shift,
    shift_later,
    split_heads,
)


def build_forward(op: GraphBuilder) -> ir.Model:
    """The forward graph of one block."""
    config = op.config
    x = block_input(op, "patches")
    h = embed(op, x, label_input(op, ["B"]))
    mask = causal_mask(op)
    for layer in range(config.layers):
        h = _attention(op, h, mask, layer)
        h = mlp(op, h, layer)
    with op.scope("affine"):
        out = op.Reshape(op.widen(linear(op, h, "proj_out")), [-1, config.patches, op.affine_values])
        a, b = scale_and_shift(op, shift_later(op, out))
        z, log_det = affine(op, op.Sub(x, b), a, None if a is None else op.Exp(op.Neg(a)))
    block_output(op, z, "z")
    op.output(log_det, "log_det", "float32", ["B"])
    return op.model()


def _attention(op: GraphBuilder, h: ir.Value, mask: ir.Value, layer: int) -> ir.Value:
    """`h + proj(softmax(q k^T / sqrt(E) + mask) v)`."""
    config, name = op.config, f"attn_blocks.{layer}.attention"
    shape = [-1, config.patches, config.heads, config.head_dim]
    with op.scope(f"layer_{layer}.attention"):
        q, k, v = query_key_value(op, layer_norm(op, h, f"{name}.norm"), layer)
        q = op.Mul(q, op.linear_constant(config.head_dim**-0.5))
        q, k, v = (split_heads(op, x, shape) for x in (q, k, v))
        attended = op.MatMul(op.narrow(attention_weights(op, q, k, mask)), v)  # (B, H, N, E)
        return residual(op, h, linear(op, merge_heads(op, attended), f"{name}.proj"))
