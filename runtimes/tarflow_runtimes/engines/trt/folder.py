"""`EngineFolder`: the folder of engines, which belongs to its user alone; files appear whole, and one builds at a time.

An engine is a program: whoever can put a file here can run code on the GPU and in this process. Hence a folder that
is another user's, or that others may write to, is refused, and what is read is compared with its digest.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tarflow_runtimes.errors import EngineError

LOCK_SECONDS: Final = 0.1
"""Seconds between two checks of a process that waits for another one's build."""


def default_folder() -> Path:
    """`tarflow/engines` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "tarflow" / "engines"


class EngineFolder:
    """A folder that only its user can write to; made when it is not there.

    Raises:
        EngineError: when it cannot be made, is another user's, or others may write to it.
    """

    def __init__(self, path: Path | None = None) -> None:
        if sys.platform == "win32":
            raise EngineError("engines of TensorRT are kept on Linux only", hint="use engine ort-cuda or ort-cpu")
        self.path = default_folder() if path is None else path
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = self.path.stat()
        except OSError as error:
            raise EngineError(
                f"{self.path}: cannot keep engines there: {error.strerror}", hint="name a folder with --engine-dir"
            ) from error
        if status.st_uid != os.getuid():
            raise EngineError(
                f"{self.path}: the folder of engines belongs to another user",
                hint="engines are programs; name a folder of your own with --engine-dir",
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise EngineError(
                f"{self.path}: others may write to the folder of engines",
                hint=f"engines are programs; chmod 700 {self.path}",
            )

    def read(self, name: str) -> bytes:
        """The contents of a plain file.

        Raises:
            OSError: when there is none, or it is a link.
        """
        descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Put a file in place, whole and on the disk, or not at all.

        Raises:
            EngineError: when the disk refuses.
        """
        partial = self.path / f".{name}.partial"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise EngineError(f"cannot write {self.path / name}: {error.strerror}") from error

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], object] | None = None, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of that name, of this folder and all processes, and say whether: always, with `wait`.

        While another one holds it, `on_wait` is called repeatedly; an error that it raises ends the wait.

        Raises:
            EngineError: when the folder cannot be written to.
        """
        path = self.path / f".{key}.lock"
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise EngineError(
                    f"{self.path}: cannot keep engines there: {error.strerror}", hint="name a folder with --engine-dir"
                ) from error
            try:
                while not _locked(descriptor):
                    if not wait:
                        yield False
                        return
                    if on_wait is not None:
                        on_wait()
                    time.sleep(LOCK_SECONDS)
                if _is_at(descriptor, path):  # else whoever held it before has removed it
                    try:
                        yield True
                    finally:
                        path.unlink(missing_ok=True)
                    return
            finally:
                os.close(descriptor)

    def unlink(self, *names: str) -> None:
        """Remove files that may be there."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)


def _locked(descriptor: int) -> bool:
    """Take the lock of an open file if it is free; closing the file, or the end of the process, releases it."""
    import fcntl  # which Windows does not have

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there = path.stat(follow_symlinks=False)
    except OSError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
