"""`EngineCache`: the engines in a folder, found by their identity and removed when they become too large.

The files of an engine are `KEY.engine` and its sidecar `KEY.json`, which is written last: an engine without one does
not exist. Leftovers of a killed process are never loaded, and are removed by the next `prune`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from tarflow_runtimes.engines.trt.explain import Explanation, explain
from tarflow_runtimes.engines.trt.folder import EngineFolder
from tarflow_runtimes.engines.trt.gpu import Gpu
from tarflow_runtimes.engines.trt.sidecar import Sidecar, Source, Verification, Wanted, read_sidecar
from tarflow_runtimes.errors import EngineError

MAX_BYTES: Final = 20 << 30
"""Size limit of the engines in a folder; beyond it the least recently used are removed."""

_OURS = re.compile(r"\.?(?P<key>[0-9a-f]{32})\.(engine|json|lock|(engine|json)\.partial)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What `prune` removed: the engines, the files that belonged to none, and the bytes of all."""

    engines: tuple[Sidecar, ...]
    leftovers: tuple[str, ...]
    nbytes: int


class EngineCache:
    """The engines in a folder, or in the user's cache folder.

    Raises:
        EngineError: when the folder is not the user's own.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = EngineFolder(folder)
        self.path = self._folder.path

    def entries(self) -> list[Sidecar]:
        """All engines, most recently used first."""
        found = []
        for path in self.path.glob("*.json"):
            sidecar = self._read(path.stem)
            if sidecar is not None:
                found.append((self._used(sidecar), sidecar))
        return [sidecar for _, sidecar in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def _read(self, key: str) -> Sidecar | None:
        try:
            sidecar = read_sidecar(self._folder.read(f"{key}.json").decode())
        except (OSError, ValueError):
            return None
        return sidecar if sidecar.key == key else None

    def _used(self, sidecar: Sidecar) -> float:
        try:
            return (self.path / f"{sidecar.key}.json").stat().st_mtime
        except OSError:
            return 0.0

    def explain(self, wanted: Wanted, source: Source, gpu: Gpu | None = None) -> Explanation:
        """The engine for a request, or why there is none; one that failed its verification on this GPU is excluded."""

        def failed(sidecar: Sidecar) -> bool:
            return gpu is not None and sidecar.failed_on(gpu.name, gpu.driver)

        return explain(wanted, source, self.entries(), damage=self.damage, failed=failed)

    def damage(self, sidecar: Sidecar) -> str:
        """What is wrong with the size of an engine's file, or an empty string."""
        try:
            size = (self.path / f"{sidecar.key}.engine").stat(follow_symlinks=False).st_size
        except OSError:
            return "its file is missing"
        return "" if size == sidecar.size else f"its file has {size} bytes, not {sidecar.size}"

    def load(self, sidecar: Sidecar) -> bytes:
        """Load an engine, and mark it as most recently used.

        Raises:
            EngineError: when its file has changed since it was stored.
        """
        try:
            engine = self._folder.read(f"{sidecar.key}.engine")
        except OSError:
            engine = b""
        if hashlib.sha256(engine).hexdigest() != sidecar.sha256:
            raise EngineError(
                f"the engine of {sidecar.name} in {self.path} is damaged: its SHA-256 is not that of its sidecar",
                hint="tarflow build --rebuild builds it again",
            )
        with contextlib.suppress(OSError):  # another process has just removed it
            os.utime(self.path / f"{sidecar.key}.json")
        return engine

    def store(
        self,
        made: Wanted,
        source: Source,
        engine: bytes,
        built: dict[str, object],
        *,
        max_bytes: int,
        keep: Collection[str] = (),
    ) -> Sidecar:
        """Store an engine under its key, whose lock is held; other engines may be removed.

        Engines whose keys are in `keep` are not removed.

        Raises:
            EngineError: when the disk refuses.
        """
        digest = hashlib.sha256(engine).hexdigest()
        sidecar = Sidecar(made=made, source=source, size=len(engine), sha256=digest, built=built)
        self.remove(sidecar.key)
        self._folder.write(f"{sidecar.key}.engine", engine)
        self._write(sidecar)
        self._evict(max_bytes, {*keep, sidecar.key})
        return sidecar

    def load_beside(self, name: str) -> bytes:
        """Other data stored under that name next to the engines, if it exists and is complete."""
        try:
            data = self._folder.read(name)
        except OSError:
            return b""
        digest, blob = data[:32], data[32:]
        return blob if hashlib.sha256(blob).digest() == digest else b""

    def store_beside(self, name: str, blob: bytes) -> None:
        """Store data that make the next run faster; a disk error only makes the next run slower."""
        with contextlib.suppress(EngineError):
            self._folder.write(name, hashlib.sha256(blob).digest() + blob)

    def _write(self, sidecar: Sidecar) -> None:
        self._folder.write(f"{sidecar.key}.json", (json.dumps(sidecar.to_json(), indent=2) + "\n").encode())

    def record_verification(self, sidecar: Sidecar, verification: Verification) -> Sidecar:
        """Write the result of a verification into the sidecar; an engine that failed is refused from then on."""
        with self.lock(sidecar.key):
            changed = (self._read(sidecar.key) or sidecar).verified(verification)
            self._write(changed)
        return changed

    def lock(self, key: str, on_wait: Callable[[], object] | None = None) -> AbstractContextManager[None]:
        """Hold the lock of one engine, so that only one process builds it."""
        return self._folder.lock(key, on_wait)

    def remove(self, key: str) -> None:
        """Remove an engine, its sidecar first."""
        self._folder.remove(f"{key}.json", f"{key}.engine")

    def nbytes(self, sidecar: Sidecar) -> int:
        """Size in bytes of an engine's files."""
        return sum(path.stat().st_size for path in self.path.glob(f"{sidecar.key}.*"))

    def prune(self, max_bytes: int = MAX_BYTES) -> Pruned:
        """Remove files that belong to no engine and are not being written, then engines until the others fit."""
        leftovers, freed = [], 0
        for path in sorted(self.path.iterdir()):
            ours = _OURS.fullmatch(path.name)
            if ours is None or self._is_of_engine(path, ours["key"]):
                continue
            with self._folder.lock_if_free(ours["key"]) as free:
                # Checked again, because the holder of the lock may have finished an engine.
                if free and path.exists() and not self._is_of_engine(path, ours["key"]):
                    freed += path.stat().st_size
                    self._folder.remove(path.name)
                    leftovers.append(path.name)
        evicted, bytes_of_engines = self._evict(max_bytes, ())
        return Pruned(engines=evicted, leftovers=tuple(leftovers), nbytes=freed + bytes_of_engines)

    def _is_of_engine(self, path: Path, key: str) -> bool:
        """Whether a file belongs to a complete engine."""
        sidecar = self._read(key)
        return not path.name.startswith(".") and sidecar is not None and not self.damage(sidecar)

    def _evict(self, max_bytes: int, keep: Collection[str]) -> tuple[tuple[Sidecar, ...], int]:
        """Remove the least recently used engines until the others take at most `max_bytes`."""
        entries = self.entries()
        sizes = {sidecar.key: self.nbytes(sidecar) for sidecar in entries}
        total, evicted = sum(sizes.values()), []
        for sidecar in reversed(entries):
            if total <= max_bytes:
                break
            if sidecar.key not in keep:
                self.remove(sidecar.key)
                total -= sizes[sidecar.key]
                evicted.append(sidecar)
        return tuple(evicted), sum(sizes[sidecar.key] for sidecar in evicted)
