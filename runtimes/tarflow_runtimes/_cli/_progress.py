"""A progress bar on stderr where that is a terminal, and the clock behind the time per step."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self


class StepClock:
    """Counts the steps of a run, shows them on a terminal, and times them.

    A context manager; hand `on_step` to the sampler. `steps` is how many ran, `seconds` the time from the start.
    """

    def __init__(self, description: str) -> None:
        self.steps = 0
        self.seconds = 0.0
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
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar.start()
        self._task = self._bar.add_task(self._description, total=None)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._bar.stop()

    @property
    def per_step(self) -> float:
        """Seconds per step, over the whole run."""
        return self.seconds / max(1, self.steps)

    def on_step(self, progress: Any) -> None:
        """Take one report of the sampler."""
        self.show(progress.step, progress.total)

    def show(self, done: int, total: int) -> None:
        """Move the bar."""
        self.steps = done
        self._bar.update(self._task, completed=done, total=total)
