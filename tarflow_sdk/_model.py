"""`TarFlow` and its `FlowBlock`s: modules that own the weights and map images to noise in one parallel pass.

The inverse, noise to images, keeps state and is in `_inverse.py`. Parameters have the names of the original
checkpoints, so that a state dict loads without renaming.

Source: Zhai et al. 2024 (arXiv 2412.06329), equations 4 to 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow_sdk._config import MLP_EXPANSION, FlowConfig
from tarflow_sdk._errors import TarFlowError

NULL_LABEL = -1
"""The label that stands for the null class: the mean of all class rows."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over W, computed in at least float32 for any input dtype."""

    def forward(self, h: Tensor) -> Tensor:
        """Normalise x [B, S, W] over its last axis."""
        if h.dtype in (torch.float32, torch.float64):
            return super().forward(h)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(h.float(), self.normalized_shape, weight, bias, self.eps).to(h.dtype)


class Attention(nn.Module):
    """Pre-norm multi-head attention, softmax scale 1/sqrt(E); qkv rows are three groups: all q, all k, all v heads."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, S, W] to q, k, v, each [B, H, S, E]."""
        qkv = self.qkv(self.norm(h))
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # (3, B, H, S, E)
        return q, k, v

    def merge(self, attended: Tensor) -> Tensor:
        """Merge the heads [B, H, S, E] and project to [B, S, W]."""
        return self.proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, h: Tensor) -> Tensor:
        """Causal attention over the whole sequence, [B, N, W] -> [B, N, W]."""
        q, k, v = self.project(h)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # PyTorch's bfloat16 attention backward on CPU is four times slower than its float32 one.
            with torch.autocast("cpu", enabled=False):
                attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(attended)


class MLP(nn.Module):
    """Pre-norm two-layer perceptron with the exact (erf) GELU, hidden width 4 W."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.main = nn.Sequential(
            nn.Linear(width, MLP_EXPANSION * width), nn.GELU(), nn.Linear(MLP_EXPANSION * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Apply the perceptron to x [B, S, W]."""
        return self.main(self.norm(h))  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """One transformer layer: attention and MLP, each with a residual."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width)

    def forward(self, h: Tensor) -> Tensor:
        """Apply the layer to the whole sequence x [B, N, W]."""
        h = h + self.attention(h)
        return h + self.mlp(h)  # type: ignore[no-any-return]


class FlowBlock(nn.Module):
    """One flow block: an affine autoregressive map whose log-scale a and shift b come from a causal transformer.

    z_i = (x_i - b_i) * exp(-a_i) with (a_i, b_i) a function of the patches before i in the block's order
    (first to last for even blocks, last to first for odd ones) and (a_0, b_0) = 0.

    Source: Zhai et al. 2024, equations 4 to 6.

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> z, log_det = random_model(tiny_config()).flow_blocks[0](torch.zeros(2, 4, 16))
    >>> z.shape, log_det.shape
    (torch.Size([2, 4, 16]), torch.Size([2]))
    """

    def __init__(self, config: FlowConfig, *, is_reversed: bool) -> None:
        super().__init__()
        width = config.width
        self.is_reversed = is_reversed
        self.nvp = config.nvp
        self.proj_in = nn.Linear(config.patch_values, width)
        self.pos_embed = nn.Parameter(torch.randn(config.patches, width) * 1e-2)
        self.class_embed = nn.Parameter(torch.randn(config.classes, 1, width) * 1e-2) if config.classes else None
        self.attn_blocks = nn.ModuleList(AttentionBlock(width, config.head_dim) for _ in range(config.layers))
        self.proj_out = nn.Linear(width, config.patch_values * (2 if config.nvp else 1))
        nn.init.zeros_(self.proj_out.weight)

    def in_order(self, sequence: Tensor, dim: int = 1) -> Tensor:
        """Image order to block order along `dim`; its own inverse."""
        return sequence.flip(dim) if self.is_reversed else sequence

    def class_rows(self, labels: Tensor | None) -> Tensor | None:
        """Rows [B, 1, W] ([1, 1, W] without labels) to add to the embedded patches; None for models without classes."""
        if self.class_embed is None:
            return None
        null = self.class_embed.mean(dim=0, keepdim=True)
        if labels is None:
            return null
        return torch.cat([self.class_embed, null])[labels.where(labels >= 0, len(self.class_embed))]

    def scale_and_shift(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state [B, S, W] -> (a, b), each [B, S, D], in at least float32."""
        out = self.proj_out(h)
        out = out if out.dtype == torch.float64 else out.float()
        if self.nvp:
            a, b = out.chunk(2, dim=-1)
            return a, b
        return torch.zeros_like(out), out

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patches x [B, N, D] -> (z [B, N, D], log|det| [B] = -sum(a), nats), both in image order."""
        x = self.in_order(x)
        h = self.proj_in(x) + self.in_order(self.pos_embed, 0)
        if (rows := self.class_rows(labels)) is not None:
            h = h + rows
        for layer in self.attn_blocks:
            h = layer(h)
        a, b = (F.pad(value[:, :-1], (0, 0, 1, 0)) for value in self.scale_and_shift(h))
        return self.in_order((x - b) * torch.exp(-a)), -a.sum(dim=(1, 2))


def check_labels(config: FlowConfig, labels: Tensor | None, batch: int) -> None:
    """Refuse labels that are not integers [B] in -1 .. classes - 1.

    Raises:
        TarFlowError: on labels of another shape, dtype or range.
    """
    if labels is None:
        return
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        name = str(labels.dtype).removeprefix("torch.")
        raise TarFlowError(f"labels must be int64 [{batch}], one for each image, got {name} {list(labels.shape)}")
    if batch and not -1 <= int(labels.min()) <= int(labels.max()) < config.classes:
        classes = f"in 0..{config.classes - 1}, or -1 for the null class" if config.classes else "-1: it has no classes"
        raise TarFlowError(f"labels of this model must be {classes}; got {int(labels.min())}..{int(labels.max())}")


class TarFlow(nn.Module):
    """K flow blocks and a diagonal Gaussian prior with variance `var` [N, D] (ones for nvp models).

    `forward` is the flow of the original code: it ends before the scaling by the prior. `encode` in `_likelihood.py`
    divides by sqrt(var), so that its latents are standard normal for both kinds of model. `assumptions` describes what
    `load_checkpoint` had to assume about the configuration. A new model is untrained: it is the identity up to shifts.

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> z, log_det = random_model(tiny_config())(torch.zeros(2, 1, 8, 8), torch.tensor([0, -1]))
    >>> z.shape, log_det.shape
    (torch.Size([2, 4, 16]), torch.Size([2]))
    """

    var: Tensor
    assumptions: tuple[str, ...] = ()

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(FlowBlock(config, is_reversed=k % 2 == 1) for k in range(config.blocks))
        self.register_buffer("var", torch.ones(config.patches, config.patch_values))

    @property
    def flow_blocks(self) -> Sequence[FlowBlock]:
        """The K blocks, image side first."""
        return [block for block in self.blocks if isinstance(block, FlowBlock)]

    def patchify(self, images: Tensor) -> Tensor:
        """Images [B, C, height, width] -> patches [B, N, D], row-major, each patch flattened channel first.

        Tokens [B, N, D] are returned as they are.
        """
        p = self.config.patch_size
        if p is None:
            return images
        return F.unfold(images, p, stride=p).transpose(1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        size, p = self.config.image_size, self.config.patch_size
        if size is None or p is None:
            return patches
        return F.fold(patches.transpose(1, 2), (size, size), p, stride=p)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [B, C, height, width] in [-1, 1] or tokens [B, N, D], labels int64 [B] (-1 is the null class) or None.

        Returns (z [B, N, D], sum of the blocks' log|det| [B], nats).
        """
        x = self.patchify(images)
        log_det = x.new_zeros(len(x))
        for block in self.blocks:
            x, block_log_det = block(x, labels)
            log_det = log_det + block_log_det
        return x, log_det
