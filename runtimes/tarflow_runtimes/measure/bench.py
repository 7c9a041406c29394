"""`bench`: decoding times on this machine, for combinations of engine, guidance weight, batch and decoding strategy.

Loading, the first image and the steady state are measured separately. Cases are timed in rounds, each case once per
round and every round with new noise, so that temporary slowdowns of the machine affect all cases alike; ratios are
medians over the rounds.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.decode.plan import DEFAULT_TOLERANCE, BlockReport, Parallel, Sequential, strategy_json
from tarflow_runtimes.errors import DecodeWarning, InputError
from tarflow_runtimes.measure.bench_machine import machine_header, model_header, peak_bytes, resident_bytes
from tarflow_runtimes.measure.bench_results import (
    BenchResult,
    BlockResult,
    Case,
    CaseResult,
    EngineResult,
    Memory,
    sequential_work,
)
from tarflow_runtimes.measure.ceilings import measure_ceilings
from tarflow_runtimes.model.arguments import integer
from tarflow_runtimes.model.flow import Flow, load
from tarflow_runtimes.model.guidance import Guidance, real
from tarflow_runtimes.model.noise import standard_normal
from tarflow_runtimes.model.progress import OnStep, Step
from tarflow_runtimes.model.sample import Sample

PROFILES: Final = 3
"""Calls per case in which every step and block is timed; they are separate from the rounds, as clocks cost time."""

TEMPERATURE: Final = 0.5
"""Attention temperature of guided runs of models without classes, which are guided only by temperature."""

WEIGHT_BYTES: Final = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0 + 4 / 128}
"""Bytes per weight, by precision of the bundle: int8 has a float32 scale for every 128 weights."""

DECODES: Final = ("sequential", "parallel", "auto")

OnProgress = Callable[[int, int], object]
"""Called with the number of calls done and their total; an exception that it raises ends the benchmark."""


def bench(
    bundle: Path | None = None,
    *,
    engines: Sequence[str] = ("cpu",),
    options: Mapping[str, Any] | None = None,
    batches: Sequence[int] = (1, 16),
    decodes: Sequence[str] = ("sequential", "auto"),
    guidance: Sequence[float] = (0.0,),
    tolerance: float | None = None,
    rounds: int = 7,
    seed: int = 0,
    ceilings: bool = True,
    on_progress: OnProgress | None = None,
) -> BenchResult:
    """Measure every combination of the lists; nothing is written. `options` are further arguments of `load`.

    Raises:
        BundleError: when the bundle is missing, damaged, unsafe or of another version.
        EngineError: when an engine is unknown or not installed.
        InputError: on an argument out of range.
    """
    for decode in decodes:
        parallel_of(decode, tolerance)
    cases = [
        Case(
            engine=engine,
            guidance=real("guidance", weight),
            batch=integer("batch", batch, minimum=1),
            decode=decode,
        )
        for engine, weight, batch, decode in itertools.product(engines, guidance, batches, decodes)
    ]
    rounds = integer("rounds", rounds, minimum=1)
    seed = integer("seed", seed, below=2**64)
    if not cases:
        raise InputError("nothing to measure: a list of engines, batches, decodes or guidance weights is empty")
    total = len(cases) * (1 + PROFILES + rounds)
    done = itertools.count(1)

    def tick() -> None:
        if on_progress is not None:
            on_progress(next(done), total)

    found = measure_ceilings() if ceilings else None
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", DecodeWarning)  # reported as `non_finite` and `sequential_images` instead
        start = resident_bytes()
        flows, firsts = {}, {}
        for case in cases:
            if case.engine not in flows:
                began = time.perf_counter()
                flows[case.engine] = stack.enter_context(load(bundle, engine=case.engine, **(options or {})))
                loaded = time.perf_counter() - began
                seconds, _ = _Runner(flows[case.engine], case, tolerance, seed).draw(0, images=1)
                firsts[case.engine] = (1e3 * loaded, 1e3 * seconds)
        ready = resident_bytes()
        runners = [_Runner(flows[case.engine], case, tolerance, seed) for case in cases]
        for runner in runners:
            runner.warm_up(tick)
        for number in range(rounds):
            _round(runners, number, tick)
        opened = tuple(
            EngineResult(
                engine=engine,
                load_ms=firsts[engine][0],
                first_image_ms=firsts[engine][1],
                plans=flow.tuned_plans().reason if "auto" in decodes else "",
                report=dict(flow.engine_report),
            )
            for engine, flow in flows.items()
        )
        model = runners[0].flow.bundle
    return BenchResult(
        header={
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **machine_header(),
            **model_header(model),
            "rounds": rounds,
            "seed": seed,
            "tolerance": tolerance,
        },
        ceilings=found,
        memory=Memory(
            weights=sum(block.weights.stat().st_size for block in model.blocks),
            start=start,
            ready=ready,
            peak=peak_bytes(),
        ),
        engines=opened,
        cases=tuple(runner.result() for runner in runners),
    )


def parallel_of(decode: str, tolerance: float | None) -> Parallel | None:
    """The strategy that `parallel` or `parallel:WINDOW` names; None for `sequential` and `auto`.

    Raises:
        InputError: on another word, or a value out of range.
    """
    name, colon, window = decode.partition(":")
    if name not in DECODES or (colon and (name != "parallel" or not window.isdecimal() or int(window) < 1)):
        raise InputError(
            f"unknown way of decoding {decode!r}", hint=f"valid are {', '.join(DECODES)} and parallel:WINDOW"
        )
    move = DEFAULT_TOLERANCE if tolerance is None else real("tolerance", tolerance)
    return Parallel(window=int(window or 0), tolerance=move) if name == "parallel" else None


def _round(runners: Sequence[_Runner], number: int, tick: Callable[[], None]) -> None:
    """Time each case once, in alternating order from round to round, and compare the images of the strategies.

    An untimed call precedes each timed one, to reload what the previous case evicted from the caches.
    """
    drawn: dict[int, Sample] = {}
    order = range(len(runners))
    for index in order if number % 2 == 0 else reversed(order):
        runners[index].draw(number)
        seconds, drawn[index] = runners[index].draw(number)
        runners[index].seconds.append(seconds)
        runners[index].reports.append(drawn[index].report.blocks)
        tick()
    first = 0
    for index, runner in enumerate(runners):
        if not runner.case.same_work(runners[first].case):
            first = index
        runner.ratios.append(runners[first].seconds[-1] / runner.seconds[-1])
        difference = float(np.abs(drawn[index].images - drawn[first].images).max())
        runner.max_difference = float(np.fmax(runner.max_difference, difference))
        runner.non_finite = max(runner.non_finite, len(drawn[index].report.non_finite))


class _Runner:
    """Draws the images of one case and records the times."""

    def __init__(self, flow: Flow, case: Case, tolerance: float | None, seed: int) -> None:
        self.flow, self.case, self.seed = flow, case, seed
        self.seconds: list[float] = []
        self.ratios: list[float] = []
        self.reports: list[tuple[BlockReport, ...]] = []
        self.max_difference = 0.0
        self.non_finite = 0
        self._first = 0.0
        self._step_seconds: list[dict[int, npt.NDArray[np.float64]]] = []
        self._plan: Any = parallel_of(case.decode, tolerance)
        if case.decode == "auto":
            plans = flow.tuned_plans()
            self._plan = plans if tolerance is None else plans.with_tolerance(tolerance)

    def draw(self, number: int, *, images: int | None = None, on_step: OnStep | None = None) -> tuple[float, Sample]:
        """Decode one batch of noise number `number`: (seconds, the images)."""
        config, count = self.flow.config, self.case.batch if images is None else images
        noise = standard_normal(self.seed, number * count, count, config.patches, config.patch_values)
        began = time.perf_counter()
        sample = self.flow.sample(
            count,
            labels=[i % config.classes for i in range(count)] if config.classes else None,
            noise=noise,
            guidance=Guidance(weight=self.case.guidance, attention_temperature=1.0 if config.classes else TEMPERATURE),
            denoise=False,
            plan=self._plan,
            batch_size=count,
            on_step=on_step,
        )
        return time.perf_counter() - began, sample

    def warm_up(self, tick: Callable[[], None]) -> None:
        """The first call, then calls in which blocks and steps are timed."""
        self._first, _ = self.draw(0)
        tick()
        for number in range(PROFILES):
            marks: dict[int, list[tuple[int, float]]] = {}

            def on_step(step: Step, marks: dict[int, list[tuple[int, float]]] = marks) -> None:
                marks.setdefault(step.block, []).append((step.step, time.perf_counter()))

            began = time.perf_counter()
            self.draw(number, on_step=on_step)
            times = step_times(marks.values(), self.flow.config.patches - 1, began)
            self._step_seconds.append(dict(zip(marks, times, strict=True)))
            tick()

    def result(self) -> CaseResult:
        """The medians and rates of the case."""
        config, bundle = self.flow.config, self.flow.bundle
        steps = config.blocks * (config.patches - 1)
        blocks = tuple(self._block(block) for block in reversed(range(config.blocks)))
        p50, p95 = (float(np.percentile(self.seconds, q)) for q in (50, 95))
        sequential = all(block.strategy == strategy_json(Sequential()) for block in blocks)
        work = sequential_work(
            config,
            rows=self.case.batch * (2 if self.case.guidance else 1),
            weight_bytes=WEIGHT_BYTES[bundle.precision],
            cache_bytes=np.dtype(bundle.cache_dtype).itemsize,
        )
        return CaseResult(
            case=self.case,
            first_ms=1e3 * self._first,
            p50_ms=1e3 * p50,
            p95_ms=1e3 * p95,
            images_per_s=self.case.batch / p50,
            speedup=statistics.median(self.ratios),
            max_difference=self.max_difference,
            step_us=1e6 * p50 / steps,
            slope_us=slope([block.step_us for block in blocks]) if all(block.step_us for block in blocks) else None,
            gflops=1e-9 * work.operations / p50 if sequential else None,
            gbs=1e-9 * work.bytes / p50 if sequential else None,
            non_finite=self.non_finite,
            blocks=blocks,
        )

    def _block(self, block: int) -> BlockResult:
        reports = [one for blocks in self.reports for one in blocks if one.block == block]
        calls = [count for report in reports for count in report.calls]
        sequential = isinstance(reports[0].strategy, Sequential)
        times = [one[block] for one in self._step_seconds]
        accepted = [one for report in reports for one in report.accepted]
        return BlockResult(
            block=block,
            ms=1e3 * statistics.median(float(one.sum()) for one in times),
            strategy=strategy_json(reports[0].strategy),
            calls_mean=statistics.fmean(calls),
            calls_max=max(calls),
            settled=settled_curve(accepted, self.flow.config.patches),
            residual=max(report.residual for report in reports),
            sequential_images=sum(len(report.sequential_images) for report in reports),
            step_us=tuple((1e6 * np.median(times, axis=0)).tolist()) if sequential else (),
        )


def settled_curve(accepted: Sequence[Sequence[int]], patches: int) -> tuple[float, ...]:
    """The mean number of patches that are final after 0, 1, ... calls; an image that is done stays at all of them.

    `accepted` holds, for each image, how many patches each call settled; the first patch is final before any call.
    """
    longest = max(map(len, accepted), default=0)
    if not longest:
        return ()
    curves = np.full((len(accepted), longest + 1), patches)
    for curve, steps in zip(curves, accepted, strict=True):
        curve[: len(steps) + 1] = 1 + np.cumsum([0, *steps])
    return tuple(curves.mean(axis=0).tolist())


def step_times(
    marks: Iterable[Sequence[tuple[int, float]]], steps: int, began: float
) -> Iterator[npt.NDArray[np.float64]]:
    """Seconds of each step of each block, from progress reports (steps done, time), the last at the end of the block.

    Steps that were reported together share the time.
    """
    for turn, block in enumerate(marks):
        done, when = zip((turn * steps, began), *block, strict=True)
        yield np.diff(np.interp(turn * steps + np.arange(steps + 1), done, when))
        began = when[-1]


def slope(step_us: Sequence[Sequence[float]]) -> float | None:
    """Microseconds by which a step [K, N - 1] grows from one index to the next; None where a block has a single step.

    The median of the slopes between all pairs of indices (Theil and Sen), on the fastest block for each index, which
    is robust against disturbances of single steps.
    """
    fastest = np.min(step_us, axis=0)
    first, second = np.triu_indices(len(fastest), 1)
    return float(np.median((fastest[second] - fastest[first]) / (second - first))) if len(first) else None
