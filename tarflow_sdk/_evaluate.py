"""Training noise, validation figures and grids of samples for a training run.

All random functions take a generator from `generator_for`, so that they depend only on the seed and the purpose.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tarflow_sdk._config import FlowConfig
from tarflow_sdk._data import Images
from tarflow_sdk._inverse import Guidance, decode
from tarflow_sdk._likelihood import bits_per_dim, classify, denoise
from tarflow_sdk._model import TarFlow

GRID_ROWS, GRID_COLUMNS = 10, 8
"""The maximum number of rows of a grid (one per class), and the number of columns."""


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """A generator that depends only on `seed` and `numbers`."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def add_noise(x: Tensor, config: FlowConfig, generator: torch.Generator) -> Tensor:
    """Training noise: x + sigma * N(0, 1), or uniform dequantisation (pixel + U[0, 1)) / 128 - 1.

    Dequantised images fill [-1, 1) with 256 levels, each 1/128 wide; the levels of x = pixel / 127.5 - 1 are a little
    wider. That is the grid on which bits/dim is defined: its constant 7 is log2(128).
    """
    if config.noise == "uniform":
        pixels = ((x + 1) * 127.5).round()  # augmentation leaves values between the levels
        return (pixels + torch.rand(x.shape, generator=generator)) / 128 - 1
    return x + (config.noise_std or 0.0) * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def evaluate(model: TarFlow, images: Images | None, *, seed: int = 0, batch_size: int = 100) -> dict[str, float]:
    """Bits/dim of noisy images given their labels and, for class models, the accuracy of `classify`.

    Without images the result is empty.
    """
    if images is None:
        return {}
    device = model.var.device
    bits, right = 0.0, 0
    for start in range(0, len(images), batch_size):
        chosen = torch.arange(start, min(start + batch_size, len(images)))
        x = add_noise(images.model_range(chosen), model.config, generator_for(seed, 3, start)).to(device)
        labels = images.labels[chosen].to(device) if images.labels is not None and model.config.classes else None
        bits += float(bits_per_dim(model, x, labels).sum())
        if labels is not None:
            right += int((classify(model, x).argmax(dim=1) == labels).sum())
    row = {"bits_per_dim": bits / len(images)}
    if model.config.classes and images.labels is not None:
        row["accuracy"] = right / len(images)
    return row


def sample_grid(model: TarFlow, *, seed: int = 0) -> Image.Image | None:
    """A grid of samples, with guidance weight 1 and one row per class if there are classes; denoised if sigma is known.

    None for images that are neither grey nor RGB, and for tokens.
    """
    config, device = model.config, model.var.device
    if config.image_size is None or config.image_channels not in (1, 3):
        return None
    rows = min(config.classes, GRID_ROWS) or 4
    count = rows * GRID_COLUMNS
    z = torch.randn(count, config.patches, config.patch_values, generator=generator_for(seed, 2)).to(device)
    labels = torch.arange(rows, device=device).repeat_interleave(GRID_COLUMNS) if config.classes else None
    images = decode(model, z, labels, Guidance(weight=1.0 if config.classes else 0.0))
    if config.noise_std is not None:
        images = denoise(model, images, labels)
    pixels = (images.clip(-1, 1) * 127.5 + 127.5).round().byte().cpu()
    tiles = pixels.reshape(rows, GRID_COLUMNS, *pixels.shape[1:]).permute(0, 3, 1, 4, 2)  # (row, y, column, x, C)
    grid = tiles.reshape(rows * config.image_size, GRID_COLUMNS * config.image_size, config.image_channels)
    return Image.fromarray(grid.squeeze(-1).numpy())
