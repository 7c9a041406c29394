"""`Supply`: the engines of one bundle, loaded from the cache or built and stored there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.engines.gpu.engine import density_images
from tarflow_runtimes.engines.trt.build import build
from tarflow_runtimes.engines.trt.cache import MAX_BYTES, EngineCache
from tarflow_runtimes.engines.trt.compile import Job, builder_flags
from tarflow_runtimes.engines.trt.explain import FAILED, Explanation
from tarflow_runtimes.engines.trt.gpu import Gpu
from tarflow_runtimes.engines.trt.graphs import PROVIDER, open_graph
from tarflow_runtimes.engines.trt.network import Graph
from tarflow_runtimes.engines.trt.package import PORTABLE_TARGETS, Package
from tarflow_runtimes.engines.trt.profiles import Profile
from tarflow_runtimes.engines.trt.sidecar import Sidecar, Source, Wanted, host
from tarflow_runtimes.errors import Cancelled, EngineError, InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Building:
    """Progress of a build: which graph of which block, the share of it that is done, and why it is built."""

    block: int
    kind: str
    share: float
    reason: str


OnBuilding = Callable[[Building], object]
"""Called in the caller's thread during builds and while another process builds the same; False cancels."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Supplied:
    """An engine as bytes, its sidecar, the axes of its inputs and outputs, and why it was built just now.

    `reason` is empty when it was there.
    """

    sidecar: Sidecar
    engine: bytes
    axes: Mapping[str, Sequence[int | str]]
    reason: str


class Supply:
    """Engines of `bundle` for `targets`, or for `gpu`, or where both are None for the targets of PORTABLE_TARGETS.

    They compute in the bundle's precision, or with `tf32` round the factors of a float32 bundle's products to 11 bits.

    Raises:
        EngineError: when the bundle has no graphs for TensorRT, the package cannot build for these targets, or the
            folder of engines is not safe.
        InputError: for tf32 on a bundle that is not of float32.
    """

    def __init__(
        self,
        package: Package,
        bundle: Bundle,
        *,
        gpu: Gpu | None,
        tf32: bool = False,
        targets: Sequence[str] | None = None,
        folder: Path | None = None,
        workspace: int | None = None,
        max_bytes: int = MAX_BYTES,
        on_building: OnBuilding | None = None,
    ) -> None:
        bundle.graph(PROVIDER, "step", 0)
        if tf32 and bundle.precision != "float32":
            raise InputError(f"tf32 is of float32 bundles, this one is of {bundle.precision}", hint="leave tf32 out")
        self.package, self.bundle, self.gpu = package, bundle, gpu
        self.precision: str = "tf32" if tf32 else bundle.precision
        self.targets = targets_of(package, gpu, targets)
        self.cache = EngineCache(folder)
        self._workspace, self._max_bytes, self._on_building = workspace, max_bytes, on_building
        self._supplied: set[str] = set()

    def explain(self, block: int, kind: str, profiles: Sequence[Profile]) -> Explanation:
        """The engine for this graph and these shapes, or why there is none; builds nothing."""
        graph = open_graph(self.bundle, block, kind, self.precision)
        return self.cache.explain(self._wanted(graph, profiles), self._source(block), self.gpu)

    def get(
        self,
        block: int,
        kind: str,
        profiles: Sequence[Profile],
        *,
        wider: Sequence[Profile] | None = None,
        rebuild: bool = False,
    ) -> Supplied:
        """The engine for this graph and these shapes; two processes that want the same build it once.

        One that is missing is built for the shapes of `wider`, where they are given.

        Raises:
            EngineError: when it cannot be built or kept, or failed its verification on this GPU.
            Cancelled: when `on_building` returned False.
        """
        graph, source = open_graph(self.bundle, block, kind, self.precision), self._source(block)
        wanted = self._wanted(graph, profiles)
        made = wanted if wider is None else self._wanted(graph, wider)

        def find() -> Supplied | str:
            """The engine that is there and whole, or why there is none."""
            if rebuild:
                return "asked to build it again"
            found = self.cache.explain(wanted, source, self.gpu)
            if found.hit is None:
                self._refuse_failed(found)
                return found.reason
            try:
                return self._supply(graph, found.hit, self.cache.load(found.hit), reason="")
            except EngineError as error:
                if found.hit.key != made.key:  # else it is replaced
                    self.cache.remove(found.hit.key)
                return str(error)

        def wait() -> None:
            if self._tell(graph, 0.0, "another process builds it") is False:
                raise Cancelled(f"the build of the {graph.name} was cancelled")

        if isinstance(found := find(), Supplied):
            return found
        with self.cache.lock(made.key, wait):
            found = find()  # that process may have built it
            return found if isinstance(found, Supplied) else self._build(graph, made, source, found)

    def _wanted(self, graph: Graph, profiles: Sequence[Profile]) -> Wanted:
        return Wanted(
            engine=self.package.engine,
            version=self.package.version,
            host=host(),
            flags=builder_flags(self.package, self.precision),
            precision=self.precision,
            graph=graph.kind,
            graph_digest=graph.digest,
            targets=self.targets,
            profiles=tuple(profiles),
        )

    def _source(self, block: int) -> Source:
        return Source(bundle=self.bundle.path.name, digest=self.bundle.digest, block=block)

    def _build(self, graph: Graph, wanted: Wanted, source: Source, reason: str) -> Supplied:
        timings = self.cache.path / f"timing-{self.package.version}-{self.targets[0]}.bin"
        job = Job(
            graph=graph,
            profiles=wanted.profiles,
            targets=self.targets,
            workspace=self._workspace,
            timing_cache=None if self.package.ahead else timings,
        )
        built = build(self.package, job, lambda share: self._tell(graph, share, reason))
        facts: dict[str, object] = {
            "tarflow_sdk": version("tarflow-sdk"),
            "package": self.package.name,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "gpu": None if self.gpu is None else self.gpu.name,
            "driver": None if self.gpu is None else self.gpu.driver,
            "seconds": dict(built.seconds),
            "workspace": self._workspace,
            "layers": built.layers,
            "cache_updates": graph.cache_updates,
            "warnings": list(built.warnings),
        }
        sidecar = self.cache.store(wanted, source, built.engine, facts, max_bytes=self._max_bytes, keep=self._supplied)
        return self._supply(graph, sidecar, built.engine, reason=reason)

    def _supply(self, graph: Graph, sidecar: Sidecar, engine: bytes, *, reason: str) -> Supplied:
        self._supplied.add(sidecar.key)
        return Supplied(sidecar=sidecar, engine=engine, axes={**graph.inputs, **graph.outputs}, reason=reason)

    def _tell(self, graph: Graph, share: float, reason: str) -> object:
        if self._on_building is None:
            return None
        return self._on_building(Building(block=graph.block, kind=graph.kind, share=share, reason=reason))

    def _refuse_failed(self, found: Explanation) -> None:
        """Refuse rather than build what failed here once more, without being asked."""
        if found.reason == FAILED and found.nearest is not None and self.gpu is not None:
            raise EngineError(
                f"the engine of {found.nearest.name} failed its verification on this {self.gpu.name} with"
                f" {self.gpu.driver}",
                hint="build it again (tarflow build --rebuild) and run tarflow verify, or use another engine",
            )


def targets_of(package: Package, gpu: Gpu | None, targets: Sequence[str] | None) -> tuple[str, ...]:
    """The targets to build for: those requested, else the GPU's, else PORTABLE_TARGETS.

    Raises:
        EngineError: when the package cannot build for one of them.
    """
    if not package.ahead:
        if gpu is None or (targets is not None and tuple(targets) != (gpu.target,)):
            here = "there is none here" if gpu is None else f"this one is {gpu.target}"
            raise EngineError(
                f"{package.title} builds on the GPU that runs the engine, and {here}",
                hint="build on the machine that will run it, or with engine trt-rtx, which needs no GPU",
            )
        return (gpu.target,)
    known = package.targets()
    chosen = tuple(targets) if targets is not None else (gpu.target,) if gpu is not None else PORTABLE_TARGETS
    unknown = [target for target in chosen if target not in known]
    if unknown:
        raise EngineError(
            f"{package.name} cannot build for {', '.join(unknown)}",
            hint=f"it builds for {', '.join(known)}; other GPUs run engine ort-cuda or trt",
        )
    return tuple(sorted(set(chosen), key=list(known).index))


def wanted_engines(bundle: Bundle, profiles: Sequence[Profile]) -> Iterator[tuple[int, str, tuple[Profile, ...]]]:
    """Every graph of a bundle that these shapes of the decode loop need: block, kind, profiles.

    Forward and gradient run large batches in pieces, so that they need no larger profiles.
    """
    limit = density_images(bundle.config)
    whole = tuple(
        dict.fromkeys(Profile(least=one.least, most=min(one.most, limit)) for one in profiles if one.least <= limit)
    )
    kinds = {
        "step": tuple(one for one in profiles if one.patches == 1),
        "window": tuple(one for one in profiles if one.patches > 1),
        "forward": whole,
        "gradient": whole,
    }
    for block in range(len(bundle.blocks)):
        yield from ((block, kind, wanted) for kind, wanted in kinds.items() if wanted)
