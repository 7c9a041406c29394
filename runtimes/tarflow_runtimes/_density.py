"""What the density gives, on patches: `encode`, `log_prob` and the gradient of log q, plain functions of an engine.

log q(x) = sum over dims of log N(u; 0, 1) + log|det|, u = z / sqrt(prior), all sums in nats and in float64.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engine import Engine, Floats, Integers

PIXEL_SCALE_BITS: Final = 7.0
"""Bits/dim between images in [-1, 1] and in [0, 256): log2(128)."""

Doubles = npt.NDArray[np.float64]


def encode_patches(engine: Engine, bundle: Bundle, patches: Floats, labels: Integers | None) -> tuple[Floats, Doubles]:
    """Patches [B, N, D] -> (u [B, N, D], log|det du/dx| [B], nats)."""
    x, log_det = patches, np.zeros(len(patches))
    for block in range(bundle.config.blocks):
        x, block_log_det = engine.forward(block, x, labels)
        log_det += block_log_det
    if bundle.prior is None:
        return x, log_det
    u: Floats = (x / np.sqrt(bundle.prior)).astype(np.float32, copy=False)
    return u, log_det - 0.5 * float(np.log(bundle.prior, dtype=np.float64).sum())


def log_prob_of(u: Floats, log_det: Doubles) -> Doubles:
    """Log q [B], nats, of what `encode_patches` returned."""
    square = np.square(u, dtype=np.float64).sum(axis=(1, 2))
    return np.asarray(-0.5 * square - 0.5 * math.log(2.0 * math.pi) * (u[0].size) + log_det)


def score(engine: Engine, bundle: Bundle, patches: Floats, labels: Integers | None) -> Floats:
    """The gradient of log q with respect to the patches, [B, N, D].

    It starts from -u / sqrt(prior) and runs back through the blocks, each of which adds that of its own log|det|.
    The batch is cut into pieces whose activations the engine can keep, which run side by side.
    """
    size = engine.vjp_images()
    if not size:
        return _score_recomputed(engine, bundle, patches, labels)
    count = math.ceil(len(patches) / min(size, math.ceil(len(patches) / engine.workers)))
    pieces = np.array_split(np.arange(len(patches)), count)

    def run(piece: npt.NDArray[np.intp]) -> Floats:
        x, ways_back = patches[piece], []
        for block in range(bundle.config.blocks):
            x, way_back = engine.vjp(block, x, None if labels is None else labels[piece], alone=count == 1)
            ways_back.append(way_back)
        cotangent = _last_cotangent(bundle, x)
        while ways_back:
            cotangent = ways_back.pop()(cotangent)
        return cotangent

    if count == 1:
        return run(pieces[0])
    with ThreadPoolExecutor(min(engine.workers, count), thread_name_prefix="tarflow") as pool:
        return np.concatenate(list(pool.map(run, pieces)))


def _score_recomputed(engine: Engine, bundle: Bundle, patches: Floats, labels: Integers | None) -> Floats:
    """The same where nothing but the blocks' inputs can be kept: each gradient repeats its block's forward pass."""
    x, inputs = patches, []
    for block in range(bundle.config.blocks):
        inputs.append(x)
        x, _ = engine.forward(block, x, labels)
    cotangent = _last_cotangent(bundle, x)
    for block in reversed(range(bundle.config.blocks)):
        cotangent = engine.gradient(block, inputs.pop(), cotangent, labels)
    return cotangent


def _last_cotangent(bundle: Bundle, z: Floats) -> Floats:
    """Derivative of log N(u; 0, 1) with respect to z = u * sqrt(prior): -z / prior."""
    return -z if bundle.prior is None else (-z / bundle.prior).astype(np.float32, copy=False)


def patchify(images: Floats, patch_size: int) -> Floats:
    """Images [B, C, height, width] -> patches [B, N, D], row-major, each patch flattened channel first."""
    batch, channels, height, width = images.shape
    p = patch_size
    tiles = images.reshape(batch, channels, height // p, p, width // p, p).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(tiles).reshape(batch, -1, channels * p * p)


def unpatchify(patches: Floats, channels: int, size: int, patch_size: int) -> Floats:
    """The inverse of `patchify`, for square images."""
    p, across = patch_size, size // patch_size
    tiles = patches.reshape(len(patches), across, across, channels, p, p).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(tiles).reshape(len(patches), channels, size, size)
