"""`OrtMaker`: programs made by ONNX Runtime, for the GPU or, with the host's memory as the device, for the CPU.

Inputs and outputs are bound to addresses of the device; nothing is copied. On the GPU ONNX Runtime works on the
device's stream and does not wait for it, no node may run on the CPU, and recordings are ONNX Runtime's own CUDA
graphs, one per binding: the stream cannot be captured around its runs, which it may synchronise or allocate in.

Source: onnxruntime docs, CUDA execution provider; onnxruntime_run_options_config_keys.h.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import Bundle, ModelConfig
from tarflow_runtimes._device.device import Bound, Device, Replay, TensorSpec
from tarflow_runtimes._device.workspace import IN_PLACE
from tarflow_runtimes._engines._ort_import import import_onnxruntime
from tarflow_runtimes._engines._session import first_line
from tarflow_runtimes._errors import EngineError
from tarflow_runtimes._rewrites import half
from tarflow_runtimes._rewrites.advance import advance_graph

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(np.uint16),  # NumPy has none
    "tensor(int64)": np.dtype(np.int64),
}
"""ONNX Runtime's names of the types that our graphs have."""

NO_GRAPH: Final = -1
"""The graph id with which ONNX Runtime neither records nor replays."""

MAPS: Final = Path("/proc/self/maps")
LIBRARIES: Final = ("libcuda.", "libcudart.", "libcublas", "libcudnn", "libcurand.", "onnxruntime")
"""Where Linux lists what a process has loaded, and what to look for in the names."""


class OrtBound:
    """A session with everything bound; `graph` is the id under which its launches are recorded, or NO_GRAPH."""

    def __init__(self, program: OrtProgram, binding: Any, graph: int) -> None:
        self.program, self.binding = program, binding
        self.recorded: OrtBound | None = None
        self._options = program.run_options(graph)

    def launch(self) -> None:
        """Run once; on the GPU without waiting for it."""
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
        """Launch each of them."""
        self.program.on_thread(self._run)

    def _run(self) -> None:
        for launch in self.launches:
            launch.run()


class OrtProgram:
    """One session of static shapes; only `reach`, in graphs that have it, may be of any length up to N."""

    def __init__(
        self, session: Any, device: Device, *, patches: int, graphs: bool, thread: ThreadPoolExecutor | None
    ) -> None:
        self.session, self._device, self._graphs, self._thread = session, device, graphs, thread
        self.inputs = {value.name: _spec(value, patches) for value in session.get_inputs()}
        self.outputs = {value.name: _spec(value, patches) for value in session.get_outputs()}
        self._numbers = itertools.count(1)

    def bind(self, addresses: Mapping[str, int], *, reach: int | None = None) -> OrtBound:
        """Bind every input and output."""
        binding = self.session.io_binding()
        kind = self._device.kind
        for name, spec in self.inputs.items():
            shape = (reach,) if name == "reach" else spec.shape
            binding.bind_input(name, kind, 0, _element_type(spec), shape, addresses[name])
        for name, spec in self.outputs.items():
            binding.bind_output(name, kind, 0, _element_type(spec), spec.shape, addresses[name])
        return OrtBound(self, binding, NO_GRAPH)

    def record(self, launches: Sequence[Bound]) -> Replay:
        """The same bindings, each under a graph id of its own; without CUDA graphs the launches themselves."""
        bounds = [bound for bound in launches if isinstance(bound, OrtBound)]
        return OrtReplay(self, [self._with_graph(bound) if self._graphs else bound for bound in bounds])

    def on_thread(self, work: Callable[[], None]) -> None:
        """Do something in the thread that runs all sessions of the maker; it is done, however this ends."""
        if self._thread is None:
            work()
            return
        doing = self._thread.submit(work)
        try:
            doing.result()
        finally:
            wait([doing])

    def run_options(self, graph: int) -> Any:
        """None on the CPU; on the GPU, not to wait, and the graph id."""
        if self._device.kind == "cpu":
            return None
        from onnxruntime import RunOptions

        options = RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _with_graph(self, bound: OrtBound) -> OrtBound:
        bound.recorded = bound.recorded or OrtBound(self, bound.binding, next(self._numbers))
        return bound.recorded


def _element_type(spec: TensorSpec) -> Any:
    """What a binding calls a dtype: NumPy's type, or the number of ONNX's for bfloat16."""
    return proto.BFLOAT16 if spec.dtype == np.uint16 else spec.dtype.type


def _spec(value: Any, patches: int) -> TensorSpec:
    """Shape and dtype of an input or output; an axis that is left open is that of `reach`."""
    return TensorSpec(tuple(size if isinstance(size, int) else patches for size in value.shape), DTYPES[value.type])


class OrtMaker:
    """ONNX Runtime on a device, through one execution provider with its options.

    Raises:
        EngineError: when ONNX Runtime refuses a graph, would run a node of it on the CPU, or updates a cache wrongly.
    """

    def __init__(
        self, bundle: Bundle, device: Device, *, name: str, dtype: str, provider: str, options: Mapping[str, str]
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self._ort = import_onnxruntime(name)
        self._bundle, self._provider, self._options = bundle, provider, dict(options)
        self._without_graphs = "" if device.kind != "cpu" else "on the CPU there are none"
        self._in_place = False
        # For every thread that runs it, a session on a GPU has handles and recordings of its own, as long as it lives.
        self._thread = None if device.kind == "cpu" else ThreadPoolExecutor(1, thread_name_prefix="tarflow-ort")
        self._reach: int | None = bundle.config.patches

    def advance(self, block: int, *, images: int, branches: int, window: int) -> OrtProgram:
        """The advance graph of a block, all sizes frozen, the reach of attention too.

        To read a part of a cache, ONNX Runtime copies it (Slice): three times its bytes, and the half on average.
        """
        if not self._in_place:  # once, where it takes little memory
            check_in_place(self.device, self._advance(block, 1, 1, 1), self._bundle.config)
            self._in_place = True
        return self._advance(block, images, branches, window)

    def forward(self, block: int, *, images: int) -> OrtProgram:
        """The forward graph of a block."""
        return self._density(block, self._bundle.blocks[block].forward, images)

    def gradient(self, block: int, *, images: int) -> OrtProgram:
        """The gradient graph of a block."""
        return self._density(block, self._bundle.blocks[block].gradient, images)

    def report(self) -> Mapping[str, Any]:
        """Versions, provider, whether CUDA graphs are used, and the libraries of CUDA that are loaded."""
        return {
            "onnxruntime": self._ort.__version__,
            "provider": self._provider,
            "step_graph": "advance",
            "cuda_graphs": self._without_graphs or "on",
            "libraries": loaded_libraries(),
        }

    def _advance(self, block: int, images: int, branches: int, window: int) -> OrtProgram:
        model, config = self._parse(block, self._bundle.blocks[block].step), self._bundle.config
        sizes = {"images": images, "branches": branches, "window": window}
        return self._open_with_graphs(advance_graph(model, config, **sizes, reach=self._reach), block)

    def _density(self, block: int, path: Path, images: int) -> OrtProgram:
        model: bytes = self._parse(block, path).SerializeToString()
        return self._open(model, block, images=images, graphs=False)

    def _parse(self, block: int, path: Path) -> Any:
        """The graph as a ModelProto, all of its external tensors in the block's weights."""
        model = proto.parse_model(path.read_bytes(), where=str(path))
        proto.check_external_data(model, self._bundle.blocks[block].weights, where=str(path))
        return model

    def _open_with_graphs(self, model: bytes, block: int) -> OrtProgram:
        """A program that records, or where ONNX Runtime refuses to, one that does not; the report says why."""
        if not self._without_graphs:
            try:
                return self._open(model, block, graphs=True)
            except EngineError as error:
                if "graph capture" not in str(error):
                    raise
                self._without_graphs = str(error)
        return self._open(model, block, graphs=False)

    def _open(self, model: bytes, block: int, *, images: int | None = None, graphs: bool) -> OrtProgram:
        """The program of a graph of a block in the maker's dtype; `images` freezes its batch."""
        weights = self._bundle.blocks[block].weights
        if self.dtype in half.DTYPES and self._bundle.dtype == "float32":
            with tempfile.TemporaryDirectory(prefix="tarflow-", ignore_cleanup_errors=True) as name:
                model = half.rewrite(model, self.dtype, weights, folder=Path(name))
                session = self._session(model, Path(name), images, graphs=graphs)
        else:
            session = self._session(model, weights.parent, images, graphs=graphs)
        patches = self._bundle.config.patches
        return OrtProgram(session, self.device, patches=patches, graphs=graphs, thread=self._thread)

    def _session(self, model: bytes, folder: Path, images: int | None, *, graphs: bool) -> Any:
        options = self._session_options(folder, images)
        if self.device.kind != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        given = self._options | ({"enable_cuda_graph": "1"} if graphs else {})
        try:
            session = self._ort.InferenceSession(model, options, providers=[(self._provider, given)])
        except Exception as error:
            if "fallback to CPU EP" in str(error):
                raise EngineError(
                    f"ONNX Runtime {self._ort.__version__} would run nodes on the CPU:"
                    f" {self._nodes_on_cpu(model, folder, images)}",
                    hint="update onnxruntime-gpu, or use another engine",
                ) from error
            raise EngineError(f"ONNX Runtime cannot open a graph of {folder}: {first_line(error)}") from error
        self._check_provider(session)
        return session

    def _check_provider(self, session: Any) -> None:
        """A provider that does not load is logged, and ONNX Runtime goes on with what is left."""
        providers = session.get_providers()
        if providers[0] != self._provider:
            raise EngineError(
                f"ONNX Runtime did not take {self._provider}: it runs {', '.join(providers)}",
                hint="tarflow doctor says what is missing",
            )

    def _session_options(self, folder: Path, images: int | None) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # refusals are raised
        if self.device.kind != "cpu":
            options.intra_op_num_threads = 1  # nothing runs on the host, and every session has threads of its own
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if images is not None:
            options.add_free_dimension_override_by_name("B", images)
        return options

    def _nodes_on_cpu(self, model: bytes, folder: Path, images: int | None) -> str:
        """Names of the nodes that ONNX Runtime would run on the CPU; raises where those are all."""
        options = self._session_options(folder, images)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = self._ort.InferenceSession(model, options, providers=[(self._provider, self._options)])
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
        program.bind(addresses, reach=config.patches).launch()
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
    if name == "reach":
        return np.arange(config.patches)
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
