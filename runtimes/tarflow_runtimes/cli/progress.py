"""A progress bar on stderr if it is a terminal, and the clock for the time per step."""

from __future__ import annotations

import statistics
import sys
import time
from types import TracebackType
from typing import Any, Self


class StepClock:
    """Counts the steps of a run, shows them on a terminal, and times them.

    A context manager; pass `on_step` to the sampler. `steps` is the number of steps run, `seconds` the total time.
    """

    def __init__(self, description: str) -> None:
        self.steps = 0
        self.seconds = 0.0
        self._paces: list[float] = []
        self._description = description
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
        self._bar.start()
        self._task = self._bar.add_task(self._description, total=None)
        self._start = self._last = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._bar.stop()

    @property
    def per_step(self) -> float:
        """Median seconds per step, which excludes one-time work such as opening the graph of a block."""
        return statistics.median(self._paces) if self._paces else self.seconds

    def on_step(self, progress: Any) -> None:
        """Receive a progress report of the sampler."""
        self.show(progress.step, progress.total)

    def show(self, done: int, total: int) -> None:
        """Advance the progress bar."""
        now = time.perf_counter()
        if self.steps and done > self.steps:
            self._paces.append((now - self._last) / (done - self.steps))
        self._last, self.steps = now, done
        self._bar.update(self._task, completed=done, total=total)
