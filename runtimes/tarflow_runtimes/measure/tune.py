"""`tune`: measure for each block whether parallel decoding is faster on this machine, and with which window.

No data is needed: the inputs of a block come from drawn noise, decoded sequentially through the blocks before it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from tarflow_runtimes.decode.plan import DEFAULT_TOLERANCE, INITS, BlockReport, Parallel, Plan, Sequential, Strategy
from tarflow_runtimes.decode.tuned import TunedPlan, TunedPlans
from tarflow_runtimes.decode.turn import Floats, Integers, OnTurn, Turn
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
"""A first run that exceeds this multiple of the sequential time is stopped."""

FINALISTS: Final = 3
"""Number of candidates that are measured on all noise samples."""


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
    entries = []
    for weight in guidance:
        for batch in batches:
            job = _Job(flow, integer("batch", batch, minimum=1), real("guidance", weight), tolerance, draws, seed)
            entries.append(job.tuned(on_block))
    return TunedPlans(entries=tuple(entries))


class _TooSlowError(Exception):
    """Raised for a candidate that is too slow to win."""


class _Job:
    """One batch size and guidance: some noise samples, decoded sequentially through the blocks."""

    def __init__(  # noqa: PLR0917 - private
        self, flow: Flow, batch: int, weight: float, tolerance: float, draws: int, seed: int
    ) -> None:
        config = flow.config
        self.flow, self.batch, self.weight, self.tolerance = flow, batch, weight, tolerance
        labels: Integers | None = np.arange(batch) % config.classes if config.classes else None
        guidance = Guidance(weight=weight, attention_temperature=1.0 if config.classes else 0.5)
        self.conditions = conditions_of([guidance] * batch, labels, config)
        self.noise = [
            standard_normal(seed + draw, 0, batch, config.patches, config.patch_values) for draw in range(draws)
        ]

    def tuned(self, on_block: OnBlock | None) -> TunedPlan:
        """Measure block after block, then the whole plan against a sequential run."""
        config, prior = self.flow.config, self.flow.bundle.prior_variance
        xs = [u if prior is None else u * np.sqrt(prior) for u in self.noise]
        strategies: list[Strategy] = [Sequential()] * config.blocks
        for block in reversed(range(config.blocks)):
            found, xs = self._block(block, xs)
            strategies[block] = found.strategy
            if on_block is not None:
                on_block(found)
        plan = Plan(blocks=tuple(strategies))
        seconds, sequential_seconds = self._whole(plan)
        if seconds > sequential_seconds:
            plan, seconds = Plan(blocks=(Sequential(),) * config.blocks), sequential_seconds
        return TunedPlan(
            identity=self.flow.identity(),
            batch=self.batch,
            branches=self.conditions.branches,
            plan=plan,
            seconds=seconds,
            sequential_seconds=sequential_seconds,
        )

    def _block(self, block: int, xs: list[Floats]) -> tuple[BlockTuned, list[Floats]]:
        """The fastest strategy of a block, and its outputs."""
        self._sequential(block, xs[0])  # opens the session
        seconds, output = self._sequential(block, xs[0])
        sequential, outputs = [seconds], [output]
        times = {one: [taken] for one, taken in self._candidates(block, xs[0], seconds)[:FINALISTS]}
        for x in xs[1:]:
            seconds, output = self._sequential(block, x)
            sequential.append(seconds)
            outputs.append(output)
            for candidate, taken in times.items():
                taken.append(self._parallel(block, x, candidate))
        ratios = {
            one: statistics.median(a / b for a, b in zip(taken, sequential, strict=True))
            for one, taken in times.items()
        }
        best = min(ratios, key=lambda one: ratios[one], default=None)
        if best is not None and ratios[best] >= MARGIN:
            best = None
        found = BlockTuned(
            batch=self.batch,
            guidance=self.weight,
            block=block,
            strategy=best or Sequential(),
            seconds=statistics.median(times[best] if best else sequential),
            sequential_seconds=statistics.median(sequential),
        )
        return found, outputs

    def _candidates(self, block: int, x: Floats, sequential: float) -> list[tuple[Parallel, float]]:
        """Windows that were not much slower on one draw, fastest first; the start is chosen on the whole block."""
        whole = self.flow.config.patches - 1
        sizes = [0, *(size for size in reversed(WINDOWS) if size < whole)]
        starts = {init: self._calls(block, x[:1], Parallel(tolerance=self.tolerance, init=init)) for init in INITS}
        init = min(starts, key=lambda one: starts[one])
        found: list[tuple[Parallel, float]] = []
        limit = GIVE_UP * sequential
        for size in sizes:
            candidate = Parallel(window=size, tolerance=self.tolerance, init=init)
            try:
                found.append((candidate, self._parallel(block, x, candidate, limit)))
            except _TooSlowError:
                continue
        return sorted(found, key=lambda pair: pair[1])

    def _sequential(self, block: int, x: Floats) -> tuple[float, Floats]:
        started = time.perf_counter()
        output, _ = self._invert(Turn(block=block, strategy=Sequential()), x)
        return time.perf_counter() - started, output

    def _parallel(self, block: int, x: Floats, strategy: Parallel, limit: float | None = None) -> float:
        """Seconds of one run; _TooSlowError when they exceed the limit."""
        started = time.perf_counter()

        def on_step(_turn: int, _done: int) -> None:
            if limit is not None and time.perf_counter() - started > limit:
                raise _TooSlowError

        self._invert(Turn(block=block, strategy=strategy), x, on_step)
        return time.perf_counter() - started

    def _calls(self, block: int, x: Floats, strategy: Parallel) -> float:
        """Calls of the block for one image; this also opens the session."""
        _, report = self._invert(Turn(block=block, strategy=strategy), x)
        return float(report.calls[0])

    def _invert(self, turn: Turn, x: Floats, on_step: OnTurn | None = None) -> tuple[Floats, BlockReport]:
        """Invert one block for the first images of the batch, as many as x has."""
        given = self.conditions.of(slice(0, len(x)))
        output, (report,) = self.flow.engine.invert([turn], x, given, on_step)
        return output, report

    def _whole(self, plan: Plan) -> tuple[float, float]:
        """Median seconds of whole decodes by the plan and sequentially, in turn."""
        taken: dict[bool, list[float]] = {True: [], False: []}
        for noise in self.noise:
            for planned in (True, False):
                started = time.perf_counter()
                given = (self.flow.engine, self.flow.bundle, noise, self.conditions)
                decode_patches(*given, plan=plan if planned else None)
                taken[planned].append(time.perf_counter() - started)
        return statistics.median(taken[True]), statistics.median(taken[False])
