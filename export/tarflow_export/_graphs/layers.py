"""Layers shared by the graphs: embedding, layer norm, attention, perceptron, the shift to (a, b).

Hidden states are [rows*S, W], float32; every linear layer is one Gemm on them with the weight as PyTorch stores it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tarflow_export._graphs.builder import CONTRIB, DTYPES, GraphBuilder, Operand
from tarflow_export._weights import GROUP, ZERO_POINT

LAYER_NORM_EPSILON = 1e-5

MASKED = -1e9
"""Added to logits that are masked. It is finite, because a kernel that subtracts two infinities produces NaN."""


def linear(op: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """Apply `x W^T + b`, [rows, in] -> [rows, out], in the dtype of linear layers."""
    if op.has_integer_products and op.layout.is_rounded(f"{name}.weight"):
        return _integer_linear(op, x, name)
    return op.Gemm(op.narrow(x), matrix(op, name), op.weight(f"{name}.bias"), transB=1)


def _integer_linear(op: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """The same with int8 weights, by ONNX Runtime's MatMulNBits, which also rounds x to 8 bits, in groups of 128.

    Source: onnxruntime docs/ContribOperators.md; at accuracy level 4 products are of bytes.
    """
    integers, scale = op.weight(f"{name}.weight.int8"), op.weight(f"{name}.weight.scale")
    rows, columns = op.layout.shapes[f"{name}.weight"]
    options = {"K": columns, "N": rows, "bits": 8, "block_size": GROUP, "accuracy_level": 4}
    bias = op.weight(f"{name}.bias")
    return op.MatMulNBits(x, integers, scale, None, None, bias, domain=CONTRIB, **options)


def matrix(op: GraphBuilder, name: str) -> ir.Value:
    """The weight of a linear layer, [out, in]; int8 ones are made float32 again: W = scale * (q + 128 - 128)."""
    weight = f"{name}.weight"
    if not op.layout.is_rounded(weight):
        return op.weight(weight)
    if weight not in op.made:
        rows, columns = op.layout.shapes[weight]
        with op.scope(f"{name}.dequantise"):
            integers = op.Sub(op.Cast(op.weight(f"{weight}.int8"), to=DTYPES["float32"]), float(ZERO_POINT))
            filled = op.Mul(integers, op.Unsqueeze(op.weight(f"{weight}.scale"), [2]))  # (rows, groups, GROUP)
            op.made[weight] = op.Slice(op.Reshape(filled, [rows, -1]), [0], [columns], [1])
    return op.made[weight]


def layer_norm(op: GraphBuilder, h: ir.Value, name: str) -> ir.Value:
    """Native LayerNormalization over W, float32."""
    return op.LayerNormalization(
        h, op.weight(f"{name}.weight"), op.weight(f"{name}.bias"), axis=-1, epsilon=LAYER_NORM_EPSILON
    )


def query_key_value(op: GraphBuilder, normed: ir.Value, layer: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """[rows*S, W] -> q, k, v, each [rows*S, W]."""
    qkv = linear(op, normed, f"attn_blocks.{layer}.attention.qkv")
    q, k, v = op.split(qkv, 3, axis=1)
    return q, k, v


def split_heads(op: GraphBuilder, x: ir.Value, shape: Operand) -> ir.Value:
    """[rows*S, W] -> [rows, H, S, E]; `shape` is (rows, S, H, E)."""
    return op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])


def merge_heads(op: GraphBuilder, x: ir.Value) -> ir.Value:
    """[rows, H, S, E] -> [rows*S, W]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [-1, op.config.width])


def attention_weights(op: GraphBuilder, q: ir.Value, k: ir.Value, mask: ir.Value) -> ir.Value:
    """softmax(q k^T + mask), [rows, H, S, N]: float32, q already scaled."""
    logits = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))  # (rows, H, S, N)
    return op.Softmax(op.Add(op.widen(logits), mask), axis=-1)


def residual(op: GraphBuilder, h: ir.Value, update: ir.Value) -> ir.Value:
    """`h + update`, float32."""
    return op.Add(h, op.widen(update))


def mlp(op: GraphBuilder, h: ir.Value, layer: int) -> ir.Value:
    """`h + W_2 GELU(W_1 norm(h))`, exact (erf) GELU."""
    name = f"attn_blocks.{layer}.mlp"
    with op.scope(f"layer_{layer}.mlp"):
        hidden = linear(op, layer_norm(op, h, f"{name}.norm"), f"{name}.main.0")
        return residual(op, h, linear(op, op.Gelu(hidden), f"{name}.main.2"))


def embed(op: GraphBuilder, x: ir.Value, labels: ir.Value | None) -> ir.Value:
    """All patches in block order, [B, N, D], and labels [B] -> hidden states [B*N, W]."""
    config = op.config
    with op.scope("embed"):
        h = op.widen(linear(op, op.Reshape(x, [-1, config.patch_values]), "proj_in"))
        h = op.Add(
            op.Reshape(h, [-1, config.patches, config.width]), op.Gather(op.weight("pos_embed"), op.order, axis=0)
        )
        if labels is not None:
            rows = op.Gather(op.weight("class_embed"), labels, axis=0)  # (B, W)
            h = op.Add(h, op.Unsqueeze(rows, [1]))
        return op.Reshape(h, [-1, config.width])


def causal_mask(op: GraphBuilder) -> ir.Value:
    """[N, N]: 0 where the column is at or before the row, else MASKED.

    Made in the graph: stored, it would be 4 MB at N = 1024.
    """
    with op.scope("mask"):
        column = op.Range(0, op.config.patches, 1)
        return op.Where(op.LessOrEqual(column, op.Unsqueeze(column, [1])), 0.0, MASKED)


def shift_later(op: GraphBuilder, x: ir.Value) -> ir.Value:
    """Shift [B, N, .] by one patch, with zeros in front."""
    return op.Pad(op.Slice(x, [0], [op.config.patches - 1], [1]), [0, 1, 0, 0, 0, 0])


def scale_and_shift(op: GraphBuilder, out: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    """Split proj_out's result [..., 2D] into (a, b), float32; a is None, standing for zero, without nvp."""
    if not op.config.nvp:
        return None, out
    a, b = op.split(out, 2, axis=-1)
    return a, b


def block_input(op: GraphBuilder, name: str) -> ir.Value:
    """Declare a [B, N, D] input in image order and return it in block order."""
    value = op.input(name, "float32", ["B", op.config.patches, op.config.patch_values])
    return op.Gather(value, op.order, axis=1)


def block_output(op: GraphBuilder, value: ir.Value, name: str) -> None:
    """Declare a [B, N, D] output: `value` is in block order, the output in image order."""
    op.output(op.Gather(value, op.order, axis=1), name, "float32", ["B", op.config.patches, op.config.patch_values])


def label_input(op: GraphBuilder, shape: Sequence[str]) -> ir.Value | None:
    """Declare the labels, int64; None for models without classes."""
    return op.input("labels", "int64", shape) if op.config.classes else None


def affine(
    op: GraphBuilder, difference: ir.Value, a: ir.Value | None, scale: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """X - b, a and exp(-a), [B, N, D] -> (z = (x - b) exp(-a), log|det| = -sum(a) [B]); a is None without nvp."""
    if a is None or scale is None:
        return difference, op.Expand(0.0, op.Shape(difference, start=0, end=1))
    # Sum patch by patch: a single float32 sum over 200,000 values loses three digits.
    return op.Mul(difference, scale), op.Neg(op.ReduceSum(op.ReduceSum(a, [2], keepdims=0), [1], keepdims=0))
