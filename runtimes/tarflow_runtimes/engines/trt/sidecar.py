"""`Wanted`, which names an engine, and `Sidecar`: the JSON file beside it, which says whence it is and what it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from typing import Any, Final

from tarflow_runtimes.engines.trt.gpu import Gpu
from tarflow_runtimes.engines.trt.profiles import Profile

SCHEMA: Final = ["tarflow-engine", 2]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """An engine that is wanted. All but targets and profiles must be equal; those it must cover.

    `engine` and `version` are those of the package, `host` is the operating system and processor, `flags` are the
    builder's; `graph` is the kind, `graph_digest` that of the graph and its weights.
    """

    engine: str
    version: str
    host: str
    flags: tuple[str, ...]
    precision: str
    graph: str
    graph_digest: str
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]

    @property
    def identity(self) -> str:
        """How the name of every engine begins that computes this, for whatever targets and shapes."""
        return _digest({name: getattr(self, name) for name in EQUAL})

    @property
    def key(self) -> str:
        """The name, without a suffix, of the files of an engine made for exactly this."""
        return self.identity + _digest(dataclasses.asdict(self))


EQUAL: Final = tuple(
    field.name for field in dataclasses.fields(Wanted) if field.name not in {"targets", "profiles"}
)  # fmt: skip
"""The fields of `Wanted` that must be equal."""


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def host() -> str:
    """The operating system and processor here, as `linux-x86_64`."""
    return f"{sys.platform}-{platform.machine()}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a graph comes from: name and digest of the bundle, and the flow block."""

    bundle: str
    digest: str
    block: int

    def alike(self, other: Source) -> bool:
        """Whether both are the same block of probably the same bundle, perhaps exported again or renamed."""
        return self.block == other.block and (self.bundle == other.bundle or self.digest == other.digest)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """Everything known about an engine.

    `made` is what it was made for, `source` where its graph was first met, `size` and `sha256` are those of the file
    of the engine, `built` holds facts for people: versions, GPU, driver, seconds, layers, warnings. `verifications`
    has for every GPU and driver (`Gpu.place`) whether the last comparison of a bundle's reference outputs with those of
    this engine `passed`, and `facts` for people.
    """

    made: Wanted
    source: Source
    size: int
    sha256: str
    built: Mapping[str, Any]
    verifications: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names its files."""
        return self.made.key

    @property
    def name(self) -> str:
        """For people: what it computes."""
        return f"{self.source.bundle} block {self.source.block} {self.made.graph} {self.made.precision}"

    def failed_on(self, gpu: Gpu | None) -> bool:
        """Whether verification ran on that GPU with that driver, and failed."""
        return gpu is not None and not self.verifications.get(gpu.place, {"passed": True})["passed"]

    def verified(self, gpu: Gpu, *, passed: bool, facts: Mapping[str, Any]) -> Sidecar:
        """With this verification in place of an earlier one on the same GPU and driver."""
        found = {**self.verifications, gpu.place: {"passed": passed, "facts": facts}}
        return dataclasses.replace(self, verifications=found)

    def to_text(self) -> str:
        """What stands in the file."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=2) + "\n"


def read_sidecar(text: str) -> Sidecar:
    """The sidecar in a file.

    Raises:
        ValueError: when it is none, or of another schema version.
    """
    try:
        document = json.loads(text)
        if document.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        made = document["made"]
        tuples = {name: tuple(made[name]) for name in ("flags", "targets")}
        profiles = tuple(Profile(**one) for one in made["profiles"])
        facts = {name: dict(document[name]) for name in ("built", "verifications")}
        parts = {"made": Wanted(**made | tuples | {"profiles": profiles}), "source": Source(**document["source"])}
        return Sidecar(**document | parts | facts)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not the sidecar of an engine: {error!r}") from error
