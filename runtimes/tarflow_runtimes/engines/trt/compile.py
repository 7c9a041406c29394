"""`compile_engine`: a graph -> an engine as bytes, in this process; `build` runs it in one of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tarflow_runtimes.engines.trt.log import listen
from tarflow_runtimes.engines.trt.network import Graph, Network, add_profiles, parse
from tarflow_runtimes.engines.trt.package import Package
from tarflow_runtimes.engines.trt.profiles import Profile
from tarflow_runtimes.errors import EngineError

OnShare = Callable[[float], object]
"""Called in threads of the library with the share of a build that is done, 0 to 1; returning False cancels."""

DROPPED: Final = "Unused Input"
"""TensorRT's warning that it drops an input, which changes the result."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is built: an engine of a graph that takes these profiles.

    `targets` are for packages that build ahead, the others ignore them. `workspace` bounds the scratch memory of a
    layer, in bytes. `timing_cache` is a file read and written by packages that time kernels.
    """

    graph: Graph
    profiles: tuple[Profile, ...]
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """An engine and facts about its build: layers of the network, warnings, and seconds of parsing and building."""

    engine: bytes
    layers: int
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]


def builder_flags(package: Package, precision: str) -> tuple[str, ...]:
    """The builder flags that are set, by name; all others are cleared.

    Comparisons with NaN must be false, for that is how the decode loop finds it. TensorRT for RTX must not allocate
    memory itself: a launch is captured into a CUDA graph.
    """
    own = ("REQUIRE_USER_ALLOCATION",) if package.ahead else ()
    return ("STRICT_NANS", *own, *(("TF32",) if precision == "tf32" else ()))


def compile_engine(package: Package, job: Job, on_share: OnShare | None = None) -> Built:
    """Do a job.

    Raises:
        EngineError: when TensorRT cannot parse or build the graph, or is cancelled.
    """
    graph = job.graph
    began = time.perf_counter()
    network = parse(package, graph)
    parsed = time.perf_counter()
    config = _configured(package, graph, network, job.workspace)
    add_profiles(package, graph, network, config, job.profiles)
    if package.ahead:
        known = package.targets()
        config.num_compute_capabilities = len(job.targets)
        for index, target in enumerate(job.targets):
            config.set_compute_capability(known[target], index)
    if on_share is not None:
        config.progress_monitor = _monitor(package.module)(on_share)
    with _timings(package, config, job.timing_cache), listen() as heard:
        engine = network.builder.build_serialized_network(network.network, config)
    dropped = [line for line in heard.warnings if DROPPED in line]
    if engine is None or dropped:
        why = next(iter((*heard.errors, *dropped)), "no reason given")
        raise EngineError(f"{package.name} cannot build the {graph.name}: {why}", hint="use another engine")
    return Built(
        engine=bytes(memoryview(engine)),
        layers=network.layers,
        warnings=(*network.warnings, *heard.warnings),
        seconds={"parse": parsed - began, "build": time.perf_counter() - parsed},
    )


def _configured(package: Package, graph: Graph, network: Network, workspace: int | None) -> Any:
    trt = package.module
    config = network.builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # set by default, and rounds the inputs of float32 products to 10 bits
    for flag in builder_flags(package, graph.precision):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    return config


@contextlib.contextmanager
def _timings(package: Package, config: Any, path: Path | None) -> Iterator[None]:
    """Let builds share kernel timings in a file; a file of another GPU or version is replaced."""
    if package.ahead or path is None:
        yield
        return
    known = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    yield
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
    partial.replace(path)


@functools.cache
def _monitor(module: Any) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Combines the progress of nested phases into one share; the library calls it from its own threads."""

        def __init__(self, on_share: OnShare) -> None:
            module.IProgressMonitor.__init__(self)
            self._on_share = on_share
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}
            self._share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._phases:
                    parent, _, steps = self._phases[phase_name]
                    self._phases[phase_name] = (parent, step + 1, steps)
                self._share = max(self._share, _share(self._phases))
                return self._on_share(self._share) is not False

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

    return Monitor


def _share(phases: Mapping[str, tuple[str | None, int, int]]) -> float:
    """Of the phases that are open, by name (the one around it, steps done, steps), each is one step of that one."""
    inside = {parent: (name, done, max(1, steps)) for name, (parent, done, steps) in phases.items()}
    share, outer, parent = 0.0, 1.0, None
    while parent in inside and outer > 0.0:
        parent, done, steps = inside.pop(parent)
        share += outer * done / steps
        outer /= steps
    return min(1.0, share)
