"""`TrtMaker`: TensorRT and TensorRT for RTX behind the device loop. One class for both; `Package` knows the difference.

The engine of a graph serves all shapes that its profiles allow, so that the weights lie on the GPU once. Every binding
is an execution context of its own: a CUDA graph depends on the state of the context that it was captured from. They
take turns on one stream and share their scratch memory.

Source: TensorRT documentation, "CUDA graphs" and "sharing device memory between contexts".
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.engines.api import Engine
from tarflow_runtimes.engines.gpu.cuda import CudaDevice
from tarflow_runtimes.engines.gpu.device import Bound, Buffer, Device, Replay, TensorSpec
from tarflow_runtimes.engines.gpu.engine import DeviceEngine
from tarflow_runtimes.engines.trt.gpu import gpu_of
from tarflow_runtimes.engines.trt.graphs import PROVIDER
from tarflow_runtimes.engines.trt.log import listen
from tarflow_runtimes.engines.trt.package import import_package
from tarflow_runtimes.engines.trt.profiles import Profile, shape_of
from tarflow_runtimes.engines.trt.runtime import Kernels, LoadedEngine
from tarflow_runtimes.engines.trt.sidecar import Sidecar
from tarflow_runtimes.engines.trt.supply import OnBuilding, Supply


def open_trt(
    bundle: Bundle,
    engine: str,
    *,
    tf32: bool = False,
    folder: Path | None = None,
    on_building: OnBuilding | None = None,
) -> DeviceEngine:
    """Engine `trt` or `trt-rtx`; with `tf32` the factors of a float32 bundle's products may be rounded to 11 bits.

    TensorRT's engines are kept in `folder`, or in the user's cache folder. Those that are missing are built when they
    are first needed, while `on_building` is called and may cancel.

    Raises:
        EngineError: when the package, its libraries, the driver or the GPU is missing, when the package cannot build
            for this GPU, or the bundle has no graphs for TensorRT.
        InputError: for tf32 on a bundle that is not of float32.
    """
    package, device = import_package(engine), CudaDevice()
    supply = Supply(package, bundle, gpu=gpu_of(device), tf32=tf32, folder=folder, on_building=on_building)
    return DeviceEngine(bundle, TrtMaker(supply, device))


def record_verification(engine: Engine, *, passed: bool, facts: Mapping[str, Any]) -> int:
    """Write the result of a verification into the sidecars of the engines used, if this is a TensorRT engine.

    `facts` are JSON values for people. An engine that failed is refused from then on, on this GPU and driver. Returns
    the number of sidecars.

    Raises:
        EngineError: when a sidecar cannot be written.
    """
    maker = engine.maker if isinstance(engine, DeviceEngine) else None
    if not isinstance(maker, TrtMaker):
        return 0
    for sidecar in maker.used.values():
        maker.supply.cache.record_verification(sidecar, maker.gpu, passed=passed, facts=facts)
    return len(maker.used)


class TrtMaker:
    """Programs of a bundle through TensorRT (`trt`) or TensorRT for RTX (`trt-rtx`); `used` are its engines by key."""

    provider = PROVIDER

    def __init__(self, supply: Supply, device: CudaDevice) -> None:
        self.supply, self.name, self.precision = supply, supply.package.engine, supply.precision
        self.device: Device = device
        self.gpu = gpu_of(device)
        self.used: dict[str, Sidecar] = {}
        self._cuda = device
        self._kernels = Kernels(supply.cache, supply.package, self.gpu.target)
        self._loaded: weakref.WeakValueDictionary[str, LoadedEngine] = weakref.WeakValueDictionary()
        self._places: dict[tuple[int, str], set[str]] = {}
        self._scratch: Buffer | None = None
        self._patches = supply.bundle.config.patches

    def program(self, block: int, kind: str, *, images: int, branches: int = 1, window: int = 1) -> TrtProgram:
        """A graph of a block for B images, G branches and S = `window` patches at once."""
        engine, profile = self._engine(block, kind, images, branches, window)
        nbytes = engine.scratch_bytes
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = self.device.allocate(max(nbytes, 1))  # programs keep the one they began with
        sizes = engine.profiles[profile].sizes(images, self._patches)
        return TrtProgram(engine, profile, self._cuda, self._scratch, sizes)

    def report(self) -> Mapping[str, Any]:
        """The package, the GPU, and the engines in use."""
        return {
            "package": self.supply.package.name,
            "gpu": dataclasses.asdict(self.gpu),
            "engines": list(self.used),
            "folder": str(self.supply.cache.path),
        }

    def _engine(self, block: int, kind: str, images: int, branches: int, patches: int) -> tuple[LoadedEngine, int]:
        """An engine that takes calls of these sizes, and the number of its profile: loaded, kept or built."""
        keys = self._places.setdefault((block, kind), set())
        for key in keys:
            engine = self._loaded.get(key)
            if engine is not None and (index := engine.profile_for(images, branches, patches)) is not None:
                return engine, index
        profile = Profile(least=images, most=images, branches=branches, patches=patches)
        supplied = self.supply.get(block, kind, [profile], wider=[dataclasses.replace(profile, least=1)])
        key = supplied.sidecar.key
        self.device.synchronize()  # makes its GPU this thread's
        loaded = LoadedEngine(self.supply.package, supplied, self._kernels)
        self._loaded[key] = loaded
        self.used[key] = supplied.sidecar
        keys.add(key)
        found = loaded.profile_for(images, branches, patches)
        assert found is not None  # the engine was chosen for it
        return loaded, found


class TrtProgram:
    """One graph at fixed shapes: an engine, a profile of it, and the size of every axis."""

    def __init__(
        self, engine: LoadedEngine, profile: int, device: CudaDevice, scratch: Buffer, sizes: Mapping[str, int]
    ) -> None:
        self.engine, self.profile, self.device, self.scratch = engine, profile, device, scratch
        specs = {name: TensorSpec(shape_of(axes, sizes), engine.dtype(name)) for name, axes in engine.axes.items()}
        is_input = dict(engine.tensors())
        self.inputs = {name: spec for name, spec in specs.items() if is_input[name]}
        self.outputs = {name: spec for name, spec in specs.items() if not is_input[name]}

    def bind(self, addresses: Mapping[str, int], *, kv_length: int | None = None) -> TrtBound:
        """A context with every input and output at its address; updated ones are at that of their input."""
        return TrtBound(self, addresses, kv_length)

    def record(self, launches: Sequence[Bound]) -> Replay:
        """A CUDA graph of some launches, each of which has run before: a context sets itself up at its first run."""

        def launch() -> None:
            for bound in launches:
                bound.launch()

        return self.device.capture(launch)


class TrtBound:
    """An execution context that is never changed once it is made, because recordings depend on its state.

    Raises:
        EngineError: when TensorRT refuses a shape or an address, or yields other shapes than the graph says.
    """

    def __init__(self, program: TrtProgram, addresses: Mapping[str, int], kv_length: int | None) -> None:
        self._program = program
        engine, scratch = program.engine, program.scratch
        self._context = context = engine.context(program.profile, program.device.stream)
        with listen() as heard:
            context.set_device_memory(scratch.address, scratch.nbytes)  # refuses by a message alone
            if heard.errors:
                raise engine.refused("run", heard)
            for name, spec in program.inputs.items():
                shape = (kv_length,) if name == "kv_positions" else spec.shape
                if not context.set_input_shape(name, shape):
                    raise engine.refused("run", heard)
            for name in (*program.inputs, *program.outputs):
                if not context.set_tensor_address(name, addresses[name]):
                    raise engine.refused("run", heard)
            for name, spec in program.outputs.items():
                if tuple(context.get_tensor_shape(name)) != spec.shape:
                    raise engine.refused(f"make {name} of shape {list(spec.shape)} with", heard)

    def launch(self) -> None:
        """Run the graph once; asynchronous."""
        program = self._program
        with listen() as heard:
            if not self._context.execute_async_v3(program.device.stream):
                raise program.engine.refused("run", heard)
