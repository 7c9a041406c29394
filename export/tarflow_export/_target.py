"""`Target`: the path of a bundle, and the temporary folder next to it in which it is written.

A bundle appears under its name complete or not at all: it is written to a hidden folder on the same file system, which
is renamed into place at the end, or exchanged with the bundle that it replaces. After any error or interrupt, the
hidden folder is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tarflow_export._errors import ExportError
from tarflow_runtimes.bundle.reader import FORMAT, MANIFEST

SUFFIX = ".tarflow"

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2: relative to the current directory; exchange."""


class Target:
    """The directory `path`, checked: it can be created there, or it is a bundle that may be replaced.

    Raises:
        ExportError: when its folder is missing or not writable, or when something is there that may not be replaced.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        given = Path(path)
        # A link to a bundle would be replaced by a folder, and `..` as a name would rename the wrong one.
        self.path = given.parent.resolve() / given.name
        self.overwrite = overwrite
        if given.name in ("", ".", ".."):
            raise ExportError(f"{given}: not a valid name for a bundle", hint=f"give a name like model{SUFFIX}")
        if not self.path.parent.is_dir():
            raise ExportError(f"{given}: its folder {self.path.parent} does not exist", hint="create the folder first")
        if not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise ExportError(f"{given}: its folder {self.path.parent} is not writable", hint="choose another with -o")
        self.check()

    def check(self) -> None:
        """Raise unless `path` is free or a bundle that may be replaced; done again before publishing."""
        if not os.path.lexists(self.path):
            return
        if not self.overwrite:
            raise ExportError(f"{self.path}: exists already", hint="add --overwrite, or choose another name with -o")
        if problem := _not_a_bundle(self.path):
            raise ExportError(f"{self.path}: {problem}, so it is not replaced", hint="choose another name with -o")

    @contextlib.contextmanager
    def growing(self) -> Iterator[Path]:
        """Yield an empty folder next to the target; it becomes the target on success, and is removed otherwise."""
        try:
            folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent))
        except OSError as error:
            raise ExportError(
                f"{self.path}: cannot write beside it: {error.strerror}", hint="choose another with -o"
            ) from error
        try:
            yield folder
            self.check()
            _make_public(folder)
            self._publish(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, folder: Path) -> None:
        """Give the folder the target's name; an existing bundle changes places with it, never a moment without one."""
        if not os.path.lexists(self.path):
            folder.rename(self.path)
        elif not _exchange(folder, self.path):
            self._replace(folder)

    def _replace(self, folder: Path) -> None:
        """Replace in two renames if the file system cannot exchange; restore the old bundle if the second one fails."""
        aside = folder.with_suffix(".replaced")
        try:
            self.path.rename(aside)
            folder.rename(self.path)
        except BaseException:
            if aside.exists() and not self.path.exists():
                aside.rename(self.path)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux: renameat2); False if the system or file system does not support it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def _make_public(folder: Path) -> None:
    """Give the permissions of any new folder; mkdtemp makes folders that only their owner may read."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)


def _not_a_bundle(path: Path) -> str:
    """Why `path` is not a bundle (a directory with exactly the files of its manifest), or an empty string."""
    if path.is_symlink() or not path.is_dir():
        return "is not a directory"
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        listed = set(manifest["files"]) if manifest["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        listed = None
    if listed is None:
        return "is not a bundle"
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_dir() and name != MANIFEST and name not in listed:
            return f"holds {name}, which is not the bundle's"
    return ""
