"""`gs_jacobi` and `selective_jacobi`: two published parallel decoders, from their equations, on our PyTorch model.

Both find the patches of a block, x_{i+1} = z_{i+1} * exp(a(x_0..i)) + b(x_0..i), as the fixed point of this map applied
to many patches at once. They differ in what runs at once, in the guess they start from and in when they stop.

GS-Jacobi (arXiv 2505.12849): most blocks iterate over the whole sequence; "tough" ones are cut into equal segments that
are solved one after the other, each over the keys and values of the segments before it, which stay as the last
iteration *read* them, one iterate old. Values are clamped to [-3, 3]; an iteration ends a segment when the norm of its
change over the whole batch, divided by B * D, is small, or when it is the last one allowed.

Selective Jacobi (arXiv 2505.24791): the first block that runs is decoded patch by patch with a cache, all others
iterate over the whole sequence, without cache, until no value of the batch moves by more than a threshold.

Both branches of guidance run in one batch here, and causal attention uses the fused kernel where there is no prefix;
neither changes a number, and both are faster than the description.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tarflow_sdk import NULL_LABEL, FlowBlock, Guidance, TarFlow
from tarflow_sdk._inverse import Cache, empty_caches
from tarflow_sdk._model import AttentionBlock


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """When an iteration has converged: `norm` of its change is at most `bound`.

    The norm is "frobenius" over the batch divided by B * D, or "max", the largest absolute value.
    """

    norm: Literal["frobenius", "max"]
    bound: float

    def reached(self, change: Tensor) -> bool:
        """Whether a change [B, S, D] is small enough; never where it is not finite."""
        if self.norm == "max":
            return bool(change.abs().max() <= self.bound)
        return bool(change.norm() / (change.shape[0] * change.shape[2]) <= self.bound)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """How GS-Jacobi runs one block: `count` segments of at most `cap` iterations each.

    `zeros` starts from [z_0, 0, ..., 0] instead of z.
    """

    count: int = 1
    cap: int = 10
    zeros: bool = False


GS_JACOBI_STOP = Stop(norm="frobenius", bound=1e-6)
GS_JACOBI_CLAMP = 3.0
SELECTIVE_STOP = Stop(norm="max", bound=0.5)

TOUGH_SEGMENTS = 8
TOUGH_CAP = 32
EASY_CAP = 10
"""The recipe of the paper for ImageNet 128 and AFHQ: 8 segments of 32 iterations for the tough block, 10 elsewhere."""

TOUGH_SHARE = 1.5
"""A block is tough when its share of the ranking metric is this many times the mean; picks the paper's own choices."""


class _Inverse(NamedTuple):
    """The inverse of one block for one batch: z [B, N, D] in block order, G = 1 or 2 branches, R = G * B rows."""

    block: FlowBlock
    z: Tensor
    class_rows: Tensor | None  # [R, 1, W]
    temperature: Tensor  # [R, 1, 1, 1]
    weights: Tensor  # [2, N]
    branches: int

    def caches(self) -> list[Cache]:
        """Empty keys and values, [R, H, N, E] each, that `update` writes in place."""
        batch, patches, _ = self.z.shape
        return empty_caches(self.block, batch * self.branches, patches, self.z)

    def scale_and_shift(self, x: Tensor, start: int, caches: Sequence[Cache] | None) -> tuple[Tensor, Tensor]:
        """Patches x [B, S, D] at start .. start + S - 1 -> guided (a, b) for the patch after each, [B, S, D].

        Caches hold the patches before `start` and receive these; without caches, start is 0.
        """
        stop = start + x.shape[1]
        h = self.block.proj_in(x).repeat(self.branches, 1, 1)
        h = h + self.block.in_order(self.block.pos_embed, 0)[start:stop]
        if self.class_rows is not None:
            h = h + self.class_rows
        for index, layer in enumerate(self.block.attn_blocks):
            assert isinstance(layer, AttentionBlock)
            h = h + self._attend(layer, h, start, None if caches is None else caches[index])
            h = h + layer.mlp(h)
        a, b = self.block.scale_and_shift(h)
        if self.branches == 2:
            (a, a_null), (b, b_null) = a.chunk(2), b.chunk(2)
            g = self.weights[:, start:stop, None]
            a, b = a + g[0] * (a - a_null), b + g[1] * (b - b_null)
        return a, b

    def update(self, x: Tensor, start: int, caches: Sequence[Cache] | None) -> Tensor:
        """Patches x [B, S, D] at start .. start + S - 1 -> new values of patches start + 1 .. start + S."""
        a, b = self.scale_and_shift(x, start, caches)
        return self.z[:, start + 1 : start + 1 + x.shape[1]] * torch.exp(a) + b

    def _attend(self, layer: AttentionBlock, h: Tensor, start: int, cache: Cache | None) -> Tensor:
        q, k, v = layer.attention.project(h)  # (R, H, S, E)
        if self.branches == 2:
            q = q / self.temperature
        size = h.shape[1]
        if cache is not None:
            seen = slice(start + size)
            cache.key[:, :, start : start + size], cache.value[:, :, start : start + size] = k, v
            k, v = cache.key[:, :, seen], cache.value[:, :, seen]
        if start == 0 or size == 1:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=size > 1)
        else:
            mask = torch.ones(size, start + size, dtype=torch.bool, device=h.device).tril(start)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return layer.attention.merge(attended)

    def sequential(self) -> Tensor:
        """Patch by patch with a cache, exact."""
        x, caches = self.z.clone(), self.caches()
        for i in range(x.shape[1] - 1):
            x[:, i + 1 : i + 2] = self.update(x[:, i : i + 1], i, caches)
        return x

    def guess(self, *, zeros: bool) -> Tensor:
        """Where an iteration starts: z, or [z_0, 0, ..., 0]."""
        return F.pad(self.z[:, :1], (0, 0, 0, self.z.shape[1] - 1)) if zeros else self.z.clone()

    def solve(
        self,
        x: Tensor,
        start: int,
        end: int,
        *,
        stop: Stop,
        cap: int,
        caches: list[Cache] | None = None,
        clamp: float | None = None,
    ) -> int:
        """Iterate patches start + 1 .. end of x in place, patch `start` being final; returns the iterations."""
        for iteration in range(1, cap + 1):
            new = self.update(x[:, start:end], start, caches)
            if clamp is not None:
                new = new.clamp(-clamp, clamp)
            change = new - x[:, start + 1 : end + 1]
            x[:, start + 1 : end + 1] = new
            if stop.reached(change):
                return iteration
        return cap


def _inverse(block: FlowBlock, z: Tensor, labels: Tensor | None, guidance: Guidance) -> _Inverse:
    batch, patches, _ = z.shape
    branches = 2 if guidance.active else 1
    null = torch.full((batch,), NULL_LABEL, device=z.device)
    temperature = z.new_ones(batch * branches, 1, 1, 1)
    temperature[batch:] = guidance.attention_temperature
    return _Inverse(
        block=block,
        z=block.in_order(z),
        class_rows=block.class_rows(torch.cat([null if labels is None else labels, null][:branches])),
        temperature=temperature,
        weights=guidance.weights(patches).to(z),
        branches=branches,
    )


@torch.no_grad()
def gs_jacobi(
    model: TarFlow,
    z: Tensor,
    labels: Tensor | None = None,
    guidance: Guidance | None = None,
    *,
    strategy: Sequence[Segments],
    stop: Stop = GS_JACOBI_STOP,
    clamp: float | None = GS_JACOBI_CLAMP,
) -> tuple[Tensor, list[int]]:
    """GS-Jacobi: latents z [B, N, D] -> (images [B, C, height, width], iterations of each block).

    `strategy` has one entry a block, index = block. As many segments as patches is the sequential decoder.

    Source: arXiv 2505.12849.
    """
    x, iterations = z * model.var.sqrt(), [0] * len(strategy)
    patches = z.shape[1]
    for k in reversed(range(len(strategy))):
        segments = strategy[k]
        inverse = _inverse(model.flow_blocks[k], x, labels, guidance or Guidance())
        if segments.count >= patches:
            x, iterations[k] = inverse.block.in_order(inverse.sequential()), patches - 1
            continue
        x = inverse.guess(zeros=segments.zeros)
        length = math.ceil(patches / segments.count)
        caches = inverse.caches() if segments.count > 1 else None
        for start in range(0, patches - 1, length):
            end = min(start + length, patches - 1)  # the last segment yields one patch fewer
            iterations[k] += inverse.solve(
                x, start, end, stop=stop, cap=min(segments.cap, end - start), caches=caches, clamp=clamp
            )
        x = inverse.block.in_order(x)
    return model.unpatchify(x), iterations


@torch.no_grad()
def selective_jacobi(
    model: TarFlow,
    z: Tensor,
    labels: Tensor | None = None,
    guidance: Guidance | None = None,
    *,
    stop: Stop = SELECTIVE_STOP,
) -> tuple[Tensor, list[int]]:
    """Selective Jacobi decoding: latents z [B, N, D] -> (images [B, C, height, width], iterations of each block).

    The paper does not speak of guidance; here it enters as in the sequential decoder.

    Source: arXiv 2505.24791, algorithm 1.
    """
    x = z * model.var.sqrt()
    iterations: list[int] = []
    last = z.shape[1] - 1
    for block in reversed(model.flow_blocks):
        inverse = _inverse(block, x, labels, guidance or Guidance())
        if not iterations:
            x = inverse.sequential()
            iterations.append(last)
        else:
            x = inverse.guess(zeros=True)
            iterations.append(inverse.solve(x, 0, last, stop=stop, cap=last))
        x = block.in_order(x)
    return model.unpatchify(x), iterations[::-1]


@torch.no_grad()
def gs_jacobi_strategy(model: TarFlow, images: Tensor) -> tuple[Segments, ...]:
    """The strategy that the metrics of GS-Jacobi choose from images [B, C, height, width], without labels.

    A block's ranking is |mean_B(x * exp(-a))| |W_a| + |W_b|, with W_a and W_b the halves of its last layer; its guess
    is the nearer of z and [z_0, 0, ..., 0] by |mean_B(z * exp(a(guess)) + b(guess) - x)|. All norms are spectral.

    Source: arXiv 2505.12849 and its published strategies.
    """
    rankings, zeros = [], []
    x = model.patchify(images)
    for block in model.flow_blocks:
        z, _ = block(x)
        inverse, ordered = _inverse(block, z, None, Guidance()), block.in_order(x)
        errors = [
            _norm((inverse.update(inverse.guess(zeros=guess)[:, :-1], 0, None) - ordered[:, 1:]).mean(dim=0))
            for guess in (False, True)
        ]
        zeros.append(errors[1] < errors[0])
        a, _ = inverse.scale_and_shift(ordered[:, :-1], 0, None)
        scaled = ordered * torch.exp(-F.pad(a, (0, 0, 1, 0)))
        shift, *scale = reversed(block.proj_out.weight.chunk(2 if block.nvp else 1))
        rankings.append(_norm(scaled.mean(dim=0)) * sum(map(_norm, scale)) + _norm(shift))
        x = z
    return _strategy(rankings, zeros, x.shape[1])


@torch.no_grad()
def gs_jacobi_measured_strategy(
    model: TarFlow, images: Tensor, z: Tensor, labels: Tensor | None, *, stop: Stop
) -> tuple[Segments, ...]:
    """As `gs_jacobi_strategy`, but without caps, and tough is what took the most whole-sequence iterations from z.

    The metric may name a block that converges fast; this does not, and decodes faster.
    """
    patches = z.shape[1]
    guesses = [segments.zeros for segments in gs_jacobi_strategy(model, images)]
    whole = [Segments(cap=patches, zeros=zeros) for zeros in guesses]
    _, iterations = gs_jacobi(model, z, labels, strategy=whole, stop=stop, clamp=None)
    chosen = _strategy([float(n) for n in iterations], guesses, patches)
    return tuple(dataclasses.replace(segments, cap=patches) for segments in chosen)


def _strategy(rankings: Sequence[float], zeros: Sequence[bool], patches: int) -> tuple[Segments, ...]:
    """The highest block, and all that stand out, in as many segments as divide the patches evenly; others whole."""
    least = min(max(rankings), TOUGH_SHARE * sum(rankings) / len(rankings))
    count = max(n for n in range(1, TOUGH_SEGMENTS + 1) if patches % n == 0)
    return tuple(
        Segments(count=count, cap=TOUGH_CAP, zeros=zero) if ranking >= least else Segments(cap=EASY_CAP, zeros=zero)
        for ranking, zero in zip(rankings, zeros, strict=True)
    )


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))
