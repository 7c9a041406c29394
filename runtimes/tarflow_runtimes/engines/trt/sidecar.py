"""`Sidecar`: the JSON file next to an engine with its identity, its targets and facts about its build."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from typing import Any, Final

from tarflow_runtimes.engines.trt.network import Graph
from tarflow_runtimes.engines.trt.package import Package
from tarflow_runtimes.engines.trt.profiles import Profile

SCHEMA: Final = "tarflow-engine"
SCHEMA_VERSION: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The fields that must be equal for an engine to be reused; see `Graph` for the last three.

    `engine` and `version` are those of the package, `host` is the operating system and processor.
    """

    engine: str
    version: str
    host: str
    flags: tuple[str, ...]
    precision: str
    graph: str
    graph_digest: str

    def to_json(self) -> dict[str, Any]:
        """The identity as JSON values for a sidecar."""
        return dataclasses.asdict(self) | {"flags": list(self.flags)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A request for an engine: its identity, and the targets and profiles that it must cover."""

    identity: Identity
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]

    @property
    def key(self) -> str:
        """Names the files of an engine made for exactly this."""
        document = [self.identity.to_json(), self.targets, [profile.to_json() for profile in self.profiles]]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


def identity_of(package: Package, graph: Graph, flags: tuple[str, ...]) -> Identity:
    """The identity of an engine that this package makes of a graph here."""
    return Identity(
        engine=package.engine,
        version=package.version,
        host=host(),
        flags=flags,
        precision=graph.precision,
        graph=graph.kind,
        graph_digest=graph.digest,
    )


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
class Verification:
    """The comparison of a bundle's reference outputs with those of this engine on one GPU and driver."""

    gpu: str
    driver: str
    passed: bool
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """Everything known about an engine.

    `made` is what it was made for, `source` where its graph was first met, `size` and `sha256` are those of the file
    of the engine, `built` holds facts for people: versions, GPU, driver, seconds, layers, warnings.
    """

    made: Wanted
    source: Source
    size: int
    sha256: str
    built: Mapping[str, Any]
    verifications: tuple[Verification, ...] = ()

    @property
    def key(self) -> str:
        """Names its files."""
        return self.made.key

    @property
    def name(self) -> str:
        """Description for people of what the engine computes."""
        identity = self.made.identity
        return f"{self.source.bundle} block {self.source.block} {identity.graph} {identity.precision}"

    def failed_on(self, gpu: str, driver: str) -> bool:
        """Whether verification ran on that GPU with that driver, and failed."""
        return any((one.gpu, one.driver, one.passed) == (gpu, driver, False) for one in self.verifications)

    def verified(self, verification: Verification) -> Sidecar:
        """With this verification in place of an earlier one on the same GPU and driver."""
        place = (verification.gpu, verification.driver)
        others = tuple(one for one in self.verifications if (one.gpu, one.driver) != place)
        return dataclasses.replace(self, verifications=(*others, verification))

    def to_json(self) -> dict[str, Any]:
        """The sidecar as JSON values for its file."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "identity": self.made.identity.to_json(),
            "targets": list(self.made.targets),
            "profiles": [profile.to_json() for profile in self.made.profiles],
            "source": dataclasses.asdict(self.source),
            "file": {"size": self.size, "sha256": self.sha256},
            "built": dict(self.built),
            "verifications": [dataclasses.asdict(one) for one in self.verifications],
        }


def read_sidecar(text: str) -> Sidecar:
    """The sidecar in a file.

    Raises:
        ValueError: when it is none, or of another schema version.
    """
    try:
        document = json.loads(text)
        if (document["schema"], document["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(f"schema {document['schema']!r}, version {document['schema_version']!r}")
        identity, source, file = document["identity"], document["source"], document["file"]
        names = [field.name for field in dataclasses.fields(Identity) if field.name != "flags"]
        return Sidecar(
            made=Wanted(
                identity=Identity(
                    **{name: str(identity[name]) for name in names}, flags=tuple(map(str, identity["flags"]))
                ),
                targets=tuple(map(str, document["targets"])),
                profiles=tuple(Profile.from_json(one) for one in document["profiles"]),
            ),
            source=Source(bundle=str(source["bundle"]), digest=str(source["digest"]), block=int(source["block"])),
            size=int(file["size"]),
            sha256=str(file["sha256"]),
            built=dict(document["built"]),
            verifications=tuple(
                Verification(
                    gpu=str(one["gpu"]),
                    driver=str(one["driver"]),
                    passed=one["passed"] is True,
                    facts=dict(one["facts"]),
                )
                for one in document["verifications"]
            ),
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not the sidecar of an engine: {error!r}") from error
