"""Parallel decoding: a triangular fixed point, iterated on a window that slides over the patches of one image.

In block order x_0 = z_0 and x_{i+1} = f_i(x_0, ..., x_i). One call of the step graph evaluates f on a window of
patches at once, with the keys and values of the patches before it cached. What it yields for a patch is final when
everything it was computed from is: settled before, or moved by at most the tolerance since the last call. The patch
right after the settled ones always qualifies, hence at most N - 1 calls, the sequential answer at tolerance 0, and
errors that cannot run back, because f_i reads nothing after x_i.

The window starts at the first patch whose cached key and value came from an earlier value than its final one; they are
written again on the way, so that no later patch ever reads a stale cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np

from tarflow_runtimes._crew import Crew
from tarflow_runtimes._engine import Engine, Floats, Integers, Windows
from tarflow_runtimes._plan import BlockReport, Parallel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """Patches [N, D] in block order and how they came about; see `BlockReport` for the fields."""

    patches: Floats
    committed: tuple[int, ...]
    residual: float
    overflowed: bool = False


def inverse_block_parallel(  # noqa: PLR0917 - mathematics, like `inverse_block`
    engine: Engine,
    block: int,
    z: Floats,
    labels: Integers | None,
    guidance: Floats,
    inverse_temperature: Floats,
    *,
    strategy: Parallel,
    is_reversed: bool,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Floats, BlockReport]:
    """Invert one block: z [B, N, D], labels [G, B], guidance [2, N], inverse_temperature [G] -> x [B, N, D], and how.

    Every image is iterated by itself, so that its answer does not depend on the others. `on_step` hears the number of
    patches settled, the mean over the images; an error that it raises ends the run.
    """
    images = len(z)
    crew = Crew(images, on_step)
    results: list[Settled | None] = [None] * images

    def run(index: int) -> None:
        noise = z[index, ::-1] if is_reversed else z[index]
        windows = engine.windows(
            block,
            noise=noise,
            labels=None if labels is None else labels[:, index],
            guidance=guidance,
            inverse_temperature=inverse_temperature,
            alone=images == 1,
        )

        def on_settled(done: int) -> None:
            crew.report(index, done)
            if crew.stop:
                raise _StoppedError

        with contextlib.suppress(_StoppedError):
            results[index] = settle(windows, noise, strategy, on_settled)

    crew.work(run, workers=min(engine.workers, images))
    settled = [result for result in results if result is not None]
    patches = np.stack([result.patches for result in settled])
    report = BlockReport(
        block=block,
        strategy=strategy,
        calls=tuple(len(result.committed) for result in settled),
        committed=tuple(result.committed for result in settled),
        residual=max(result.residual for result in settled),
        sequential_images=tuple(i for i, result in enumerate(settled) if result.overflowed),
    )
    return np.ascontiguousarray(patches[:, ::-1] if is_reversed else patches), report


class _StoppedError(Exception):
    """Another part has failed or was cancelled, and its error is the one to report."""


def settle(
    windows: Windows, noise: Floats, strategy: Parallel, on_settled: Callable[[int], None] | None = None
) -> Settled:
    """Invert one block for one image: noise [N, D] in block order.

    `on_settled` hears the number of patches settled after the first; an error that it raises ends the run.
    """
    count = len(noise)
    size = strategy.window or count - 1
    x = noise.copy() if strategy.init == "noise" else np.zeros_like(noise)
    x[0] = noise[0]
    cached, settled = 0, 1  # patches whose keys and values are final; patches that are
    committed: list[int] = []
    residual = 0.0
    while settled < count:
        stop = min(cached + size, count - 1)
        new = windows.evaluate(cached, x[cached:stop])[settled - cached - 1 :]
        if not np.isfinite(new).all():
            finished = _one_by_one(windows, x, cached, settled, on_settled)
            return Settled(patches=x, committed=(*committed, *[1] * finished), residual=residual, overflowed=True)
        with np.errstate(over="ignore"):  # iterates far from the answer may be huge
            moved = np.abs(new - x[settled : stop + 1]).max(axis=1)
        still = _leading(moved <= strategy.tolerance)
        final = min(still + 1, len(new))
        residual = max(residual, float(moved[: final - 1].max(initial=0.0)))
        x[settled : stop + 1] = new
        cached = min(settled + _leading(moved == 0.0), settled + final, stop)
        settled += final
        committed.append(final)
        if on_settled is not None:
            on_settled(settled - 1)
    return Settled(patches=x, committed=tuple(committed), residual=residual)


def _one_by_one(
    windows: Windows, x: Floats, cached: int, settled: int, on_settled: Callable[[int], None] | None
) -> int:
    """Finish x in place sequentially; returns the number of patches that were left."""
    for i in range(cached, len(x) - 1):
        following = windows.evaluate(i, x[i : i + 1])
        if i + 1 >= settled:
            x[i + 1] = following[0]
            if on_settled is not None:
                on_settled(i + 1)
    return len(x) - settled


def _leading(flags: np.ndarray) -> int:
    """How many flags are set before the first that is not."""
    return len(flags) if flags.all() else int(flags.argmin())
