"""`Peer`: one sampler in a separate process that stays alive and is called in turn; `serve`: the loop inside it.

Only the call itself is timed, by the peer's own clock, without start, import, loading and warm-up. Arrays are exchanged
as `.npy` files, commands and answers as JSON lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PAUSE = 0.05
"""Seconds between two peers: idle threads of the previous one spin for a while."""


def resident(field: str) -> float:
    """Resident memory of this process, MB: `VmRSS` now, `VmHWM` at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1e3


class PeerError(SystemExit):
    """A peer's process ended early, or a call failed; its messages are on standard error."""


class Peer:
    """A worker process started as `python SCRIPT --serve NAME ARGUMENTS`.

    `ready` has the facts that it reported about itself, `detail` those about its last call.

    Raises:
        PeerError: from any method, when the process has ended; from a call, when that failed. The process then lives.
    """

    def __init__(self, name: str, script: str, *arguments: str) -> None:
        self.name = name
        command = [sys.executable, script, "--serve", name, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.detail: Any = None
        self.ready: dict[str, Any] = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"{self.name} stopped with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def call(self, **request: Any) -> float:
        """Run one request and return its seconds."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError(f"{self.name} stopped with exit code {self.process.wait()}") from error
        answer = self._answer()
        self.detail = answer["detail"]
        return float(answer["seconds"])

    def call_rested(self, **request: Any) -> float:
        """`call` after a pause, when spinning threads of the previous peer have stopped."""
        time.sleep(PAUSE)
        return self.call(**request)

    def close(self) -> None:
        """End the peer's process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def keep_stdout() -> None:
    """Keep output of libraries out of the answers: file descriptor 1 becomes standard error except for `print`."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def serve(work: Callable[..., np.ndarray | tuple[np.ndarray, Any]], **ready: Any) -> None:
    """Answer requests on standard input with `work(**request)` until it is closed.

    The work returns an array, or an array and JSON values that describe the call. `request["save"]`, when given, is
    where the array is written, after the clock has stopped.
    """
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        save = request.pop("save", None)
        started = time.perf_counter()
        try:
            result = work(**request)
        except Exception as error:  # noqa: BLE001 - out of memory for this batch, and then smaller ones may run
            traceback.print_exc()
            print(json.dumps({"error": first_line(error)}), flush=True)
            continue
        seconds = time.perf_counter() - started
        array, detail = result if isinstance(result, tuple) else (result, None)
        if save is not None:
            np.save(Path(save), array)
        print(json.dumps({"seconds": seconds, "detail": detail}), flush=True)


def first_line(error: Exception) -> str:
    """The message of an error, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
