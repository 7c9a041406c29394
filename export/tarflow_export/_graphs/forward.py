"""`forward`: patches [B, N, D] -> z [B, N, D] and log|det| [B], one parallel pass.

z_i = (x_i - b_i) * exp(-a_i), log|det| = -sum(a). Attention is MatMul, additive mask and Softmax: the Attention
operator of opset 23 does not build in float32 on TensorRT.
"""

from __future__ import annotations

import onnx_ir as ir

from tarflow_export._graphs.builder import GraphBuilder
from tarflow_export._graphs.layers import (
    attention_weights,
    block_input,
    block_output,
    causal_mask,
    embed_image,
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
    h = embed_image(op, x, label_input(op, ["B"]))
    mask = causal_mask(op)
    for layer in range(config.layers):
        h = _attention(op, h, mask, layer)
        h = mlp(op, h, layer)
    with op.scope("affine"):
        out = op.Reshape(op.widen(linear(op, h, "proj_out")), [-1, config.patches, op.affine_values])
        a, b = scale_and_shift(op, shift_later(op, out))
        difference = op.Sub(x, b)
        if a is None:
            z = difference
            log_det = op.Expand(0.0, op.Shape(x, start=0, end=1))
        else:
            z = op.Mul(difference, op.Exp(op.Neg(a)))
            # Patch by patch: summed in one go, float32 loses three digits over 200,000 values.
            log_det = op.Neg(op.ReduceSum(op.ReduceSum(a, [2], keepdims=0), [1], keepdims=0))
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
        attended = op.MatMul(op.halve(attention_weights(op, q, k, mask)), v)  # (B, H, N, E)
        return residual(op, h, linear(op, merge_heads(op, attended), f"{name}.proj"))
