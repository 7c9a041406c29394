"""Sequential decoding on the host: one patch after the other, the parts of a batch side by side in threads.

x_0 = z_0;  x_{i+1} = z_{i+1} * exp(a_i) + b_i for i = 0 .. N-2.

Source: Zhai et al. 2024 (arXiv 2412.06329), equations 4 to 9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tarflow_runtimes.decode.turn import Floats
from tarflow_runtimes.decode.workers import WorkerPool


class Stepper(Protocol):
    """The inverse of one block for some images; the patch at block position 0 equals the noise."""

    def advance(self) -> None:
        """Compute the next patch: x_{i+1} = z_{i+1} * exp(a_i) + b_i, starting with i = 0. At most N - 1 times."""

    def result(self) -> Floats:
        """The patches [B, N, D] in block order; unfinished patches still hold their noise."""


def invert_sequentially(
    start: Callable[[int], Stepper],
    *,
    parts: int,
    steps: int,
    workers: int,
    on_step: Callable[[int], object] | None = None,
) -> list[Floats]:
    """Take `steps` steps of each part of a batch, `start`(part); returns the parts' patches.

    `on_step` is called with the growing number of steps done; an exception that it raises ends the run.
    """
    pool = WorkerPool(parts, on_step)
    finished: dict[int, Floats] = {}

    def run(part: int) -> None:
        stepper = start(part)
        for done in range(steps):
            stepper.advance()
            if pool.stop:
                return
            pool.report(part, done + 1)
        finished[part] = stepper.result()

    pool.work(run, workers=min(workers, parts))
    return [finished[part] for part in range(parts)]
