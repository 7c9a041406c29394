"""What the density gives: `encode`, `log_prob`, `bits_per_dim`, `denoise` and `classify`, plain functions of a model.

log q(x) = sum over dims of log N(u; 0, 1) + log|det|, u = z / sqrt(var), all sums in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tarflow_sdk._errors import TarFlowError
from tarflow_sdk._model import TarFlow

PIXEL_SCALE_BITS = 7.0
"""Bits/dim between images in [-1, 1] and in [0, 256): log2(128)."""


def encode(model: TarFlow, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Images [B, C, height, width] -> (u [B, N, D] standard normal under the model, log|det du/dx| [B], nats)."""
    z, log_det = model(images, labels)
    return z / model.var.sqrt(), log_det - 0.5 * model.var.log().sum()


def log_prob(model: TarFlow, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """log q(images | labels) [B], nats. No dequantisation noise is added."""
    u, log_det = encode(model, images, labels)
    log_normal = -0.5 * u.square().sum(dim=(1, 2)) - 0.5 * math.log(2 * math.pi) * model.config.dims
    return log_normal + log_det


def bits_per_dim(model: TarFlow, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """-log q / (dims ln 2) + 7 [B]: bits per value of the image on its 0..255 scale. The caller dequantises."""
    return -log_prob(model, images, labels) / (model.config.dims * math.log(2)) + PIXEL_SCALE_BITS


def denoise(
    model: TarFlow, images: Tensor, labels: Tensor | None = None, *, noise_std: float | None = None, strength: float = 1.0
) -> Tensor:
    """x + strength * sigma^2 * grad_x log q(x): Tweedie's formula with the flow as the noisy density.

    sigma is `noise_std`, or else the model's own. [B, C, height, width] -> the same shape.

    Raises:
        TarFlowError: when neither is known.

    Source: Zhai et al. 2024, section 2.5.
    """
    sigma = model.config.noise_std if noise_std is None else noise_std
    if sigma is None:
        raise TarFlowError("this model's training noise is unknown, so it cannot denoise", hint="pass noise_std")
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        (score,) = torch.autograd.grad(log_prob(model, x, labels).sum(), x)
    return (images + strength * sigma**2 * score).detach()


@torch.no_grad()
def classify(model: TarFlow, images: Tensor) -> Tensor:
    """Log posteriors log p(class | image) [B, classes] by Bayes' rule under a uniform prior.

    Raises:
        TarFlowError: for a model without classes.
    """
    classes = model.config.classes
    if not classes:
        raise TarFlowError("this model has no classes, so it cannot classify")
    per_class = [log_prob(model, images, torch.full((len(images),), c, device=images.device)) for c in range(classes)]
    return torch.stack(per_class, dim=1).log_softmax(dim=1)
