"""`LoadedEngine`: an engine on the GPU, checked for the requirements of the device loop.

Launches are captured into CUDA graphs, and a captured graph must be what it was compared with. Hence kernels for a
shape are compiled when the shape is first met, not in the background, and TensorRT captures no graphs of its own.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from tarflow_runtimes.engines.trt.cache import EngineCache
from tarflow_runtimes.engines.trt.log import Heard, listen, logger
from tarflow_runtimes.engines.trt.package import Package
from tarflow_runtimes.engines.trt.profiles import Profile
from tarflow_runtimes.engines.trt.supply import Supplied
from tarflow_runtimes.errors import EngineError

UPDATED: Final = ("finished", "key_", "value_")
"""How the names of the inputs begin that a graph updates in place; the output is `next_` and the name."""

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),  # NumPy has no bfloat16, and nothing on the host reads one
    "INT64": np.dtype(np.int64),
}


class LoadedEngine:
    """A deserialised engine; its weights lie on the GPU as long as it lives. One thread at a time uses it.

    Raises:
        EngineError: when the package refuses the engine, or it does not update in place what it should.
    """

    def __init__(self, package: Package, supplied: Supplied, kernels: Kernels) -> None:
        self.package, self.sidecar, self.axes = package, supplied.sidecar, supplied.axes
        trt = package.module
        with listen() as heard:
            runtime = trt.Runtime(logger(package))
            runtime.engine_host_code_allowed = False
            self.engine = runtime.deserialize_cuda_engine(supplied.engine)
        if self.engine is None:
            raise self.refused("load", heard)
        self._runtime = runtime  # must outlive the engine
        self._check_tensors()
        self._kernels = kernels
        self._how = self._configured()

    @property
    def profiles(self) -> Sequence[Profile]:
        """The shapes that it takes, by the number of the profile."""
        return self.sidecar.made.profiles

    def profile_for(self, images: int, branches: int, patches: int) -> int | None:
        """The number of the profile for a call of these sizes, if there is one."""
        fitting = (i for i, one in enumerate(self.profiles) if one.takes(images, branches, patches))
        return next(fitting, None)

    def tensors(self) -> Iterator[tuple[str, bool]]:
        """Every input and output: its name, and whether it is an input."""
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            yield name, self.engine.get_tensor_mode(name) == self.package.module.TensorIOMode.INPUT

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of an input or output.

        Raises:
            EngineError: for one that no graph of ours has.
        """
        found = self.engine.get_tensor_dtype(name).name
        if found not in DTYPES:
            raise EngineError(f"the engine of {self.sidecar.name} has {name} in {found}, which no graph of ours has")
        return DTYPES[found]

    def context(self, profile: int, stream: int) -> Any:
        """A new execution context on a profile, with neither shapes nor scratch memory yet.

        Raises:
            EngineError: when there is not enough memory for it.
        """
        with listen() as heard:
            context = self.engine.create_execution_context(self._how)
            if context is None or not context.set_optimization_profile_async(profile, stream):
                raise self.refused("run", heard)
        return context

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory that a context needs, whatever its profile."""
        return int(self.engine.device_memory_size_v2)

    def refused(self, what: str, heard: Heard) -> EngineError:
        """The error for a failure of TensorRT, with its first message."""
        why = next(iter(heard.errors), "no reason given")
        return EngineError(
            f"{self.package.name} cannot {what} the engine of {self.sidecar.name}: {why}",
            hint="see tarflow doctor, and tarflow cache explain; tarflow build --rebuild builds it again",
        )

    def _configured(self) -> Any:
        """How contexts are made: a strategy, or for TensorRT for RTX a configuration, which must outlive them."""
        trt = self.package.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.package.ahead:
            return strategy
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._kernels.attach(config)
        return config

    def _check_tensors(self) -> None:
        """Check that all tensors are on the GPU, and that exactly the in-place outputs share memory with an input."""
        trt = self.package.module
        for name, is_input in self.tensors():
            if self.engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineError(f"the engine of {self.sidecar.name} wants {name} in the host's memory")
            if is_input:
                continue
            state = name.removeprefix("next_")
            expected = state if name != state and state.startswith(UPDATED) else None
            found = self.engine.get_aliased_input_tensor(name) or None
            if found != expected:
                raise EngineError(
                    f"the engine of {self.sidecar.name} writes {name} to the memory of {found}, expected {expected}",
                    hint="use another engine, or another version of the package",
                )


class Kernels:
    """TensorRT for RTX: the kernels that were compiled on this GPU. All engines share them: blocks differ in weights.

    They are read from a file beside the engines, and written when they are no longer used. They must outlive every
    context that was made with them.
    """

    def __init__(self, cache: EngineCache, package: Package, target: str) -> None:
        self._cache, self._name = cache, f"kernels-{package.version}-{target}.bin"
        self._shared: Any = None

    def attach(self, config: Any) -> None:
        """Let an engine use them through its runtime configuration."""
        if self._shared is None:
            self._shared = config.create_runtime_cache()
            blob = self._cache.load_beside(self._name)
            if blob:
                self._shared.deserialize(blob)  # refuses those of another GPU or driver; they are compiled again
            digest = hashlib.sha256(blob).digest()
            weakref.finalize(self, _keep, self._cache, self._name, self._shared, digest)
        config.set_runtime_cache(self._shared)


def _keep(cache: EngineCache, name: str, kernels: Any, before: bytes) -> None:
    """Store kernels that are not those loaded."""
    blob = bytes(memoryview(kernels.serialize()))
    if hashlib.sha256(blob).digest() != before:
        cache.store_beside(name, blob)
