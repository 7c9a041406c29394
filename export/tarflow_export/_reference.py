"""`Extent` and the PyTorch side of the verification: inputs, float32 outputs, and how far float32 is from float64.

The images are smooth random ones with the noise of training on them, near enough to pictures for a trained model to
behave; everything else follows from them. Blocks are taken one at a time, so that the float64 copies are of one block.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tarflow_export._errors import ExportError
from tarflow_export._weights import WeightLayout
from tarflow_runtimes._noise import standard_normal
from tarflow_runtimes._verify import Reference
from tarflow_sdk._config import FlowConfig
from tarflow_sdk._inverse import Guidance, inverse_block
from tarflow_sdk._likelihood import PIXEL_SCALE_BITS
from tarflow_sdk._model import NULL_LABEL, FlowBlock, TarFlow

SEED = 0

GUIDANCE = Guidance(weight=1.5, guide="ab", attention_temperature=0.7, anneal=True)
"""Everything that guidance can do, at usual strength."""

STEP_BUDGET = 10**10
"""Weights read by the sequential steps of one pass over all blocks, which is what bounds their time."""

PASS_BUDGET = 10**10
"""Multiply-adds of one pass of one image through all blocks beyond which one image has to do."""

MIN_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much is verified: `images` (B), `steps` of each block's inverse (P), and whether whole samples are drawn."""

    images: int
    steps: int
    end_to_end: bool

    @property
    def threads(self) -> int | None:
        """1 where operators are so small that waiting for other threads costs more; None is the library's choice."""
        return 1 if self.images > 1 else None

    def to_json(self) -> dict[str, Any]:
        """The fields and the rule that gave them."""
        rule = (
            f"images: 3, or 1 where a pass through the model takes more than {PASS_BUDGET:.0e} multiply-adds; "
            f"steps: as many as read {STEP_BUDGET:.0e} weights over all blocks, at least {MIN_STEPS}, at most N - 1; "
            "end_to_end: where all N - 1 steps are taken"
        )
        return {**dataclasses.asdict(self), "rule": rule}


def extent_of(config: FlowConfig, layout: WeightLayout) -> Extent:
    """The extent that a model's size allows: minutes for the largest, everything for small ones."""
    block_weights = sum(math.prod(entry.shape) for name, entry in layout.entries.items() if not name.endswith("_embed"))
    attention = 2 * config.patches**2 * config.width * config.layers
    one_pass = config.blocks * (config.patches * block_weights + attention)
    affordable = max(MIN_STEPS, STEP_BUDGET // (config.blocks * block_weights))
    steps = min(config.patches - 1, affordable)
    return Extent(images=3 if one_pass <= PASS_BUDGET else 1, steps=steps, end_to_end=steps == config.patches - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The reference and the float32 floors: PyTorch's own float32 error against float64, per stage."""

    reference: Reference
    floors: dict[str, float]


def compute_reference(model: TarFlow, extent: Extent, on_block: Callable[[int], None] | None = None) -> Measured:
    """Run the model in float32 and, for the floors, in float64.

    Raises:
        ExportError: when the model's own outputs are not finite.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(extent.threads or before)
    try:
        return _Reference(model, extent).run(on_block or (lambda _: None))
    finally:
        torch.set_num_threads(before)


class _Floors:
    """The largest float32 error of each stage so far."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, stage: str, single: Tensor, double: Tensor, *, scaled: bool = False) -> None:
        error = (single.double() - double.double()).abs()
        if scaled:
            error = error / double.abs().clamp(min=1.0)
        self.values[stage] = max(self.values.get(stage, 0.0), float(error.max()))


class _Reference:
    def __init__(self, model: TarFlow, extent: Extent) -> None:
        self.model = model
        self.config = model.config
        self.extent = extent
        self.floors = _Floors()
        self.images = _images(self.config, extent.images)
        self.labels = _labels(self.config, extent.images)
        self.deviation = model.var.detach().float().sqrt()

    def run(self, on_block: Callable[[int], None]) -> Measured:
        blocks, config = self.model.flow_blocks, self.config
        trajectory, log_dets, exact_log_dets = [self.model.patchify(self.images)], [], []
        unguided, guided = [], []
        for k, block in enumerate(blocks):
            x = trajectory[-1]
            double = copy.deepcopy(block).double()
            with torch.no_grad():
                z, log_det = block(x, self.labels)
                exact_z, exact_log_det = double(x.double(), self.labels)
            self.floors.add("forward", z, exact_z)
            self.floors.add("log_det", log_det, exact_log_det, scaled=True)
            trajectory.append(z)
            log_dets.append(log_det)
            exact_log_dets.append(exact_log_det)
            unguided.append(self._inverse(block, double, z, None))
            guided.append(self._inverse(block, double, z, GUIDANCE))
            self.floors.add("window", unguided[-1], self._first(block, x))
            del double
            on_block(k)
        u = trajectory[-1] / self.deviation
        cotangents = [-u / self.deviation]
        for block, x in zip(reversed(blocks), reversed(trajectory[:-1]), strict=True):
            cotangents.insert(0, _vector_jacobian(block, x, cotangents[0], self.labels))
        log_prob = self._log_prob(u, torch.stack(log_dets))
        exact_log_prob = self._log_prob(u.double(), torch.stack(exact_log_dets))
        bits, exact_bits = (
            PIXEL_SCALE_BITS - value / (config.dims * math.log(2)) for value in (log_prob, exact_log_prob)
        )
        self.floors.add("log_prob", log_prob, exact_log_prob, scaled=True)
        self.floors.add("bits_per_dim", bits, exact_bits)
        noise, sample = self._sample() if self.extent.end_to_end else (None, None)
        sigma = config.noise_std
        reference = Reference(
            trajectory=_array(torch.stack(trajectory)),
            log_det=_array(torch.stack(log_dets)),
            cotangent=_array(torch.stack(cotangents)),
            unguided=_array(torch.stack(unguided)),
            guided=_array(torch.stack(guided)),
            guidance=self._guidance(),
            inverse_temperature=np.array([1.0, 1.0 / GUIDANCE.attention_temperature], np.float32),
            log_prob=_array(log_prob),
            bits_per_dim=_array(bits),
            labels=None
            if self.labels is None
            else np.where(self.labels < 0, config.classes, self.labels).astype(np.int64),
            noise=noise,
            sample=sample,
            denoised=None if sigma is None else _array(trajectory[0] + sigma**2 * cotangents[0]),
        )
        for field in dataclasses.fields(reference):
            array = getattr(reference, field.name)
            if array is not None and not np.isfinite(array).all():
                raise ExportError(
                    f"the model's own {field.name} in PyTorch has values that are not finite: nothing can be compared",
                    hint="check the checkpoint; --no-verify exports it as it is",
                )
        return Measured(reference=reference, floors=self.floors.values)

    def _first(self, block: FlowBlock, x: Tensor) -> Tensor:
        """The first P+1 patches in block order."""
        return block.in_order(x)[:, : self.extent.steps + 1]

    def _inverse(self, block: FlowBlock, double: FlowBlock, z: Tensor, guidance: Guidance | None) -> Tensor:
        """The first P+1 patches of the inverse of z, in block order: they depend on no later ones."""
        first = block.in_order(self._first(block, z))
        x = inverse_block(block, first, self.labels, guidance)
        self.floors.add("inverse", x, inverse_block(double, first.double(), self.labels, guidance))
        return block.in_order(x)

    def _guidance(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[2, N]: annealed as over the P+1 patches that are inverted; later columns are not used."""
        weights = GUIDANCE.weights(self.extent.steps + 1)
        return _array(F.pad(weights, (0, self.config.patches - weights.shape[1])))

    def _log_prob(self, u: Tensor, log_dets: Tensor) -> Tensor:
        log_normal = -0.5 * u.square().sum(dim=(1, 2)) - 0.5 * self.config.dims * math.log(2 * math.pi)
        return log_normal + log_dets.sum(dim=0) - self.deviation.to(u).log().sum()

    def _sample(self) -> tuple[Any, Any]:
        """Noise and the whole model's guided sample of it."""
        config = self.config
        noise = standard_normal(SEED, 0, self.extent.images, config.patches, config.patch_values)
        x = torch.from_numpy(noise) * self.deviation
        exact = x.double()
        for block in reversed(self.model.flow_blocks):
            x = inverse_block(block, x, self.labels, GUIDANCE)
            exact = inverse_block(copy.deepcopy(block).double(), exact, self.labels, GUIDANCE)
        self.floors.add("sample", x, exact)
        return noise, _array(x)


def _vector_jacobian(block: FlowBlock, x: Tensor, cotangent: Tensor, labels: Tensor | None) -> Tensor:
    """Gradient of (cotangent . z + log|det|) with respect to x, by automatic differentiation."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z, log_det = block(x, labels)
        (gradient,) = torch.autograd.grad((cotangent * z).sum() + log_det.sum(), x)
    return gradient


def _images(config: FlowConfig, images: int) -> Tensor:
    """[B, C, size, size]: 4x4 random colours, interpolated, with the noise of training (0.1 where it is unknown)."""
    generator = torch.Generator().manual_seed(SEED)
    colours = torch.randn(images, config.image_channels, 4, 4, generator=generator) * 0.5
    size = (config.image_size, config.image_size)
    smooth = F.interpolate(colours, size=size, mode="bilinear", align_corners=True).clamp(-1.0, 1.0)
    return smooth + (config.noise_std or 0.1) * torch.randn(smooth.shape, generator=generator)


def _labels(config: FlowConfig, images: int) -> Tensor | None:
    """The last class, the null class, the first class: null labels mixed with others where there is room."""
    if not config.classes:
        return None
    return torch.tensor([config.classes - 1, NULL_LABEL, 0][:images])


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return tensor.detach().float().contiguous().numpy()
