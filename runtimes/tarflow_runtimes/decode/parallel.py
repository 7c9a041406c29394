"""Parallel decoding: fixed-point iteration of a triangular system, on a window that slides over an image's patches.

In block order x_0 = z_0 and x_{i+1} = f_i(x_0, ..., x_i). One call of the step graph evaluates f on a window of patches
at once; the keys and values of the patches before it are cached. The window starts at the last settled patch, so that
its first output is exact, and that patch is settled. The next patch is settled at its current value if f, applied to
settled patches only, reproduces that value within the tolerance; and so on, up to the first patch that moved, which
takes its new value and is settled, too. Hence a block takes at most N - 1 calls, |x_{i+1} - f_i(x_0, ..., x_i)| <=
tolerance for every patch, and tolerance 0 gives the sequential result.

A settled patch keeps the value from which its cached key and value were computed: the cache is never stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from tarflow_runtimes.decode.plan import BlockReport, Parallel
from tarflow_runtimes.decode.turn import Floats, Turn
from tarflow_runtimes.decode.workers import WorkerPool


class Windows(Protocol):
    """The state of the inverse of one block for one image, evaluated on windows of patches."""

    def evaluate(self, first: int, patches: Floats) -> Floats:
        """Patches first .. first + S - 1 in block order, [S, D] -> the patches one position further, [S, D].

        Writes their keys and values, and reads those of all patches before them, which must have been written.
        """


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """Patches [N, D] in block order, and statistics; see `BlockReport` for the fields."""

    patches: Floats
    accepted: tuple[int, ...]
    residual: float
    overflowed: bool = False


def invert_in_parallel(
    start: Callable[[int], Windows],
    noise: Floats,
    turn: Turn,
    strategy: Parallel,
    *,
    workers: int,
    on_step: Callable[[int], object] | None = None,
) -> tuple[Floats, BlockReport]:
    """Invert one block on the host, image i on `start`(i): noise [B, N, D] -> patches, both in block order, and how.

    Every image is iterated by itself, so that its answer does not depend on the others. `on_step` is called with the
    number of patches settled, the mean over the images; an error that it raises ends the run.
    """
    images = len(noise)
    pool = WorkerPool(images, on_step)
    results: list[Settled | None] = [None] * images

    def run(image: int) -> None:
        def on_settled(done: int) -> None:
            pool.report(image, done)
            if pool.stop:
                raise _StoppedError

        first = None if turn.start is None else turn.start[image]
        with contextlib.suppress(_StoppedError):
            results[image] = settle(start(image), noise[image], strategy, on_settled, first=first, calls=turn.steps)

    pool.work(run, workers=min(workers, images))
    settled = [result for result in results if result is not None]
    report = BlockReport(
        block=turn.block,
        strategy=strategy,
        calls=tuple(len(result.accepted) for result in settled),
        accepted=tuple(result.accepted for result in settled),
        residual=max(result.residual for result in settled),
        sequential_images=tuple(i for i, result in enumerate(settled) if result.overflowed),
    )
    return np.stack([result.patches for result in settled]), report


class _StoppedError(Exception):
    """Another part has failed or was cancelled; its error is the one to report."""


def settle(
    windows: Windows,
    noise: Floats,
    strategy: Parallel,
    on_settled: Callable[[int], None] | None = None,
    *,
    first: Floats | None = None,
    calls: int | None = None,
) -> Settled:
    """Invert one block for one image: noise [N, D] in block order; with `calls`, after at most so many evaluations.

    `first` [N, D] is the initial guess, which replaces that of the strategy. `on_settled` is called with the number of
    patches settled after the first; an exception that it raises ends the run.
    """
    count = len(noise)
    size = strategy.window or count - 1
    if first is None:
        first = noise if strategy.init == "noise" else np.zeros_like(noise)
    x = first.copy()
    x[0] = noise[0]
    settled = 1
    accepted: list[int] = []
    residual = 0.0
    while settled < count and len(accepted) != calls:
        stop = min(settled - 1 + size, count - 1)
        new = windows.evaluate(settled - 1, x[settled - 1 : stop])
        if not np.isfinite(new).all():
            left = count - settled
            _one_by_one(windows, x, settled, on_settled)
            return Settled(patches=x, accepted=(*accepted, *[1] * left), residual=residual, overflowed=True)
        with np.errstate(over="ignore"):  # iterates far from the solution may be huge
            moved = np.abs(new - x[settled : stop + 1]).max(axis=1)
        still = _leading(
            moved[: stop - settled] <= strategy.tolerance
        )  # the last patch has no key yet, so it takes its new value
        residual = max(residual, float(moved[:still].max(initial=0.0)))
        x[settled + still : stop + 1] = new[still:]
        settled += still + 1
        accepted.append(still + 1)
        if on_settled is not None:
            on_settled(settled - 1)
    return Settled(patches=x, accepted=tuple(accepted), residual=residual)


def _one_by_one(windows: Windows, x: Floats, settled: int, on_settled: Callable[[int], None] | None) -> None:
    """Finish x in place sequentially."""
    for i in range(settled - 1, len(x) - 1):
        x[i + 1] = windows.evaluate(i, x[i : i + 1])[0]
        if on_settled is not None:
            on_settled(i + 1)


def _leading(flags: np.ndarray) -> int:
    """The number of leading flags that are set."""
    return len(flags) if flags.all() else int(flags.argmin())
