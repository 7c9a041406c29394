"""`Turn`, a request to invert one block, and `Conditions`, what each image is conditioned on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.decode.plan import Strategy

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Turn:
    """A request to invert one block.

    `steps` limits a sequential inverse to that many of its N - 1 steps, and a parallel one to that many evaluations;
    unfinished patches then hold their initial guess. `start` [B, N, D] is the initial guess of a parallel inverse,
    which replaces that of its strategy.
    """

    block: int
    strategy: Strategy
    steps: int | None = None
    start: Floats | None = None


OnTurn = Callable[[int, int], object]
"""Called with the number of a turn, from 0, and how many of its steps are done; an error it raises ends the run."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Conditions:
    """What each image of a run is conditioned on.

    `labels` int64 [G, B], None for models without classes; `guidance` [B, 2, N], g for a and for b at each block
    position; `inverse_temperature` [G, B], 1/tau of the attention logits. The second branch is the unguided one.
    """

    labels: Integers | None
    guidance: Floats
    inverse_temperature: Floats

    @property
    def branches(self) -> int:
        """G: 2 where any image is guided, else 1."""
        return len(self.inverse_temperature)

    def of(self, images: slice | npt.NDArray[np.intp], branches: int | None = None) -> Conditions:
        """The conditions of some images, for the first `branches` branches."""
        return Conditions(
            labels=None if self.labels is None else self.labels[:branches, images],
            guidance=self.guidance[images],
            inverse_temperature=self.inverse_temperature[:branches, images],
        )
