"""`tune`: measure for each block whether parallel decoding is faster on this machine, and with which window.

No data is needed: the inputs of a block come from drawn noise, decoded sequentially through the blocks before it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from tarflow_runtimes.decode.plan import DEFAULT_TOLERANCE, INITS, BlockReport, Parallel, Plan, Sequential, Strategy
from tarflow_runtimes.decode.tuned import TunedPlan, TunedPlans
from tarflow_runtimes.decode.turn import Floats, Integers, Turn
from tarflow_runtimes.errors import InputError
from tarflow_runtimes.model.arguments import integer
from tarflow_runtimes.model.flow import Flow
from tarflow_runtimes.model.guidance import Guidance, conditions_of, real
from tarflow_runtimes.model.noise import standard_normal
from tarflow_runtimes.model.progress import decode_patches

WINDOWS: Final = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Window sizes to try, below N - 1; the whole block is tried as well."""

MARGIN: Final = 0.93
"""A window must take less than this share of the sequential time: the number of calls differs between draws."""

GIVE_UP: Final = 1.25
"""A run that takes longer than this multiple of the sequential time is ended, and its window no longer tried."""

FINALISTS: Final = 3
"""Windows that are measured on more than the first draw."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockTuned:
    """The result for one block: the strategy, and median seconds of one batch."""

    batch: int
    guidance: float
    block: int
    strategy: Strategy
    seconds: float
    sequential_seconds: float


OnBlock = Callable[[BlockTuned], object]


def tune(
    flow: Flow,
    batches: Sequence[int] = (1, 16),
    guidance: Sequence[float] = (0.0,),
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    draws: int = 3,
    seed: int = 0,
    on_block: OnBlock | None = None,
) -> TunedPlans:
    """Measure every block for these batches, unguided or guided, and return the fastest plans; nothing is written.

    Guided and unguided runs have separate plans; the weight itself matters little. Time: some ten sequential
    decodes of the batches.

    Raises:
        InputError: on arguments out of range.
    """
    if not batches or not guidance:
        raise InputError("nothing to tune: no batch or no guidance given")
    tolerance = real("tolerance", tolerance)
    draws, seed = integer("draws", draws, minimum=1), integer("seed", seed, below=2**64 - draws)
    cases = [
        _Case(flow, integer("batch", batch, minimum=1), real("guidance", weight))
        for weight in guidance
        for batch in batches
    ]
    return TunedPlans(entries=tuple(case.tuned(tolerance, range(seed, seed + draws), on_block) for case in cases))


class _TooSlowError(Exception):
    """A window that cannot win any more."""


class _Case:
    """One batch size and guidance."""

    def __init__(self, flow: Flow, batch: int, weight: float) -> None:
        config = flow.config
        self.flow, self.batch, self.weight = flow, batch, weight
        labels: Integers | None = np.arange(batch) % config.classes if config.classes else None
        guidance = Guidance(weight=weight, attention_temperature=1.0 if config.classes else 0.5)
        self.conditions = conditions_of([guidance] * batch, labels, config)

    def tuned(self, tolerance: float, seeds: range, on_block: OnBlock | None) -> TunedPlan:
        """Measure block after block, then the whole plan against a sequential run."""
        config, prior = self.flow.config, self.flow.bundle.prior_variance
        draws = [standard_normal(seed, 0, self.batch, config.patches, config.patch_values) for seed in seeds]
        xs = [u if prior is None else u * np.sqrt(prior) for u in draws]
        sequential = Plan(blocks=(Sequential(),) * config.blocks)
        strategies = list(sequential.blocks)
        for block in reversed(range(config.blocks)):
            found, xs = self.block(block, tolerance, xs)
            strategies[block] = found.strategy
            if on_block is not None:
                on_block(found)
        plan = Plan(blocks=tuple(strategies))
        taken = [(self.whole(plan, u), self.whole(sequential, u)) for u in draws]
        seconds, sequential_seconds = map(statistics.median, zip(*taken, strict=True))
        return TunedPlan(
            identity=self.flow.identity(),
            batch=self.batch,
            branches=self.conditions.branches,
            plan=plan if seconds <= sequential_seconds else sequential,
            seconds=min(seconds, sequential_seconds),
            sequential_seconds=sequential_seconds,
        )

    def block(self, block: int, tolerance: float, xs: list[Floats]) -> tuple[BlockTuned, list[Floats]]:
        """The fastest strategy of a block, measured on its inputs of every draw, and its outputs."""
        self.run(block, Sequential(), xs[0])  # opens the session
        taken: dict[Strategy, list[float]] = {window: [] for window in self.windows(block, tolerance, xs[0][:1])}
        sequential, outputs = [], []
        for draw, x in enumerate(xs):
            seconds, output, _ = self.run(block, Sequential(), x)
            sequential.append(seconds)
            outputs.append(output)
            for window in list(taken):
                try:
                    taken[window].append(self.run(block, window, x, GIVE_UP * seconds)[0])
                except _TooSlowError:
                    del taken[window]
            if draw == 0:
                taken = dict(sorted(taken.items(), key=lambda item: item[1])[:FINALISTS])

        def ratio(strategy: Strategy) -> float:
            return statistics.median(a / b for a, b in zip(taken[strategy], sequential, strict=True))

        taken = {window: seconds for window, seconds in taken.items() if ratio(window) < MARGIN}
        taken[Sequential()] = sequential
        best = min(taken, key=ratio)
        found = BlockTuned(
            batch=self.batch,
            guidance=self.weight,
            block=block,
            strategy=best,
            seconds=statistics.median(taken[best]),
            sequential_seconds=statistics.median(sequential),
        )
        return found, outputs

    def windows(self, block: int, tolerance: float, x: Floats) -> list[Parallel]:
        """What is tried: every size, from the start with which the whole block takes fewer calls."""
        sizes = [0, *(size for size in reversed(WINDOWS) if size < self.flow.config.patches - 1)]
        wholes = [Parallel(tolerance=tolerance, init=init) for init in INITS]
        best = min(wholes, key=lambda whole: self.run(block, whole, x)[2].calls)
        return [dataclasses.replace(best, window=size) for size in sizes]

    def run(
        self, block: int, strategy: Strategy, x: Floats, limit: float = math.inf
    ) -> tuple[float, Floats, BlockReport]:
        """Seconds and results of a block on the first images of the batch; _TooSlowError beyond the limit."""
        started = time.perf_counter()

        def on_step(_turn: int, _done: int) -> None:
            if time.perf_counter() - started > limit:
                raise _TooSlowError

        given = self.conditions.of(slice(0, len(x)))
        output, (report,) = self.flow.engine.invert([Turn(block=block, strategy=strategy)], x, given, on_step)
        return time.perf_counter() - started, output, report

    def whole(self, plan: Plan, noise: Floats) -> float:
        """Seconds of a whole decode."""
        started = time.perf_counter()
        decode_patches(self.flow.engine, self.flow.bundle, noise, self.conditions, plan=plan)
        return time.perf_counter() - started
