"""Functions based on the density, on patches: `encode`, `log_prob` and the gradient of log q, given an engine.

log q(x) = sum over dims of log N(u; 0, 1) + log|det|, u = z / sqrt(prior), in nats, summed in float64.
"""

from __future__ import annotations

import math

import numpy as np

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.decode.turn import Doubles, Floats, Integers
from tarflow_runtimes.engines.api import Engine


def encode_patches(engine: Engine, bundle: Bundle, patches: Floats, labels: Integers | None) -> tuple[Floats, Doubles]:
    """Patches [B, N, D] -> (u [B, N, D], log|det du/dx| [B], nats)."""
    x, log_det = patches, np.zeros(len(patches))
    for block in range(bundle.config.blocks):
        x, block_log_det = engine.forward(block, x, labels)
        log_det += block_log_det
    if bundle.prior_variance is None:
        return x, log_det
    u: Floats = (x / np.sqrt(bundle.prior_variance)).astype(np.float32, copy=False)
    return u, log_det - 0.5 * float(np.log(bundle.prior_variance, dtype=np.float64).sum())


def log_prob_of(u: Floats, log_det: Doubles) -> Doubles:
    """Log q [B], nats, from the result of `encode_patches`."""
    square = np.square(u, dtype=np.float64).sum(axis=(1, 2))
    return np.asarray(-0.5 * square - 0.5 * math.log(2.0 * math.pi) * (u[0].size) + log_det)


def bits_per_dim_of(log_prob: Doubles, config: ModelConfig) -> Doubles:
    """-log q / (dims ln 2) + 7: bits per value on the scale of 0..255, which is 128 = 2^7 times as wide as [-1, 1]."""
    return -log_prob / (config.dims * math.log(2.0)) + 7.0


def score(engine: Engine, bundle: Bundle, patches: Floats, labels: Integers | None) -> Floats:
    """The gradient of log q with respect to the patches, [B, N, D].

    It starts from the derivative of log N(u; 0, 1) with respect to z = u * sqrt(prior), which is -z / prior, and passes
    backwards through the blocks, each of which adds the gradient of its own log|det|.
    """

    def cotangent(z: Floats, _: slice) -> Floats:
        return -z if bundle.prior_variance is None else (-z / bundle.prior_variance).astype(np.float32, copy=False)

    _, gradient = engine.vjp(range(bundle.config.blocks), patches, labels, cotangent)
    return gradient


def patchify(images: Floats, config: ModelConfig) -> Floats:
    """Images [B, C, height, width] -> patches [B, N, D], row-major, each patch flattened channel first.

    Tokens are patches already.
    """
    p = config.patch_size
    if p is None:
        return images
    batch, channels, height, width = images.shape
    tiles = images.reshape(batch, channels, height // p, p, width // p, p).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(tiles).reshape(batch, -1, channels * p * p)


def unpatchify(patches: Floats, config: ModelConfig) -> Floats:
    """The inverse of `patchify`."""
    p, channels, size = config.patch_size, config.image_channels, config.image_size
    if p is None or channels is None or size is None:
        return patches
    across = size // p
    tiles = patches.reshape(len(patches), across, across, channels, p, p).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(tiles).reshape(len(patches), channels, size, size)
