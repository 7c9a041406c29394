"""Parallel decoding: a triangular fixed point, iterated on a window that slides over the patches of one image.

In block order x_0 = z_0 and x_{i+1} = f_i(x_0, ..., x_i). One call of the step graph evaluates f on a window of
patches at once, with the keys and values of the patches before it cached. The window starts at the last settled patch,
so that what it yields first is exact: that patch is settled. The next one is settled as it stands when f, of settled
patches only, yields the same within the tolerance; and so on, up to the first that moved, which takes its new value and
is settled, too. Hence at most N - 1 calls, |x_{i+1} - f_i(x_0, ..., x_i)| <= tolerance for every patch, and the
sequential answer at tolerance 0.

A patch that is settled keeps the value that its cached key and value were computed from: no cache is ever stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np

from tarflow_runtimes._crew import Crew
from tarflow_runtimes._engine import Engine, Floats, HostEngine, Integers, Turn, Windows
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
    if engine.decoder is not None:
        x, (report,) = engine.decoder.decode(
            [Turn(block=block, strategy=strategy)],
            noise=z,
            labels=labels,
            guidance=guidance,
            inverse_temperature=inverse_temperature,
            on_step=None if on_step is None else lambda _, done: on_step(done),
        )
        return x, report
    host, images = cast("HostEngine", engine), len(z)
    crew = Crew(images, on_step)
    results: list[Settled | None] = [None] * images

    def run(index: int) -> None:
        noise = z[index, ::-1] if is_reversed else z[index]
        windows = host.windows(
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
    settled = 1
    committed: list[int] = []
    residual = 0.0
    while settled < count:
        stop = min(settled - 1 + size, count - 1)
        new = windows.evaluate(settled - 1, x[settled - 1 : stop])
        if not np.isfinite(new).all():
            left = count - settled
            _one_by_one(windows, x, settled, on_settled)
            return Settled(patches=x, committed=(*committed, *[1] * left), residual=residual, overflowed=True)
        with np.errstate(over="ignore"):  # iterates far from the answer may be huge
            moved = np.abs(new - x[settled : stop + 1]).max(axis=1)
        still = _leading(
            moved[: stop - settled] <= strategy.tolerance
        )  # the last has no key yet, so it takes its value
        residual = max(residual, float(moved[:still].max(initial=0.0)))
        x[settled + still : stop + 1] = new[still:]
        settled += still + 1
        committed.append(still + 1)
        if on_settled is not None:
            on_settled(settled - 1)
    return Settled(patches=x, committed=tuple(committed), residual=residual)


def _one_by_one(windows: Windows, x: Floats, settled: int, on_settled: Callable[[int], None] | None) -> None:
    """Finish x in place sequentially."""
    for i in range(settled - 1, len(x) - 1):
        x[i + 1] = windows.evaluate(i, x[i : i + 1])[0]
        if on_settled is not None:
            on_settled(i + 1)


def _leading(flags: np.ndarray) -> int:
    """How many flags are set before the first that is not."""
    return len(flags) if flags.all() else int(flags.argmin())
