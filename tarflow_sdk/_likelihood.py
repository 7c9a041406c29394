"""Functions based on the density of a model: `encode`, `log_prob`, `bits_per_dim`, `denoise` and `classify`.

log q(x) = sum over dims of log N(u; 0, 1) + log|det|, u = z / sqrt(var), in nats. A model of tokens takes tokens
[B, N, D] in place of images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tarflow_sdk._errors import TarFlowError
from tarflow_sdk._model import TarFlow, check_labels

PIXEL_SCALE_BITS = 7.0
"""Bits/dim between images in [-1, 1) and in [0, 256): log2(128)."""


def encode(model: TarFlow, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Images to latents and log|det|: u = z / sqrt(var), log|det du/dx| = sum of the blocks' - 0.5 * sum(log var).

    Images [B, C, height, width] in [-1, 1] and labels int64 [B] (-1 for the null class; None: the null class for every
    image) -> (u [B, N, D], standard normal under the model, and the log-determinant log|det| [B], nats).

    Raises:
        TarFlowError: on images of another shape or labels that the model does not have.

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> u, log_det = encode(random_model(tiny_config()), torch.zeros(2, 1, 8, 8), torch.tensor([0, -1]))
    >>> u.shape, log_det.shape
    (torch.Size([2, 4, 16]), torch.Size([2]))
    """
    config = model.config
    if images.ndim != len(config.shape) + 1 or images.shape[1:] != config.shape:
        name = "images" if config.data == "image" else "tokens"
        raise TarFlowError(f"{name} must be [B, {', '.join(map(str, config.shape))}], got {list(images.shape)}")
    check_labels(config, labels, len(images))
    z, log_det = model(images, labels)
    return z / model.var.sqrt(), log_det - 0.5 * model.var.log().sum()


def log_prob(model: TarFlow, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Log-density log q(images | labels) = sum over dims of log N(u; 0, 1) + log|det|, [B], nats.

    No dequantisation noise is added.

    Source: Zhai et al. 2024, equation 1.

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> log_prob(random_model(tiny_config()), torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2])
    """
    u, log_det = encode(model, images, labels)
    log_normal = -0.5 * u.square().sum(dim=(1, 2)) - 0.5 * math.log(2 * math.pi) * model.config.dims
    return log_normal + log_det


def bits_per_dim(model: TarFlow, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Bits per value of the image on its [0, 256) scale, -log q / (dims ln 2) + 7, [B].

    The caller dequantises: x = (pixel + uniform) / 128 - 1, whose levels are 1/128 wide, hence the 7 = log2(128).

    Raises:
        TarFlowError: for a model of tokens, which have no pixels.

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> bits_per_dim(random_model(tiny_config()), torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2])
    """
    if model.config.data == "tokens":
        raise TarFlowError("bits/dim is defined for images, but this model's data are tokens", hint="use log_prob")
    return -log_prob(model, images, labels) / (model.config.dims * math.log(2)) + PIXEL_SCALE_BITS


def denoise(
    model: TarFlow,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    noise_std: float | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Remove the training noise with Tweedie's formula, x + strength * sigma^2 * grad_x log q(x | label).

    The flow models the density of noisy images; sigma is `noise_std`, or by default that of the model. The result has
    the shape of the images, [B, C, height, width].

    Raises:
        TarFlowError: when sigma is neither given nor known.

    Source: Zhai et al. 2024, section 2.5.

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> denoise(random_model(tiny_config()), torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
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

    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> classify(random_model(tiny_config()), torch.zeros(2, 1, 8, 8)).exp().sum(dim=1).round(decimals=4)
    tensor([1., 1.])
    """
    classes = model.config.classes
    if not classes:
        raise TarFlowError("this model has no classes, so it cannot classify")
    per_class = [log_prob(model, images, torch.full((len(images),), c, device=images.device)) for c in range(classes)]
    return torch.stack(per_class, dim=1).log_softmax(dim=1)
