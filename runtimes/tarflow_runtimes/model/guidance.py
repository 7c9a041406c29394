"""`Guidance` moves an image away from the null class; `conditions_of` converts it to the arrays that engines take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.decode.turn import Conditions, Floats, Integers
from tarflow_runtimes.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Guidance of an image's inverse: a += g_i (a - a_u) and b += g_i (b - b_u) at each patch i.

    (a_u, b_u) come from the null class with attention logits divided by `attention_temperature`. g_i = `weight`, or
    weight * (i + 1) / (N - 1) with `anneal`; `guide` selects "a", "b" or both, "ab". Weight 0 means no guidance. Models
    without classes can be guided by a temperature other than 1.

    Raises:
        InputError: on a value out of range.

    Source: Zhai et al. 2024 (arXiv 2412.06329), section 2.6.

    >>> Guidance(weight=2.0, anneal=True).weights(5)[0]
    array([0.5, 1. , 1.5, 2. , 2.5], dtype=float32)
    """

    weight: float = 0.0
    guide: str = "ab"
    attention_temperature: float = 1.0
    anneal: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", real("guidance", self.weight))
        temperature = real("attention_temperature", self.attention_temperature, positive=True)
        object.__setattr__(self, "attention_temperature", temperature)
        if self.guide not in ("a", "b", "ab"):
            raise InputError(f"guide must be 'a', 'b' or 'ab', got {self.guide!r}")
        if not isinstance(self.anneal, bool | np.bool_):
            raise InputError(f"anneal must be true or false, got {self.anneal!r}")

    @property
    def inverse_temperature(self) -> float:
        """1/tau of the second branch; 1 without a second branch."""
        return 1.0 / self.attention_temperature if self.weight > 0.0 else 1.0

    def weights(self, patches: int) -> Floats:
        """The weights g for a and for b, float32 [2, N]; column i belongs to the step that yields patch i + 1."""
        g = np.full(patches, self.weight)
        if self.anneal:
            g = g * np.arange(1, patches + 1) / (patches - 1)
        return np.stack([g * ("a" in self.guide), g * ("b" in self.guide)]).astype(np.float32)


def branches_of(guidance: Sequence[Guidance]) -> int:
    """G: 2 where any image is guided, else 1."""
    return 2 if any(one.weight > 0.0 for one in guidance) else 1


def conditions_of(guidance: Sequence[Guidance], labels: Integers | None, config: ModelConfig) -> Conditions:
    """The conditions of images, for engines: `guidance` and `labels` [B] have one entry per image, null = classes."""
    branches = branches_of(guidance)
    weights = {one: one.weights(config.patches) for one in set(guidance)}
    temperatures = np.ones((branches, len(guidance)), np.float32)
    temperatures[1:] = [one.inverse_temperature for one in guidance]
    if labels is not None:
        labels = np.stack([labels, np.full_like(labels, config.classes)][:branches])
    return Conditions(
        labels=labels,
        guidance=np.stack([weights[one] for one in guidance]),
        inverse_temperature=temperatures,
    )


def real(name: str, value: Any, *, positive: bool = False) -> float:
    """`value` as a finite float >= 0, or > 0 when `positive`.

    Raises:
        InputError: when it is not.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number) or number < 0.0 or (positive and number == 0.0):
        raise InputError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value!r}")
    return number
