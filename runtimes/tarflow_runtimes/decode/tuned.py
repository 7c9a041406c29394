"""`TunedPlans`: the fastest plan for each batch size, stored in a JSON file next to the bundle.

An entry is valid for one bundle, engine, device and versions (its `identity`), for unguided or guided runs, and for
batches up to its own: a plan that is faster for 16 images is also faster for fewer.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.decode.plan import Plan, strategy_from_json, strategy_json
from tarflow_runtimes.errors import InputError

SCHEMA_VERSION: Final = 1

Identity: TypeAlias = Mapping[str, str]
"""What a plan is valid for: the digest of the bundle, engine, device and versions."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TunedPlan:
    """One entry: the plan, and the measured seconds of one batch with the plan and sequentially."""

    identity: Identity
    batch: int
    branches: int
    plan: Plan
    seconds: float
    sequential_seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        """The key that identifies the entry in a file."""
        return tuple(sorted(self.identity.items())), self.batch, self.branches


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TunedPlans:
    """Entries for one identity; if there are none, `reason` says why."""

    entries: tuple[TunedPlan, ...] = ()
    reason: str = ""

    def plan(self, images: int, branches: int, blocks: int) -> Plan | None:
        """The plan for a batch: that of the smallest tuned batch which is at least as large; None without one."""
        fitting = [
            one
            for one in self.entries
            if one.branches == branches and one.batch >= images and len(one.plan.blocks) == blocks
        ]
        return min(fitting, key=lambda one: one.batch).plan if fitting else None

    def with_tolerance(self, tolerance: float) -> TunedPlans:
        """The same plans with another tolerance."""
        changed = (dataclasses.replace(one, plan=one.plan.with_tolerance(tolerance)) for one in self.entries)
        return TunedPlans(entries=tuple(changed), reason=self.reason)


def plans_path(bundle: Path) -> Path:
    """The file of tuned plans of a bundle: `NAME.plans.json` next to `NAME.tarflow`."""
    return bundle.with_name(bundle.name.removesuffix(".tarflow") + ".plans.json")


def identity_of(bundle: Bundle, report: Mapping[str, Any]) -> Identity:
    """The identity of a bundle on this machine, on the engine that `report` describes."""
    from importlib.metadata import version  # a tenth of the time that importing this package takes

    names = ("engine", "device", "weights", "onnxruntime")
    facts = {name: str(report[name]) for name in names if name in report}
    return {"bundle": bundle.digest, "tarflow-sdk": version("tarflow-sdk"), **facts}


def read_plans(path: Path, identity: Identity) -> TunedPlans:
    """The entries of a file for this identity; without any, the result has a reason.

    Raises:
        InputError: when the file does not contain tuned plans.
    """
    if not path.exists():
        return TunedPlans(reason=f"{path.name} does not exist: nothing was tuned (tarflow tune)")
    entries = _read(path)
    mine = tuple(entry for entry in entries if entry.identity == identity)
    if mine:
        return TunedPlans(entries=mine)
    differing = sorted({name for entry in entries for name in identity if entry.identity.get(name) != identity[name]})
    return TunedPlans(reason=f"{path.name} was tuned for another {', '.join(differing) or 'machine'} (tarflow tune)")


def write_plans(path: Path, entries: tuple[TunedPlan, ...]) -> None:
    """Add entries to a file, replacing those of the same identity, batch and branches and keeping all others.

    Raises:
        InputError: when the file is damaged or cannot be written.
    """
    new = {entry.key for entry in entries}
    kept = [entry for entry in (_read(path) if path.exists() else ()) if entry.key not in new]
    document = {"schema_version": SCHEMA_VERSION, "plans": [entry_json(entry) for entry in (*kept, *entries)]}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot write the plans: {error.strerror}", hint="choose another file with --output"
        ) from error


def _read(path: Path) -> tuple[TunedPlan, ...]:
    try:
        document = json.loads(path.read_text())
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {document['schema_version']}, this version reads {SCHEMA_VERSION}")
        return tuple(_from_json(entry) for entry in document["plans"])
    except (OSError, ValueError, KeyError, TypeError, InputError) as error:
        raise InputError(
            f"{path}: not a file of tuned plans: {error}", hint="remove it and run tarflow tune"
        ) from error


def entry_json(entry: TunedPlan) -> dict[str, Any]:
    """An entry as JSON values, in the format of the file."""
    return dataclasses.asdict(entry) | {"plan": [strategy_json(strategy) for strategy in entry.plan.blocks]}


def _from_json(value: Any) -> TunedPlan:
    return TunedPlan(**value | {"plan": Plan(blocks=tuple(strategy_from_json(one) for one in value["plan"]))})
