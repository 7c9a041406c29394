"""Why an engine is not used: `differences` field by field, and `nearest`, the one that most nearly does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from tarflow_runtimes.engines.trt.gpu import Gpu
from tarflow_runtimes.engines.trt.profiles import Profile, uncovered
from tarflow_runtimes.engines.trt.sidecar import EQUAL, Sidecar, Source, Wanted, host

FAILED: Final = "it failed its verification here"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A field in which an engine is not what is wanted."""

    field: str
    built: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.field}: built {self.built}, wanted {self.wanted}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The engine that does, if there is one; else the nearest and its differences, and why in one line."""

    hit: Sidecar | None = None
    nearest: Sidecar | None = None
    differences: tuple[Difference, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON values."""
        return {
            "hit": None if self.hit is None else self.hit.key,
            "nearest": None if self.nearest is None else self.nearest.key,
            "differences": [dataclasses.asdict(difference) for difference in self.differences],
            "reason": self.reason,
        }


def differences(made: Wanted, wanted: Wanted) -> tuple[Difference, ...]:
    """Every field that stands against using an engine for what is wanted."""

    def differ(field: str, built: object, wanted: object) -> Difference:
        return Difference(field=field, built=_shown(built), wanted=_shown(wanted))

    implied = {"graph_digest", "flags"} if made.precision != wanted.precision else set()
    pairs = [(field, getattr(made, field), getattr(wanted, field)) for field in EQUAL if field not in implied]
    found = [differ(*pair) for pair in pairs if pair[1] != pair[2]]
    if not set(wanted.targets) <= set(made.targets):
        found.append(differ("targets", made.targets, wanted.targets))
    if missing := uncovered(wanted.profiles, made.profiles):
        found.append(differ("profiles", made.profiles, missing))
    return tuple(found)


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        separator = "; " if value and isinstance(value[0], Profile) else ", "
        return separator.join(map(str, value)) or "none"
    return str(value)[:16]  # of a digest, as much as a person compares


def nearest(
    wanted: Wanted, source: Source, entries: Iterable[Sidecar], *, damage: Callable[[Sidecar], str]
) -> Explanation:
    """The engine of the same graph with the fewest differences; `damage` says what is wrong with an engine's file."""
    candidates = [
        (sidecar, differences(sidecar.made, wanted), damage(sidecar))
        for sidecar in entries
        if sidecar.made.identity == wanted.identity
        or ((sidecar.made.engine, sidecar.made.graph) == (wanted.engine, wanted.graph) and sidecar.source.alike(source))
    ]
    if not candidates:
        return Explanation(reason="never built")
    sidecar, found, broken = min(candidates, key=lambda one: len(one[1]) + bool(one[2]))
    return Explanation(nearest=sidecar, differences=found, reason=_reason(sidecar.made, wanted, found, broken))


def _reason(made: Wanted, wanted: Wanted, found: Sequence[Difference], broken: str) -> str:
    """One line; a different version or GPU is reported as a whole, other fields one by one."""
    elsewhere = [one for one in found if one.field in {"version", "targets", "host"}]
    parts = [str(one) for one in found if one not in elsewhere]
    if elsewhere:
        parts.insert(0, f"built with {_place(made)}, this is {_place(wanted)}")
    return "; ".join([*parts, *([broken] if broken else [])])


def _place(wanted: Wanted) -> str:
    return f"{wanted.version} for {_shown(wanted.targets)} on {wanted.host}"


def unusable(sidecar: Sidecar, version: str, gpu: Gpu, damage: str) -> str:
    """Why an engine cannot run with that version of its package on that GPU, whatever it is wanted for; or nothing."""
    here = dataclasses.replace(sidecar.made, version=version, host=host(), targets=(gpu.target,))
    failed = FAILED if sidecar.failed_on(gpu) else ""
    return "; ".join(filter(None, [_reason(sidecar.made, here, differences(sidecar.made, here), damage), failed]))
