"""`explain`: which engine of a cache does for what is wanted, or what stands against each that nearly does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tarflow_runtimes.engines.trt.gpu import Gpu
from tarflow_runtimes.engines.trt.profiles import joined, uncovered
from tarflow_runtimes.engines.trt.sidecar import Sidecar, Source, Wanted, host


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
    """The engine that matches, if there is one; else the nearest one with its differences, and a one-line reason.

    `barred` says that the nearest would do, had it not failed its verification.
    """

    hit: Sidecar | None = None
    nearest: Sidecar | None = None
    barred: bool = False
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
    """Every field that prevents the use of an engine for a request."""
    have, want = made.identity.to_json(), wanted.identity.to_json()
    if have["precision"] != want["precision"]:
        del want["graph_digest"], want["flags"]  # they follow from the precision
    found = [
        Difference(field=field, built=_shown(have[field]), wanted=_shown(value))
        for field, value in want.items()
        if have[field] != value
    ]
    if not set(wanted.targets) <= set(made.targets):
        found.append(Difference(field="targets", built=_shown(made.targets), wanted=_shown(wanted.targets)))
    missing = uncovered(wanted.profiles, made.profiles)
    if missing:
        found.append(
            Difference(
                field="profiles", built="; ".join(map(str, joined(made.profiles))), wanted="; ".join(map(str, missing))
            )
        )
    return tuple(found)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)[:16]  # of a digest, as much as a person compares


def explain(
    wanted: Wanted,
    source: Source,
    entries: Iterable[Sidecar],
    *,
    damage: Callable[[Sidecar], str],
    failed: Callable[[Sidecar], bool],
) -> Explanation:
    """Look among `entries`, the one used last first.

    `damage` says what is wrong with an engine's file, `failed` whether it failed its verification here.
    """
    candidates: list[tuple[Sidecar, tuple[Difference, ...], str]] = []
    barred: Sidecar | None = None
    for sidecar in entries:
        identity = sidecar.made.identity
        found, broken = differences(sidecar.made, wanted), damage(sidecar)
        if not found and not broken:
            if not failed(sidecar):
                return Explanation(hit=sidecar, reason="built for this")
            barred = barred or sidecar
        same_graph = identity.graph == wanted.identity.graph and sidecar.source.alike(source)
        if (identity.engine == wanted.identity.engine and same_graph) or not found:
            candidates.append((sidecar, found, broken))
    if barred is not None:
        return Explanation(nearest=barred, barred=True, reason="it failed its verification here")
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
    return f"{wanted.identity.version} for {_shown(wanted.targets)} on {wanted.identity.host}"


def unusable(sidecar: Sidecar, version: str, gpu: Gpu, damage: str) -> str:
    """Why an engine can never run with that version of its package on that GPU, or an empty string."""
    here = dataclasses.replace(
        sidecar.made,
        identity=dataclasses.replace(sidecar.made.identity, version=version, host=host()),
        targets=(gpu.target,),
    )
    reasons = [_reason(sidecar.made, here, differences(sidecar.made, here), damage)]
    if sidecar.failed_on(gpu.name, gpu.driver):
        reasons.append("it failed its verification here")
    return "; ".join(filter(None, reasons))
