"""`Effect`: what other weights do to the images and to their density, against the weights as the bundle stores them.

Both draw from the same noise, without guidance and without the denoiser. The density is that of the stored model for
both: rounding that takes images away from what the model deems likely raises their bits/dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from tarflow_runtimes._errors import VerificationError
from tarflow_runtimes._flow import Flow
from tarflow_runtimes._sampler import Step

IMAGES: Final = 16
SEED: Final = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """One number per image of each measure.

    `psnr`: 10 log10(4 / mean squared difference), dB, as images span 2; infinite for equal images.
    `max_difference`: of a value in -1 .. 1; `bits_per_dim` and `stored_bits_per_dim`: of the two images.
    """

    labels: Sequence[int] | None
    psnr: Sequence[float]
    max_difference: Sequence[float]
    bits_per_dim: Sequence[float]
    stored_bits_per_dim: Sequence[float]

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and worst image by measure; the highest bits/dim is the worst."""
        rest = ("max_difference", "bits_per_dim", "stored_bits_per_dim")
        summary = {name: (float(np.mean(getattr(self, name))), max(getattr(self, name))) for name in rest}
        return {"psnr": (float(np.mean(self.psnr)), min(self.psnr))} | summary

    def to_json(self) -> dict[str, Any]:
        """All numbers, and what they were measured on, as JSON values."""
        summary = {name: {"mean": mean, "worst": worst} for name, (mean, worst) in self.summary().items()}
        return {"images": len(self.psnr), "seed": SEED, "summary": summary, "each": dataclasses.asdict(self)}


def measure_effect(stored: Flow, changed: Flow, *, on_step: Callable[[int, int], None] | None = None) -> Effect:
    """Draw IMAGES images from the noise of SEED with both, the classes in turn; `on_step` hears steps done and total.

    Raises:
        VerificationError: when the images of one are not finite.
    """
    labels = [i % stored.config.classes for i in range(IMAGES)] if stored.config.classes else None
    images = []
    for turn, flow in enumerate((stored, changed)):

        def tell(step: Step, turn: int = turn) -> None:
            if on_step is not None:
                on_step(turn * step.total + step.step, 2 * step.total)

        drawn = flow.sample(IMAGES, labels=labels, seed=SEED, denoise=False, on_step=tell).images
        if not np.isfinite(drawn).all():
            weights = flow.engine_report["weights"]
            raise VerificationError(
                f"images drawn with {weights} weights hold values that are not finite",
                hint="the model overflows; use another checkpoint" if flow is stored else "use the weights as stored",
            )
        images.append(drawn)
    difference = np.abs(images[1].astype(np.float64) - images[0]).reshape(IMAGES, -1)
    squares = np.square(difference).mean(axis=1)
    return Effect(
        labels=labels,
        psnr=[10 * math.log10(4 / square) if square else math.inf for square in squares],
        max_difference=difference.max(axis=1).tolist(),
        bits_per_dim=stored.bits_per_dim(images[1], labels).tolist(),
        stored_bits_per_dim=stored.bits_per_dim(images[0], labels).tolist(),
    )
