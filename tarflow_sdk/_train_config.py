"""`TrainConfig`: how a model is trained, as JSON-only fields, and the learning rate that follows from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from tarflow_sdk._data import AUGMENTATIONS
from tarflow_sdk._errors import ConfigError

FINAL_LEARNING_RATE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train, apart from the model and the data; `batch_size` counts all processes together.

    The learning rate rises linearly over the first epoch and falls by cosine to 1e-6. `ema_decay` is the decay of the
    averaged weights, which are the ones that are evaluated and saved. `precision` bfloat16 is autocast.

    Raises:
        ConfigError: on a value out of range.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    augment: str = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    evaluate_every: int = 5
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        if not 0.0 < self.learning_rate < 1.0:
            raise ConfigError(f"learning_rate must be in (0, 1), got {self.learning_rate}")
        for name in ("label_dropout", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.clip_norm > 0.0 or not self.weight_decay >= 0.0:
            raise ConfigError("clip_norm must be positive and weight_decay at least 0")
        if self.augment not in AUGMENTATIONS:
            raise ConfigError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {self.augment!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision must be float32 or bfloat16, got {self.precision!r}")


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then cosine to `FINAL_LEARNING_RATE` at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    fraction = (step - warmup) / max(1, steps - warmup)
    return FINAL_LEARNING_RATE + 0.5 * (peak - FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * fraction))
