"""`listen`: collect the messages that TensorRT logs while it parses, builds or loads, as lines.

A process has one logger: the first one given to a builder or runtime. Hence each package has one permanent logger that
forwards messages to active `listen` blocks. Other messages are dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any, Final

from tarflow_runtimes.engines.trt.package import Package

ROUTINE: Final = ("has Int64 binding", "differs from one already registered")
"""Warnings that are irrelevant for our graphs: we bind int64 as int64, and the logger is always the same."""


@dataclasses.dataclass(slots=True)
class Heard:
    """Errors and warnings, in order, without the routine ones; each a line."""

    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


_listening: list[Heard] = []
_lock = threading.Lock()


@contextlib.contextmanager
def listen() -> Iterator[Heard]:
    """Collect messages from all threads until the end of the block."""
    heard = Heard()
    with _lock:
        _listening.append(heard)
    try:
        yield heard
    finally:
        with _lock:
            _listening[:] = [other for other in _listening if other is not heard]


def logger(package: Package) -> Any:
    """The one logger of a package."""
    return _logger(package.module)


@functools.cache
def _logger(module: Any) -> Any:
    levels = module.ILogger.Severity

    class Logger(module.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors; the library calls it from its own threads."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            line = " ".join(message.split())
            serious = severity in (levels.ERROR, levels.INTERNAL_ERROR)
            if not serious and (severity != levels.WARNING or any(part in line for part in ROUTINE)):
                return
            with _lock:
                for heard in _listening:
                    (heard.errors if serious else heard.warnings).append(line)

    return Logger()
