"""The sampler: latents to patches, block by block from the last to the first, on any engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.decode.plan import DecodeReport, Plan, Sequential
from tarflow_runtimes.decode.turn import Conditions, Floats, Turn
from tarflow_runtimes.engines.api import Engine
from tarflow_runtimes.errors import Cancelled


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Progress of a call: `step` of `total` steps are done, the last in flow block `block` (K-1 first, 0 last)."""

    block: int
    step: int
    total: int


OnStep = Callable[[Step], object]
"""Called in the caller's thread as steps finish, possibly several at a time; returning False cancels."""


def decode_patches(  # noqa: PLR0917 - mathematics, called with names where it helps
    engine: Engine,
    bundle: Bundle,
    u: Floats,
    conditions: Conditions,
    on_done: Callable[[int, int], None] | None = None,
    plan: Plan | None = None,
) -> tuple[Floats, DecodeReport]:
    """Standard normal latents u [B, N, D] -> patches [B, N, D], and a report for each block.

    `on_done(block, steps)` is called with the number of the K * (N - 1) steps that are done; an exception that it
    raises ends the run. Without a plan every block is sequential.
    """
    config = bundle.config
    x = u if bundle.prior_variance is None else u * np.sqrt(bundle.prior_variance)
    steps = config.patches - 1
    strategies = (Sequential(),) * config.blocks if plan is None else plan.blocks
    turns = [Turn(block=block, strategy=strategies[block]) for block in reversed(range(config.blocks))]

    def on_step(turn: int, done: int) -> None:
        if on_done is not None:
            on_done(turns[turn].block, turn * steps + done)

    x, reports = engine.invert(turns, x, conditions, None if on_done is None else on_step)
    overflowed = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2)))
    return x, DecodeReport(blocks=reports, non_finite=tuple(map(int, overflowed)))


def progress(on_step: OnStep | None, *, chunk: int, chunks: int, steps: int) -> Callable[[int, int], None] | None:
    """The `on_done` callback for one chunk of a call: reports progress over all chunks, and cancels.

    Raises:
        Cancelled: from the returned function, when `on_step` returns False.
    """
    if on_step is None:
        return None

    def on_done(block: int, done: int) -> None:
        if on_step(Step(block=block, step=chunk * steps + done, total=chunks * steps)) is False:
            raise Cancelled("cancelled by on_step")

    return on_done
