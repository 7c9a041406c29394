"""`WorkerPool`: runs the parts of a batch in threads, with progress and cancellation in the caller's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class WorkerPool:
    """Runs the parts of a batch in threads, including the caller's, which alone calls the callback."""

    def __init__(self, parts: int, on_step: Callable[[int], object] | None) -> None:
        self.stop = False
        self._done = [0] * parts
        self._reported = 0
        self._on_step = on_step
        self._caller = threading.get_ident()
        self._lock = threading.Lock()
        self._next = 0
        self._error: BaseException | None = None

    def report(self, index: int, done: int) -> None:
        """Report the number of steps done in a part."""
        self._done[index] = done
        if self._on_step is not None and threading.get_ident() == self._caller:
            self._tell()

    def work(self, run: Callable[[int], None], *, workers: int) -> None:
        """Run all parts; the first error stops the others and is raised when all threads have ended."""
        threads = [
            threading.Thread(target=self._take_parts, args=(run,), name="tarflow-part", daemon=True)
            for _ in range(workers - 1)
        ]
        try:
            for thread in threads:
                thread.start()
            self._take_parts(run, reraise=True)
            for thread in threads:
                thread.join()
        except BaseException:  # also on Ctrl-C at any point: no thread may continue after the call has ended
            self.stop = True
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if self._error is not None:
            raise self._error
        if self._on_step is not None:
            self._tell()

    def _take_parts(self, run: Callable[[int], None], *, reraise: bool = False) -> None:
        try:
            while not self.stop:
                with self._lock:
                    index, self._next = self._next, self._next + 1
                if index >= len(self._done):
                    return
                run(index)
        except BaseException as error:
            self.stop = True
            if reraise:
                raise
            self._error = error

    def _tell(self) -> None:
        """Report the mean progress of the parts when it has grown by a whole step."""
        done = sum(self._done) // len(self._done)
        if done > self._reported and self._on_step is not None:
            self._reported = done
            self._on_step(done)
