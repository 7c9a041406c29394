"""The step of `step.py` in the form that is fastest on ONNX Runtime's CPU provider: `step` and `window` of `ort-cpu`.

    h = W_in rows + b_in + embedding
    each layer: h += W_o GroupQueryAttention(qkv(norm(h)), K, V) + b_o;  h += mlp(h)
    (a, b) = out[0] + g (out[0] - out[1]), or out where there is one branch;  next = z exp(a) + b

The caller looks up everything except the patch itself: rows of the embeddings, noise and guidance of this step.
GroupQueryAttention writes the new keys and values in place and reads the `total` written entries of the caches instead
of N masked ones. The temperature is a factor on q: `query_factor` [R, 3W] is 1/tau in the columns of q, 1 in others.

`step` takes one patch of each image, all at the same position. `window` takes S patches of one image;
GroupQueryAttention then handles one row at a time, so that each branch has its own attention node, with caches `key_l`,
`value_l` for the first branch and `key_l_null`, `value_l_null` for the second.

Add and LayerNormalization are separate nodes: ONNX Runtime 1.32's SkipLayerNormalization takes 6.2 us on 8 rows of 128,
the two nodes 2.0 us together; a step of the MNIST shape at 8 rows takes 259 us with the fused node, 225 us without.

Source: onnxruntime docs/ContribOperators.md, com.microsoft.GroupQueryAttention (packed query, shared past and present).
"""

from __future__ import annotations

import dataclasses
from typing import Final

import onnx_ir as ir

from tarflow_export._graphs.builder import CONTRIB, GraphBuilder
from tarflow_export._graphs.layers import layer_norm, linear, mlp, residual, scale_and_shift

NULL_BRANCH: Final = "_null"
"""Suffix of the names of the second branch's caches in window graphs."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A variant of the graph: `guided` has two branches, `tempered` also a temperature, `window` S patches at once."""

    guided: bool = False
    tempered: bool = False
    window: bool = False

    @property
    def kind(self) -> str:
        """The graph's name in the bundle."""
        stem = "window" if self.window else "step"
        return f"{stem}_tempered" if self.tempered else f"{stem}_guided" if self.guided else stem

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of caches: one set of caches, or for windows one per branch."""
        return ("", NULL_BRANCH) if self.guided and self.window else ("",)


FORMS: Final = tuple(
    Form(guided=guided, tempered=tempered, window=window)
    for window in (False, True)
    for guided, tempered in ((False, False), (True, False), (True, True))
)
"""All variants. A temperature requires a second branch."""


def build_ort_cpu_step(op: GraphBuilder, form: Form) -> ir.Model:
    """The graph of that variant."""
    inputs = _Inputs(op, form)
    with op.scope("embed"):
        h = op.Add(op.widen(linear(op, inputs.rows, "proj_in")), inputs.embedding)
    for layer in range(op.config.layers):
        h = _attention(op, h, inputs, layer)
        h = mlp(op, h, layer)
    with op.scope("affine"):
        out = op.widen(linear(op, h, "proj_out"))
        if inputs.g is not None:
            first, second = op.split(out, 2, axis=0)
            out = op.Add(first, op.Mul(op.Sub(first, second), inputs.g))
        a, b = scale_and_shift(op, out)
        x = op.Add(inputs.z if a is None else op.Mul(inputs.z, op.Exp(a)), b)
    op.output(x, "next", "float32", ["B", op.config.patch_values])
    return op.model()


class _Inputs:
    """The inputs of the graph; `rows` are R = G * B patches, or G * S of a window."""

    def __init__(self, op: GraphBuilder, form: Form) -> None:
        config, self.form = op.config, form
        self.rows = op.input("rows", "float32", ["R", config.patch_values])
        self.embedding = op.input("embedding", "float32", ["R", config.width])
        self.z = op.input("z", "float32", ["B", config.patch_values])
        self.g = op.input("g", "float32", ["B", op.affine_values]) if form.guided else None
        self.query_factor = (
            op.input("query_factor", op.layout.linear, ["R", 3 * config.width]) if form.tempered else None
        )
        self.lengths = op.input("lengths", "int32", [1 if form.window else "R"])
        self.total = op.input("total", "int32", [1])
        self.cache_shape: list[int | str] = [
            1 if form.window else "R", config.heads, config.patches, config.head_dim
        ]  # fmt: skip
        self.caches = {
            name: op.input(name, op.layout.linear, self.cache_shape)
            for layer in range(config.layers)
            for suffix in form.suffixes
            for name in (f"key_{layer}{suffix}", f"value_{layer}{suffix}")
        }


def _attention(op: GraphBuilder, h: ir.Value, inputs: _Inputs, layer: int) -> ir.Value:
    """`h + proj(softmax(q K^T / (tau sqrt(E))) V)` over the written entries of the caches."""
    name = f"attn_blocks.{layer}.attention"
    with op.scope(f"layer_{layer}.attention"):
        qkv = linear(op, layer_norm(op, h, f"{name}.norm"), f"{name}.qkv")
        if inputs.query_factor is not None:
            qkv = op.Mul(qkv, inputs.query_factor)
        suffixes = inputs.form.suffixes
        parts = (qkv,) if len(suffixes) == 1 else op.split(qkv, len(suffixes), axis=0)
        flat = [_group_query_attention(op, *pair, inputs, layer) for pair in zip(parts, suffixes, strict=True)]
        attended = flat[0] if len(flat) == 1 else op.Concat(*flat, axis=0)
        return residual(op, h, linear(op, attended, f"{name}.proj"))


def _group_query_attention(op: GraphBuilder, qkv: ir.Value, suffix: str, inputs: _Inputs, layer: int) -> ir.Value:
    """[R, 3W] -> [R, W]; a window is one row of S patches."""
    config = op.config
    rows = [1, -1] if inputs.form.window else [-1, 1]
    packed = op.Reshape(qkv, [*rows, 3 * config.width])
    key, value = f"key_{layer}{suffix}", f"value_{layer}{suffix}"
    operands = (packed, None, None, inputs.caches[key], inputs.caches[value], inputs.lengths, inputs.total)
    heads = {"num_heads": config.heads, "kv_num_heads": config.heads, "scale": config.head_dim**-0.5}
    out, *written = op.multiple("GroupQueryAttention", 3, *operands, domain=CONTRIB, **heads)
    for cache, update in zip((key, value), written, strict=True):
        op.output(update, f"next_{cache}", op.layout.linear, inputs.cache_shape)
    return op.Reshape(out, [-1, config.width])
