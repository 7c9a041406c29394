"""`Turn` and `Conditions`: what an inverse is asked for, block by block, and what each image is conditioned on."""

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
    """One block's turn in a run.

    `steps` ends a sequential one after so many of its N - 1 steps, and a parallel one after so many evaluations; the
    patches that are not finished then hold what they were iterated from. `start` [B, N, D] is what a parallel one
    iterates from, in place of what its strategy says.
    """

    block: int
    strategy: Strategy
    steps: int | None = None
    start: Floats | None = None


OnTurn = Callable[[int, int], object]
"""Called with the number of a turn, from 0, and how many of its steps are done; an error it raises ends the run."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Conditions:
    """What the images of a run are conditioned on, each by itself.

    `labels` int64 [G, B], None on models without classes; `guidance` [B, 2, N], g for a and for b at each block
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
        """Those of some images, of the first `branches`."""
        return Conditions(
            labels=None if self.labels is None else self.labels[:branches, images],
            guidance=self.guidance[images],
            inverse_temperature=self.inverse_temperature[:branches, images],
        )
