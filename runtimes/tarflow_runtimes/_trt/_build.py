"""`build`: a network -> an engine as bytes, with progress and cancellation.

TensorRT builds in a thread of its own while the caller's thread waits: Python raises an interrupt in the main thread
only, and an exception must not run through the library's frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tarflow_runtimes._errors import Cancelled, EngineError
from tarflow_runtimes._trt._log import listen
from tarflow_runtimes._trt._network import Graph, Network, add_profiles, parse
from tarflow_runtimes._trt._package import Package
from tarflow_runtimes._trt._profiles import Profile

OnBuild = Callable[[float], object]
"""Hears, in the caller's thread, which share of a build is done, 0 to 1; returning False cancels."""

DROPPED: Final = "Unused Input"
"""How TensorRT warns that it leaves an input out, which changes what is computed."""

POLL_SECONDS: Final = 0.1
"""How often the caller's thread looks: this, and the longest step of the library, bound how long a cancel takes."""

_building = threading.Lock()
"""One build at a time in a process: they would share the logger, the cores and the GPU that kernels are timed on."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """An engine and how it came about: layers of the network, warnings, and the seconds of parsing and building."""

    engine: bytes
    flags: tuple[str, ...]
    layers: int
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]


def builder_flags(package: Package, precision: str) -> tuple[str, ...]:
    """The builder flags that are set, by name; all others are cleared.

    TensorRT for RTX must not allocate memory itself: a launch is captured into a CUDA graph.
    """
    own = ("REQUIRE_USER_ALLOCATION",) if package.ahead else ()
    return (*own, *(("TF32",) if precision == "tf32" else ()))


def build(
    package: Package,
    graph: Graph,
    profiles: Sequence[Profile],
    *,
    targets: Sequence[str] = (),
    workspace: int | None = None,
    timing_cache: Path | None = None,
    on_build: OnBuild | None = None,
) -> Built:
    """Build an engine that takes these profiles; `targets` are for packages that build ahead, the others ignore them.

    `workspace` bounds the scratch memory of a layer, in bytes. `timing_cache` is read and written by packages that
    time kernels.

    Raises:
        EngineError: when TensorRT cannot parse or build the graph.
        Cancelled: when `on_build` returned False.
    """
    with _building:
        began = time.perf_counter()
        network = parse(package, graph)
        parsed = time.perf_counter()
        config = _configured(package, graph, network, workspace)
        add_profiles(package, graph, network, config, profiles)
        if package.ahead:
            known = package.targets()
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                config.set_compute_capability(known[target], index)
        with _timings(package, config, timing_cache), listen() as heard:
            engine = _run(package, graph.name, network, config, on_build)
        for line in heard.warnings:
            if DROPPED in line:
                raise EngineError(f"{package.name} cannot build the {graph.name}: {line}", hint="use another engine")
        return Built(
            engine=engine,
            flags=builder_flags(package, graph.precision),
            layers=network.layers,
            warnings=(*network.warnings, *heard.warnings),
            seconds={"parse": parsed - began, "build": time.perf_counter() - parsed},
        )


def _configured(package: Package, graph: Graph, network: Network, workspace: int | None) -> Any:
    trt = package.module
    config = network.builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # set unless cleared, and it rounds float32 products to 10 bits
    for flag in builder_flags(package, graph.precision):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    return config


@contextlib.contextmanager
def _timings(package: Package, config: Any, path: Path | None) -> Iterator[None]:
    """Let builds share the times of kernels in a file; one that is of another GPU or version is started anew."""
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


def _run(package: Package, name: str, network: Network, config: Any, on_build: OnBuild | None) -> bytes:
    """Build in another thread until it is done or cancelled; `name` is that of the graph."""
    monitor = _monitor(package.module)()
    config.progress_monitor = monitor
    outcome: list[bytes | BaseException] = []
    done = threading.Event()  # and not `join`: an interrupt in it lets Python 3.11 take the thread for ended

    def work() -> None:
        try:
            made = network.builder.build_serialized_network(network.network, config)
            outcome.append(b"" if made is None else bytes(memoryview(made)))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            outcome.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="tarflow-trt-build", daemon=True)
    with listen() as heard:
        thread.start()
        try:
            while not done.wait(POLL_SECONDS):
                if on_build is not None and on_build(monitor.share()) is False:
                    monitor.cancelled = True
                    break
        except BaseException:
            monitor.cancelled = True
            raise
        finally:
            done.wait()
            thread.join()
            config.progress_monitor = None
    result = outcome[0]
    if isinstance(result, BaseException):
        raise EngineError(f"{package.name} failed on the {name}: {result}") from result
    if monitor.cancelled:
        raise Cancelled(f"the build of the {name} was cancelled")
    if not result:
        why = next(iter(heard.errors), "no reason given")
        raise EngineError(f"{package.name} cannot build the {name}: {why}", hint="use another engine or dtype")
    return result


@functools.cache
def _monitor(module: Any) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Nested phases, each of a number of steps, as one share; the library calls it from its own threads."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.cancelled = False
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
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)

        def share(self) -> float:
            """Of the phases that are open, each one step of the one around it; never less than before."""
            with self._lock:
                phases = dict(self._phases)
            share, outer = 0.0, 1.0
            parent: str | None = None
            while inner := next((name for name, phase in phases.items() if phase[0] == parent), None):
                _, done, steps = phases.pop(inner)
                share += outer * min(1.0, done / max(1, steps))
                outer /= max(1, steps)
                parent = inner
            self._share = max(self._share, min(1.0, share))
            return self._share

    return Monitor
