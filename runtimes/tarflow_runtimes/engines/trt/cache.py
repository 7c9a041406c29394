"""`EngineCache`: the engines in a folder, found by their identity and removed when they become too large.

An engine's files are `KEY.engine` and its sidecar `KEY.json`, which is written last: an engine without one is not
there. KEY is a digest of all that the engine was made for; its first half leaves targets and shapes out, and by it an
engine is looked up. A sidecar that does not belong to its name is none. What a process that was killed leaves behind is
never loaded, and is removed by the next `prune`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from tarflow_runtimes.engines.trt.explain import FAILED, Explanation, differences, nearest
from tarflow_runtimes.engines.trt.folder import EngineFolder
from tarflow_runtimes.engines.trt.gpu import Gpu
from tarflow_runtimes.engines.trt.sidecar import Sidecar, Source, Wanted, read_sidecar
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


class EngineCache(EngineFolder):
    """The engines in a folder, or in the user's cache folder."""

    def entries(self, identity: str = "") -> list[Sidecar]:
        """All engines, or those of an identity; the one used last first."""
        found = [self._read(path.stem) for path in self.path.glob(f"{identity}*.json")]
        return sorted((sidecar for sidecar in found if sidecar is not None), key=self._used, reverse=True)

    def _read(self, key: str) -> Sidecar | None:
        try:
            sidecar = read_sidecar(self.read(f"{key}.json").decode())
        except (OSError, ValueError):
            return None
        return sidecar if sidecar.key == key else None

    def _used(self, sidecar: Sidecar) -> float:
        try:
            return (self.path / f"{sidecar.key}.json").stat().st_mtime
        except OSError:
            return 0.0

    def explain(self, wanted: Wanted, source: Source, gpu: Gpu | None = None) -> Explanation:
        """The engine for this, or why there is none.

        One that failed its verification on this GPU is none: where no other does, it is the nearest, and FAILED the
        reason.
        """
        fitting = [
            sidecar
            for sidecar in self.entries(wanted.identity)
            if not differences(sidecar.made, wanted) and not self.damage(sidecar)
        ]
        for sidecar in fitting:
            if not sidecar.failed_on(gpu):
                return Explanation(hit=sidecar, reason="built for this")
        if fitting:
            return Explanation(nearest=fitting[0], reason=FAILED)
        return nearest(wanted, source, self.entries(), damage=self.damage)

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
            engine = self.read(f"{sidecar.key}.engine")
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
        built: Mapping[str, object],
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
        self.write(f"{sidecar.key}.engine", engine)
        self.write(f"{sidecar.key}.json", sidecar.to_text().encode())
        self._evict(max_bytes, {*keep, sidecar.key})
        return sidecar

    def load_beside(self, name: str) -> bytes:
        """Other data stored under that name next to the engines, if it exists and is complete."""
        try:
            data = self.read(name)
        except OSError:
            return b""
        digest, blob = data[:32], data[32:]
        return blob if hashlib.sha256(blob).digest() == digest else b""

    def store_beside(self, name: str, blob: bytes) -> None:
        """Store data that make the next run faster; a disk error only makes the next run slower."""
        with contextlib.suppress(EngineError):
            self.write(name, hashlib.sha256(blob).digest() + blob)

    def record_verification(self, sidecar: Sidecar, gpu: Gpu, *, passed: bool, facts: Mapping[str, Any]) -> Sidecar:
        """Write into the sidecar what verification found; an engine that failed is refused from then on."""
        with self.lock(sidecar.key):
            changed = (self._read(sidecar.key) or sidecar).verified(gpu, passed=passed, facts=facts)
            self.write(f"{sidecar.key}.json", changed.to_text().encode())
        return changed

    def remove(self, key: str) -> None:
        """Remove an engine, its sidecar first."""
        self.unlink(f"{key}.json", f"{key}.engine")

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
            with self.lock(ours["key"], wait=False) as free:
                # Looked at again, for whoever held the lock may have finished an engine.
                if free and path.exists() and not self._is_of_engine(path, ours["key"]):
                    freed += path.stat().st_size
                    self.unlink(path.name)
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
