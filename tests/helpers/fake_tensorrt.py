"""Modules with the interface of `tensorrt` and `tensorrt_rtx` as far as we use it, over ONNX Runtime and host memory.

An engine is the model with its weights and profiles, pickled. Addresses are those of this process, and a launch runs
at once. What NVIDIA's documentation demands is checked: shapes within the profile, an address for every tensor, the
same one for aliased tensors, scratch memory that is large enough and aligned. Scratch memory is soiled by each launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib.machinery
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from host_device import HostDevice
from tarflow_runtimes.engines.trt import engine as trt_engine
from tarflow_runtimes.engines.trt import package as trt_package
from tarflow_runtimes.engines.trt import supply
from tarflow_runtimes.engines.trt.compile import compile_engine
from tarflow_runtimes.engines.trt.gpu import Gpu

SCRATCH_PER_IMAGE = 4096
recording = False
"""Whether launches are being captured into a graph: then they do nothing, and a context must have run before."""
ALIASED = ("finished", "key_", "value_")


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None: ...


class IProgressMonitor: ...


class DataType(enum.Enum):
    FLOAT, HALF, INT64, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64, 6


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class LayerType(enum.Enum):
    KV_CACHE_UPDATE, OTHER = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class BuilderFlag(enum.Enum):
    TF32, REQUIRE_USER_ALLOCATION, STRICT_NANS = range(3)


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ComputeCapability(enum.Enum):
    NONE, CURRENT, SM80, SM86, SM89, SM120 = range(6)


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER = range(2)


class _Tensor:
    is_shape_tensor = False

    def __init__(self, network: Network, name: str) -> None:
        self.name = name
        self.is_network_input = name in {value.name for value in network.model.graph.input}
        self.is_network_output = name in {value.name for value in network.model.graph.output}


class _Layer:
    def __init__(self, network: Network, node: onnx.NodeProto) -> None:
        self.type = LayerType.KV_CACHE_UPDATE if node.op_type == "TensorScatter" else LayerType.OTHER
        self._network, self._node = network, node
        self.num_inputs = len(node.input)

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self._network, self._node.input[index])

    def get_output(self, index: int) -> _Tensor:
        return _Tensor(self._network, self._node.output[index])


class Network:
    def __init__(self) -> None:
        self.model = onnx.ModelProto()

    num_layers = property(lambda self: len(self.model.graph.node))
    num_inputs = property(lambda self: len(self.model.graph.input))

    def get_layer(self, index: int) -> _Layer:
        return _Layer(self, self.model.graph.node[index])

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self, self.model.graph.input[index].name)


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network, self._logger = network, logger

    def parse(self, model: bytes, path: str) -> bool:
        loaded = onnx.load_from_string(model)
        onnx.external_data_helper.load_external_data_for_model(loaded, str(Path(path).parent))
        self._network.model.CopyFrom(loaded)
        self._logger.log(Severity.WARNING, "Make sure input position has Int64 binding.")
        return True


class Profile(dict):
    def set_shape(self, name: str, least: tuple, usual: tuple, most: tuple) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        self[name] = (least, most)


class Config:
    def __init__(self) -> None:
        self.flags, self.profiles, self.targets = {BuilderFlag.TF32}, [], {}
        self.progress_monitor = None
        self.num_compute_capabilities = 0

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None: ...

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_compute_capability(self, capability: ComputeCapability, index: int) -> None:
        self.targets[index] = capability

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self._timing_cache = cache
        return cache.data in {b"", TimingCache.known}

    def get_timing_cache(self) -> TimingCache:
        return self._timing_cache


class TimingCache:
    known = b"times"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.known


class Builder:
    built = 0

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        type(self).built += 1
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            if not monitor.step_complete("Building", step):
                self._logger.log(Severity.ERROR, "build cancelled")
                return None
        monitor.phase_finish("Building")
        return pickle.dumps((network.model.SerializeToString(), [dict(one) for one in config.profiles]))


class Runtime:
    engine_host_code_allowed = True

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> CudaEngine | None:
        assert not self.engine_host_code_allowed
        return CudaEngine(*pickle.loads(data))


class RuntimeCache:
    def __init__(self) -> None:
        self.blob = b""

    def serialize(self) -> bytes:
        return self.blob

    def deserialize(self, blob: bytes) -> bool:
        self.blob = bytes(blob)
        return True


class RuntimeConfig:
    runtime_cache: Any = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.runtime_cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class CudaEngine:
    def __init__(self, model: bytes, profiles: list[dict[str, Any]]) -> None:
        self.profiles = profiles
        self.graph = onnx.load_from_string(model).graph
        self.values = {value.name: value for value in (*self.graph.input, *self.graph.output)}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    num_io_tensors = property(lambda self: len(self.values))

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = {value.name for value in self.graph.input}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.values[name].type.tensor_type.elem_type)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        state = name.removeprefix("next_")
        return state if state != name and state.startswith(ALIASED) else None

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH_PER_IMAGE * max(shapes[1][0] for profile in self.profiles for shapes in profile.values())

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: Any) -> ExecutionContext:
        return ExecutionContext(self, how)


class ExecutionContext:
    def __init__(self, engine: CudaEngine, how: Any) -> None:
        self._cache = getattr(how, "runtime_cache", None)
        assert getattr(how, "strategy", how) == ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine, self._shapes, self._addresses = engine, {}, {}
        self._profile = 0
        self._ran = False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return index < len(self._engine.profiles)

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        assert address % 256 == 0
        self._scratch = (address, size)

    def _axes(self, name: str) -> list[int | str]:
        dims = self._engine.values[name].type.tensor_type.shape.dim
        return [dim.dim_param or dim.dim_value for dim in dims]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        if name not in self._engine.profiles[self._profile]:
            return list(shape) == self._axes(name)
        least, most = self._engine.profiles[self._profile][name]
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {
            axis: size
            for given, shape in self._shapes.items()
            for axis, size in zip(self._axes(given), shape, strict=True)
        }
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self._axes(name))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.values

    def _array(self, name: str) -> np.ndarray:
        shape = self._shapes.get(name) or self.get_tensor_shape(name)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self._engine.values[name].type.tensor_type.elem_type)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_uint8 * nbytes).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        if set(self._addresses) != set(engine.values) or set(self._shapes) != {one.name for one in engine.graph.input}:
            return False
        for value in engine.graph.output:
            alias = engine.get_aliased_input_tensor(value.name)
            if alias is not None and self._addresses[alias] != self._addresses[value.name]:
                return False
        if recording:
            return self._ran
        self._ran = True
        ctypes.memset(self._scratch[0], 0xFF, self._scratch[1])
        names = [value.name for value in engine.graph.output]
        made = engine.session.run(names, {value.name: self._array(value.name).copy() for value in engine.graph.input})
        for name, array in zip(names, made, strict=True):
            self._array(name)[...] = array
        if self._cache is not None:
            self._cache.blob = b"%d launches" % (int(self._cache.blob.split()[0] if self._cache.blob else 0) + 1)
        return True


def build(package: Any, job: Any, on_build: Any = None) -> Any:
    """What `build` does, in this process: the fake package is not in another."""
    return compile_engine(package, job, on_build)


MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}
GPU = Gpu(name="Host GPU", target="sm_89", driver="CUDA 13.0")


def module(engine: str) -> types.ModuleType:
    """The module behind engine `trt` or `trt-rtx`."""
    made = types.ModuleType(MODULES[engine])
    made.__spec__ = importlib.machinery.ModuleSpec(made.__name__, None)  # PyTorch looks whether it is installed
    made.__version__ = "11.4.0" if engine == "trt" else "1.7.1"
    only = {"trt": {"NetworkDefinitionCreationFlag"}, "trt-rtx": {"ComputeCapability", "CudaGraphStrategy"}}
    only["trt-rtx"].add("DynamicShapesKernelSpecializationStrategy")
    absent = only["trt-rtx" if engine == "trt" else "trt"]
    for name, value in list(globals().items()):
        if isinstance(value, type) and name not in absent:
            setattr(made, name, value)
    made.Builder = type("Builder", (Builder,), {"built": 0})
    return made


class HostGpu(HostDevice):
    """The host's memory under a GPU's name."""

    stream = 7
    capability = (8, 9)

    def capture(self, launch: Any) -> Any:
        global recording  # noqa: PLW0603
        recording = True
        try:
            launch()
        finally:
            recording = False
        return super().capture(launch)


@contextlib.contextmanager
def package(engine: str, found: object) -> Iterator[None]:
    """Let `found` be the only package of an engine; it is not installed where this is None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, MODULES[engine], found)
        patch.setattr(trt_package, "owners", lambda _: [])
        trt_package.import_package.cache_clear()
        yield
    trt_package.import_package.cache_clear()


@contextlib.contextmanager
def stand_in(engine: str) -> Iterator[None]:
    """Let an engine run on the fake package, with the host's memory in place of the GPU."""
    with package(engine, module(engine)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(supply, "build", build)
        patch.setattr(trt_engine, "CudaDevice", HostGpu)
        patch.setattr(trt_engine, "gpu_of", lambda _: GPU)
        yield
