"""The PyTorch side of the verification: inputs, float32 outputs, and how far float32 is from float64.

The images are samples of the model itself if sampling is affordable, else smooth random images: far from its training
data, a model amplifies rounding too much for a comparison. Everything else is computed from the images. Blocks are
processed one at a time, so that only one block has a float64 copy.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tarflow_export._errors import ExportError
from tarflow_export._source import bundle_config
from tarflow_export._verify import Extent
from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.measure.verify import Reference, unit_of
from tarflow_runtimes.model.noise import standard_normal
from tarflow_sdk import NULL_LABEL, FlowBlock, Guidance, TarFlow, inverse_block

SEED = 0

TEMPERED = Guidance(weight=1.5, guide="ab", attention_temperature=0.7, anneal=True)
"""Guidance with all its options, at typical strength."""

KINDS: Mapping[str, Guidance | None] = {
    "unguided": None,
    "guided": dataclasses.replace(TEMPERED, attention_temperature=1.0),
    "tempered": TEMPERED,
}
"""The inverses that are compared: one for each variant of the graphs."""

FLOOR_COPIES = 4
"""Copies of each image, one unit in the last place apart, that the floors of inverses are the worst of: rounding is
amplified from patch to patch, and one run of three images shows too little of how far."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The reference, and PyTorch's own float32 error by the name of the comparison it belongs to: the floors."""

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
        with torch.no_grad():
            return _Computation(model, extent).run(on_block or (lambda _: None))
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Blocks:
    """Outputs of all blocks: trajectory [K+1, B, N, D], log_det [K, B], inverses by kind [K, B, P+1, D]."""

    trajectory: Tensor
    log_det: Tensor
    inverses: Mapping[str, Tensor]


class _Computation:
    """Inputs, and the float32 floors as they are found."""

    def __init__(self, model: TarFlow, extent: Extent) -> None:
        self.model = model
        self.config = bundle_config(model.config)
        self.extent = extent
        self.labels = _labels(self.config, extent.images)
        self.copies = FLOOR_COPIES if extent.images > 1 else 1
        self.deviation = model.var.detach().float().sqrt()
        self.floors: dict[str, float] = {}

    def run(self, on_block: Callable[[int], None]) -> Measured:
        config, sigma = self.config, self.config.noise_std
        noise = sample = None
        if self.extent.end_to_end:
            noise = torch.from_numpy(standard_normal(SEED, 0, self.extent.images, config.patches, config.patch_values))
            sample = self._sample(noise)
        x = _smooth_data(self.model, self.extent.images) if sample is None else sample
        blocks = self._blocks(x, on_block)
        u = blocks.trajectory[-1] / self.deviation
        log_prob = self._log_prob(u, blocks.log_det.sum(dim=0))
        if self.extent.floor_blocks == config.blocks:
            self._add_floor("whole model log_prob", log_prob, self._exact_log_prob(x), unit=unit_of(config.dims))
        if self.extent.end_to_end:
            self._add_floor("whole model round_trip", self._decode(u, None), x)
        cotangent = self._cotangents(blocks.trajectory, -u / self.deviation)
        arrays: dict[str, Tensor | None] = {
            "trajectory": blocks.trajectory,
            "log_det": blocks.log_det,
            "cotangent": cotangent,
            **blocks.inverses,
            "guidance": self._guidance(),
            "inverse_temperature": torch.tensor([1.0, 1.0 / TEMPERED.attention_temperature]),
            "log_prob": log_prob,
            "bits_per_dim": _bits_per_dim(log_prob, config) if config.data == "image" else None,
            "noise": noise,
            "sample": sample,
            "denoised": None if sigma is None else x + sigma**2 * cotangent[0],
        }
        for name, tensor in arrays.items():
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ExportError(
                    f"the model's own {name} in PyTorch has values that are not finite: nothing can be compared",
                    hint="check the checkpoint; --no-verify exports it as it is",
                )
        found: dict[str, Any] = {name: _array(tensor) for name, tensor in arrays.items() if tensor is not None}
        if self.labels is not None:
            found["labels"] = self.labels.where(self.labels >= 0, config.classes).numpy()
        return Measured(reference=Reference(**found), floors=self.floors)

    def _blocks(self, x: Tensor, on_block: Callable[[int], None]) -> _Blocks:
        """Run each block forward, and the first steps of its inverse."""
        trajectory, log_dets = [x], []
        inverses: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for k, block in enumerate(self.model.flow_blocks):
            x = trajectory[-1]
            z, log_det = block(x, self.labels)
            trajectory.append(z)
            log_dets.append(log_det)
            double = copy.deepcopy(block).double() if k < self.extent.floor_blocks else None
            if double is not None:
                exact_z, exact_log_det = double(x.double(), self.labels)
                self._add_floor(f"block {k} forward", z, exact_z)
                self._add_floor(f"block {k} log_det", log_det, exact_log_det, unit=unit_of(self.config.dims))
            for kind, guidance in KINDS.items():
                copies = self._inverse(block, self._perturbed(z), guidance)
                inverses[kind].append(copies[: len(z)])
                if double is not None:
                    exact = self._inverse(double, z.double(), guidance)
                    self._add_floor(f"block {k} {kind} inverse", copies, exact)
                    # A window reproduces the result of a sequential run, with at most its error.
                    self.floors[f"block {k} {kind} window"] = self.floors[f"block {k} {kind} inverse"]
            self._add_floor(f"block {k} window", inverses["unguided"][-1], self._first(block, x))
            on_block(k)
        return _Blocks(
            trajectory=torch.stack(trajectory),
            log_det=torch.stack(log_dets),
            inverses={kind: torch.stack(found) for kind, found in inverses.items()},
        )

    def _cotangents(self, trajectory: Tensor, last: Tensor) -> Tensor:
        """The gradient of log q with respect to the input of each block, and `last`: [K+1, B, N, D]."""
        cotangents = [last]
        for block, x in zip(reversed(self.model.flow_blocks), trajectory[:-1].flip(0), strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_()  # noqa: PLW2901
                z, log_det = block(x, self.labels)
                (gradient,) = torch.autograd.grad((cotangents[-1] * z).sum() + log_det.sum(), x)
            cotangents.append(gradient)
        return torch.stack(cotangents[::-1])

    def _first(self, block: FlowBlock, x: Tensor) -> Tensor:
        """The first P+1 patches in block order."""
        return block.in_order(x)[:, : self.extent.steps + 1]

    def _inverse(self, block: FlowBlock, z: Tensor, guidance: Guidance | None) -> Tensor:
        """The first P+1 patches of the inverse of z, in block order: they depend on no later ones."""
        first = block.in_order(self._first(block, z))
        return block.in_order(inverse_block(block, first, self._labels_of(z), guidance))

    def _perturbed(self, z: Tensor) -> Tensor:
        """The images, and copies of them one unit in the last place away."""
        generator = torch.Generator().manual_seed(SEED)
        copies = [z]
        for _ in range(self.copies - 1):
            signs = torch.randint(0, 2, z.shape, generator=generator) * 2 - 1
            copies.append(z * (1.0 + signs * torch.finfo(torch.float32).eps))
        return torch.cat(copies)

    def _labels_of(self, x: Tensor) -> Tensor | None:
        """The labels of the images, repeated for their copies."""
        return None if self.labels is None else self.labels.repeat(len(x) // len(self.labels))

    def _guidance(self) -> Tensor:
        """[2, N]: annealed as over the P+1 patches that are inverted; later columns are not used."""
        weights = TEMPERED.weights(self.extent.steps + 1)
        return F.pad(weights, (0, self.config.patches - weights.shape[1]))

    def _log_prob(self, u: Tensor, log_det: Tensor) -> Tensor:
        log_normal = -0.5 * u.square().sum(dim=(1, 2)) - 0.5 * self.config.dims * math.log(2 * math.pi)
        return log_normal + log_det - self.deviation.to(u).log().sum()

    def _exact_log_prob(self, x: Tensor) -> Tensor:
        """Run the whole model in float64."""
        x, total = x.double(), torch.zeros(len(x), dtype=torch.float64)
        for block in self.model.flow_blocks:
            x, log_det = copy.deepcopy(block).double()(x, self.labels)
            total = total + log_det
        return self._log_prob(x / self.deviation, total)

    def _decode(self, u: Tensor, guidance: Guidance | None) -> Tensor:
        """Latents [B, N, D] -> patches of the image, in the dtype of u."""
        x = u * self.deviation
        for block in reversed(self.model.flow_blocks):
            in_dtype = block if u.dtype == torch.float32 else copy.deepcopy(block).double()
            x = inverse_block(in_dtype, x, self._labels_of(x), guidance)
        return x

    def _sample(self, noise: Tensor) -> Tensor:
        """A guided sample of the whole model."""
        copies = self._decode(self._perturbed(noise), TEMPERED)
        self._add_floor("whole model guided sample", copies, self._decode(noise.double(), TEMPERED))
        return copies[: len(noise)]

    def _add_floor(self, name: str, single: Tensor, exact: Tensor, *, unit: float | None = None) -> None:
        """The largest error; relative to its magnitude from `unit` on where that is given."""
        exact = exact.repeat(len(single) // len(exact), *[1] * (exact.ndim - 1))
        error = (single.double() - exact.double()).abs()
        if unit is not None:
            error = error / exact.double().abs().clamp(min=unit)
        self.floors[name] = float(error.max())


def _smooth_data(model: TarFlow, images: int) -> Tensor:
    """Patches [B, N, D] with the noise of training (0.1 where it is unknown).

    They are those of 4x4 random colours, interpolated; tokens are standard normal ones.
    """
    config, generator = bundle_config(model.config), torch.Generator().manual_seed(SEED)
    if config.image_size is None or config.image_channels is None:
        return torch.randn(images, config.patches, config.patch_values, generator=generator)
    colours = torch.randn(images, config.image_channels, 4, 4, generator=generator) * 0.5
    size = (config.image_size, config.image_size)
    smooth = F.interpolate(colours, size=size, mode="bilinear", align_corners=True).clamp(-1.0, 1.0)
    return model.patchify(smooth + (config.noise_std or 0.1) * torch.randn(smooth.shape, generator=generator))


def _labels(config: ModelConfig, images: int) -> Tensor | None:
    """The last class, the null class, the first class: null labels mixed with others if there are enough images."""
    if not config.classes:
        return None
    return torch.tensor([config.classes - 1, NULL_LABEL, 0][:images])


def _bits_per_dim(log_prob: Tensor, config: ModelConfig) -> Tensor:
    """Of pixels 0 .. 255, a scale 2^7 times as wide as [-1, 1]."""
    return 7.0 - log_prob / (config.dims * math.log(2))


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return tensor.detach().float().contiguous().numpy()
