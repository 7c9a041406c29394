"""`OrtMaker`: programs of ONNX Runtime on the GPU, made from the graphs of `ort-cuda` with every axis fixed.

Inputs and outputs are bound to addresses of the device; nothing is copied. ONNX Runtime works on the device's stream
and does not wait for it, no node may run on the CPU, and recordings are ONNX Runtime's own CUDA graphs, one per
binding: the stream cannot be captured around its runs, which it may synchronise or allocate in.

Source: onnxruntime docs, CUDA execution provider; onnxruntime_run_options_config_keys.h.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.bundle.reader import PORTABLE, Bundle
from tarflow_runtimes.engines.gpu.device import Bound, Device, Replay, TensorSpec
from tarflow_runtimes.engines.gpu.workspace import IN_PLACE
from tarflow_runtimes.engines.onnxruntime import import_onnxruntime
from tarflow_runtimes.engines.ort_cpu.session import first_line
from tarflow_runtimes.errors import EngineError

NAME: Final = "ort-cuda"

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(np.uint16),  # NumPy has none
    "tensor(int64)": np.dtype(np.int64),
}
"""ONNX Runtime's names of the types in our graphs."""

BFLOAT16: Final = 16
"""TensorProto.DataType, which a binding accepts for types that NumPy lacks."""

LOOPS: Final = ("step", "window")
"""The kinds of graphs that are launched repeatedly."""

NO_GRAPH: Final = -1
"""The graph id with which ONNX Runtime neither records nor replays."""

MAPS: Final = Path("/proc/self/maps")
LIBRARIES: Final = ("libcuda.", "libcudart.", "libcublas", "libcudnn", "libcurand.", "onnxruntime")
"""The file in which Linux lists the libraries of a process, and the names to search for."""


class OrtBound:
    """A session with everything bound; `graph` is the id under which its launches are recorded, or NO_GRAPH."""

    def __init__(self, program: OrtProgram, binding: Any, graph: int) -> None:
        from onnxruntime import RunOptions

        self.program, self.binding = program, binding
        self.recorded: OrtBound | None = None
        self._options = RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._options.add_run_config_entry("gpu_graph_id", str(graph))

    def launch(self) -> None:
        """Run once, without waiting for the GPU."""
        self.program.on_thread(self.run)

    def run(self) -> None:
        """Run once, in the thread of the maker."""
        try:
            self.program.session.run_with_iobinding(self.binding, self._options)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed in a run: {first_line(error)}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class OrtReplay:
    """Launches of bindings that ONNX Runtime records at the first of them, which it therefore runs several times."""

    program: OrtProgram
    launches: Sequence[OrtBound]

    def replay(self) -> None:
        """Launch each of the bindings."""
        self.program.on_thread(self._run)

    def _run(self) -> None:
        for launch in self.launches:
            launch.run()


class OrtProgram:
    """One session of static shapes, which runs in `thread`; `graphs` says whether it records."""

    def __init__(self, session: Any, device: Device, thread: ThreadPoolExecutor, *, graphs: bool) -> None:
        self.session, self._device, self._thread, self._graphs = session, device, thread, graphs
        self.inputs = {value.name: _spec(value) for value in session.get_inputs()}
        self.outputs = {value.name: _spec(value) for value in session.get_outputs()}
        self._numbers = itertools.count(1)

    def bind(self, addresses: Mapping[str, int], *, kv_length: int | None = None) -> OrtBound:  # noqa: ARG002 - these graphs read whole caches
        """Bind every input and output."""
        binding = self.session.io_binding()
        kind = self._device.kind
        for name, spec in self.inputs.items():
            binding.bind_input(name, kind, 0, _element_type(spec), spec.shape, addresses[name])
        for name, spec in self.outputs.items():
            binding.bind_output(name, kind, 0, _element_type(spec), spec.shape, addresses[name])
        return OrtBound(self, binding, NO_GRAPH)

    def record(self, launches: Sequence[Bound]) -> Replay:
        """The same bindings, each under its own graph id; without CUDA graphs, the launches themselves."""
        bounds = [bound for bound in launches if isinstance(bound, OrtBound)]
        return OrtReplay(self, [self._with_graph(bound) if self._graphs else bound for bound in bounds])

    def on_thread(self, work: Callable[[], None]) -> None:
        """Run a function in the thread of all sessions of the maker; it completes even if the caller is interrupted."""
        doing = self._thread.submit(work)
        try:
            doing.result()
        finally:
            wait([doing])

    def _with_graph(self, bound: OrtBound) -> OrtBound:
        bound.recorded = bound.recorded or OrtBound(self, bound.binding, next(self._numbers))
        return bound.recorded


def _element_type(spec: TensorSpec) -> Any:
    """The name of a dtype in a binding."""
    return BFLOAT16 if spec.dtype == np.uint16 else spec.dtype.type


def _spec(value: Any) -> TensorSpec:
    """Shape and dtype of an input or output."""
    return TensorSpec(tuple(value.shape), DTYPES[value.type])


class OrtMaker:
    """ONNX Runtime on a device, through the execution provider `execution` with its `options`.

    Raises:
        EngineError: when the bundle has no graphs for this engine, or ONNX Runtime refuses one, would run a node of it
            on the CPU, or updates a cache wrongly.
    """

    name = provider = NAME
    required: ClassVar[Mapping[str, str]] = {"session.disable_cpu_ep_fallback": "1"}
    """Options of every session, except the one that finds which nodes would run on the CPU."""

    def __init__(
        self, bundle: Bundle, device: Device, *, precision: str, execution: str, options: Mapping[str, str]
    ) -> None:
        bundle.graph(self.provider, "step", 0)
        self.device, self.precision = device, precision
        self._ort = import_onnxruntime(NAME)
        self._bundle, self._execution, self._options = bundle, execution, dict(options)
        self._without_graphs = ""
        self._in_place = False
        # A session keeps separate handles and recordings for every thread that runs it, as long as it lives.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tarflow-ort")

    def program(self, block: int, kind: str, *, images: int, branches: int = 1, window: int = 1) -> OrtProgram:
        """A graph of a block, every axis frozen; the decode loop records, or else the report says why it does not."""
        sizes = {"B": images, "G": branches, "R": branches * images, "S": window, "S + 1": window + 1}
        if kind not in LOOPS:
            return self._open(block, PORTABLE, kind, sizes, graphs=False)
        if not self._in_place:  # once, where it takes little memory
            check_in_place(self.device, self._loop(block, "step", {"B": 1, "G": 1, "R": 1}), self._bundle.config)
            self._in_place = True
        return self._loop(block, kind, sizes)

    def report(self) -> Mapping[str, Any]:
        """Versions, provider, whether CUDA graphs are used, and the libraries of CUDA that are loaded."""
        return {
            "onnxruntime": self._ort.__version__,
            "provider": self._execution,
            "cuda_graphs": self._without_graphs or "on",
            "libraries": loaded_libraries(),
        }

    def _loop(self, block: int, kind: str, sizes: Mapping[str, int]) -> OrtProgram:
        if not self._without_graphs:
            try:
                return self._open(block, self.provider, kind, sizes, graphs=True)
            except EngineError as error:
                if "graph capture" not in str(error):
                    raise
                self._without_graphs = str(error)
        return self._open(block, self.provider, kind, sizes, graphs=False)

    def _open(self, block: int, provider: str, kind: str, sizes: Mapping[str, int], *, graphs: bool) -> OrtProgram:
        """The program of a graph of a block, its axes frozen to `sizes`."""
        path = self._bundle.graph(provider, kind, block)
        model = self._bundle.read(path)
        options = self._session_options(block, sizes)
        for name, value in self.required.items():
            options.add_session_config_entry(name, value)
        given = self._options | ({"enable_cuda_graph": "1"} if graphs else {})
        try:
            session = self._ort.InferenceSession(model, options, providers=[(self._execution, given)])
        except Exception as error:
            if "fallback to CPU EP" in str(error):
                raise EngineError(
                    f"ONNX Runtime {self._ort.__version__} would run nodes on the CPU:"
                    f" {self._nodes_on_cpu(model, block, sizes)}",
                    hint="update onnxruntime-gpu, or use another engine",
                ) from error
            raise EngineError(f"ONNX Runtime cannot open {path} for block {block}: {first_line(error)}") from error
        self._check_provider(session)
        return self._made(session, graphs=graphs)

    def _made(self, session: Any, *, graphs: bool) -> OrtProgram:
        return OrtProgram(session, self.device, self._thread, graphs=graphs)

    def _check_provider(self, session: Any) -> None:
        """A provider that does not load is logged, and ONNX Runtime goes on with what is left."""
        providers = session.get_providers()
        if providers[0] != self._execution:
            raise EngineError(
                f"ONNX Runtime did not take {self._execution}: it runs {', '.join(providers)}",
                hint="tarflow doctor says what is missing",
            )

    def _session_options(self, block: int, sizes: Mapping[str, int]) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        options.intra_op_num_threads = 1  # nothing runs on the host, and every session has its own threads
        folder = self._bundle.blocks[block].weights.parent
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        for axis, size in sizes.items():
            options.add_free_dimension_override_by_name(axis, size)
        return options

    def _nodes_on_cpu(self, model: bytes, block: int, sizes: Mapping[str, int]) -> str:
        """Names of the nodes that ONNX Runtime would run on the CPU; raises where those are all."""
        options = self._session_options(block, sizes)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = self._ort.InferenceSession(model, options, providers=[(self._execution, self._options)])
        self._check_provider(session)
        parts = session.get_provider_graph_assignment_info()
        nodes = [node for part in parts if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()]
        named = [f"{node.name} ({node.op_type})" for node in nodes]
        return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")


def check_in_place(device: Device, program: OrtProgram, config: ModelConfig) -> None:
    """Launch a program on made-up values with its updated inputs in place, and once more with outputs elsewhere.

    Raises:
        EngineError: when the two differ, or the launch in place left something unchanged that it must update.
    """
    random = np.random.default_rng(0)
    given = {name: _made_up(name, spec, random, config) for name, spec in program.inputs.items()}

    def launch(*, in_place: bool) -> dict[str, npt.NDArray[Any]]:
        buffers = {name: device.allocate(spec.nbytes) for name, spec in program.inputs.items()}
        for name, array in given.items():
            device.upload(buffers[name].address, array)
        for name, spec in program.outputs.items():
            updated = name.removeprefix("next_")
            alias = in_place and updated.startswith(IN_PLACE)
            buffers[name] = buffers[updated] if alias else device.allocate(spec.nbytes)
        addresses = {name: buffer.address for name, buffer in buffers.items()}
        program.bind(addresses).launch()
        return {n: device.download(addresses[n], s.shape, s.dtype) for n, s in program.outputs.items()}

    aliased, apart = launch(in_place=True), launch(in_place=False)
    for name, array in aliased.items():
        before = given[name.removeprefix("next_")]
        if array.tobytes() != apart[name].tobytes() or (name.startswith("next_key") and (array == before).all()):
            raise EngineError(
                f"ONNX Runtime computes {name} wrongly when it is updated in place",
                hint="use another version of onnxruntime, or another engine",
            )


def _made_up(name: str, spec: TensorSpec, random: np.random.Generator, config: ModelConfig) -> npt.NDArray[Any]:
    """Values that an input may have in the middle of a block."""
    if name == "position":
        return np.full(spec.shape, config.patches // 2, spec.dtype)
    if spec.dtype == np.int64:
        return np.zeros(spec.shape, spec.dtype)
    return (0.1 * random.standard_normal(spec.shape)).astype(spec.dtype)


def loaded_libraries() -> list[str]:
    """Files of CUDA's and ONNX Runtime's libraries in this process; empty where the system does not say."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(file for file in files if ".so" in file and any(part in Path(file).name for part in LIBRARIES))
