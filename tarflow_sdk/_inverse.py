"""`inverse`: noise to patches, one patch at a time, with the attention caches as explicit state.

The caches go in and come out of `step`; modules hold nothing between calls. Both branches of guidance run in one
batch: rows 0..B-1 with the labels, rows B..2B-1 with the null class and the attention temperature.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tarflow_sdk._errors import TarFlowError
from tarflow_sdk._model import NULL_LABEL, AttentionBlock, FlowBlock, TarFlow, check_labels

Guide = Literal["a", "b", "ab", ""]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Classifier-free guidance of the inverse.

    At step i: a += g_i (a - a_u) and b += g_i (b - b_u), where (a_u, b_u) come from the null class with attention
    logits divided by `attention_temperature`; g_i = weight, or weight * (i + 1) / (N - 1) when `anneal`.

    Raises:
        TarFlowError: on a negative weight, a temperature <= 0 or an unknown `guide`.

    Source: Zhai et al. 2024, section 2.6 and equation 9.

    >>> Guidance(weight=2.0, anneal=True).active
    True
    """

    weight: float = 0.0
    guide: Guide = "ab"
    attention_temperature: float = 1.0
    anneal: bool = False

    def __post_init__(self) -> None:
        if not self.weight >= 0.0 or self.weight == float("inf"):
            raise TarFlowError(f"guidance must be a finite number >= 0, got {self.weight}")
        if not 0.0 < self.attention_temperature < float("inf"):
            raise TarFlowError(f"attention temperature must be positive, got {self.attention_temperature}")
        if self.guide not in ("a", "b", "ab", ""):
            raise TarFlowError(f"guide must be 'a', 'b', 'ab' or '', got {self.guide!r}")

    @property
    def active(self) -> bool:
        """Whether a second branch is needed."""
        return self.weight > 0.0 and self.guide != ""

    def weights(self, patches: int) -> Tensor:
        """The weights g_i for a and for b, float64 [2, N]; the step that computes patch i + 1 uses column i.

        >>> Guidance(weight=3.0, guide="b", anneal=True).weights(4)
        tensor([[0., 0., 0., 0.],
                [1., 2., 3., 4.]], dtype=torch.float64)
        """
        g = torch.full((patches,), self.weight, dtype=torch.float64)
        if self.anneal:
            g = g * torch.arange(1, patches + 1) / (patches - 1)
        return torch.stack([g * ("a" in self.guide), g * ("b" in self.guide)])


class Cache(NamedTuple):
    """Keys and values of one layer, each [R, H, N, E]; positions not yet written hold zeros."""

    key: Tensor
    value: Tensor


def empty_caches(block: FlowBlock, rows: int, patches: int, like: Tensor) -> list[Cache]:
    """One zeroed cache for each layer of `block`."""
    caches = []
    for layer in block.attn_blocks:
        assert isinstance(layer, AttentionBlock)
        width, head_dim = layer.attention.qkv.in_features, layer.attention.head_dim
        shape = (rows, width // head_dim, patches, head_dim)
        caches.append(Cache(like.new_zeros(shape), like.new_zeros(shape)))
    return caches


def step(
    block: FlowBlock,
    x: Tensor,
    position: int,
    *,
    class_rows: Tensor | None,
    temperature: Tensor,
    caches: list[Cache],
) -> tuple[Tensor, Tensor, list[Cache]]:
    """One patch through one block: (a, b) for the patch after `position`.

    x [R, 1, D] is the patch at `position` in block order, `class_rows` [R, 1, W] or None, `temperature` [R].
    Returns a, b, each [R, 1, D], and the caches with `position` written.
    """
    pos_embed = block.in_order(block.pos_embed, 0)[position]
    h = block.proj_in(x) + pos_embed
    if class_rows is not None:
        h = h + class_rows
    written = []
    for layer, cache in zip(block.attn_blocks, caches, strict=True):
        assert isinstance(layer, AttentionBlock)
        q, k, v = layer.attention.project(h)
        index = torch.tensor([position], device=x.device)
        keys, values = cache.key.index_copy(2, index, k), cache.value.index_copy(2, index, v)
        written.append(Cache(keys, values))
        q = q / temperature.to(q.dtype).view(-1, 1, 1, 1)
        seen = slice(position + 1)
        h = h + layer.attention.merge(F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen]))
        h = h + layer.mlp(h)
    a, b = block.scale_and_shift(h)
    return a, b, written


@torch.no_grad()
def inverse_block(
    block: FlowBlock, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None
) -> Tensor:
    """Invert one block: x_0 = z_0, then x_{i+1} = z_{i+1} * exp(a_i) + b_i for i = 0 .. N-2.

    Noise z [B, N, D] -> patches x [B, N, D], both in image order; labels int64 [B], -1 the null class.

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> block = random_model(tiny_config()).flow_blocks[1]
    >>> x = torch.randn(2, 4, 16)
    >>> z, _ = block(x)
    >>> torch.allclose(inverse_block(block, z), x, atol=1e-5)
    True
    """
    guidance = guidance or Guidance()
    z = block.in_order(z)
    batch, patches, _ = z.shape
    branches = 2 if guidance.active else 1
    weights = guidance.weights(patches).to(z)
    rows = batch * branches
    temperature = z.new_ones(rows)
    temperature[batch:] = guidance.attention_temperature
    if labels is None:
        labels = torch.full((batch,), NULL_LABEL, device=z.device)
    class_rows = block.class_rows(torch.cat([labels, torch.full_like(labels, NULL_LABEL)][:branches]))
    caches = empty_caches(block, rows, patches, z)
    x = [z[:, :1]]
    for i in range(patches - 1):
        rows_of_x = x[-1].repeat(branches, 1, 1)
        a, b, caches = step(block, rows_of_x, i, class_rows=class_rows, temperature=temperature, caches=caches)
        if guidance.active:
            a = a[:batch] + weights[0, i] * (a[:batch] - a[batch:])
            b = b[:batch] + weights[1, i] * (b[:batch] - b[batch:])
        x.append(z[:, i + 1 : i + 2] * torch.exp(a) + b)
    return block.in_order(torch.cat(x, dim=1))


@torch.no_grad()
def decode(model: TarFlow, z: Tensor, labels: Tensor | None = None, guidance: Guidance | None = None) -> Tensor:
    """Standard normal latents z [B, N, D] -> images [B, C, height, width] or tokens [B, N, D], without denoising.

    Labels are int64 [B], -1 for the null class; None means the null class for every image. The images are in [-1, 1]
    except for the training noise, and are not clipped. Without guidance this is the inverse of `encode`.

    Raises:
        TarFlowError: on latents of another shape or labels that the model does not have.

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> model = random_model(tiny_config())
    >>> decode(model, torch.randn(2, 4, 16), torch.tensor([0, -1]), Guidance(weight=1.5)).shape
    torch.Size([2, 1, 8, 8])
    """
    expected = (model.config.patches, model.config.patch_values)
    if z.ndim != 3 or z.shape[1:] != expected:
        raise TarFlowError(f"latents must be [B, {expected[0]}, {expected[1]}], got {list(z.shape)}")
    check_labels(model.config, labels, len(z))
    x = z * model.var.sqrt()
    for block in reversed(model.flow_blocks):
        x = inverse_block(block, x, labels, guidance)
    return model.unpatchify(x)
