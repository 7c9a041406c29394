"""`CudaDevice` on a stand-in for CUDA: calls, order, statuses, capture; then the whole loop over it."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import fake_cuda
import tarflow_runtimes as tfr
from host_device import HostDevice, HostMaker
from rooms import open_bundle
from tarflow_runtimes.engines.gpu import cuda_import, ort_cuda
from tarflow_runtimes.engines.gpu.array import DeviceArray, to_host
from tarflow_runtimes.engines.gpu.cuda import CudaDevice
from tarflow_runtimes.engines.gpu.engine import DeviceEngine
from tarflow_runtimes.engines.gpu.ort import OrtBound, OrtMaker, OrtProgram

FakeCuda, Status = fake_cuda.FakeCuda, fake_cuda.cudaError_t


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda.installed(FakeCuda()) as fake:
        yield fake


@pytest.fixture
def device(cuda) -> CudaDevice:
    return CudaDevice()


def test_what_it_says_of_itself(device):
    assert (device.name, device.capability, device.kind, device.ordinal) == ("Fake 9000", (9, 0), "cuda", 0)
    assert device.stream == 77


def test_memory_is_zeroed_copied_and_freed(cuda, device):
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    buffer, other = device.allocate(array.nbytes), device.allocate(array.nbytes)
    assert buffer.address % 256 == 0
    assert not device.download(buffer.address, array.shape, np.float32).any()
    given = array.copy()
    device.upload(buffer.address, given)
    given[:] = -1.0  # what was given has been read
    device.copy(other.address, buffer.address, array.nbytes)
    np.testing.assert_array_equal(device.download(other.address, array.shape, np.float32), array)
    device.zero(other.address, array.nbytes)
    device.copy(other.address + 4, buffer.address + 8, 8, rows=4, target_step=24, source_step=24)
    expected = np.zeros_like(array)
    expected[:, 1:3] = array[:, 2:4]
    np.testing.assert_array_equal(device.download(other.address, array.shape, np.float32), expected)
    device.upload(buffer.address, array[:, ::-1])  # any layout
    np.testing.assert_array_equal(device.download(buffer.address, array.shape, np.float32), array[:, ::-1])
    counted = device.transfers
    assert (counted.uploads, counted.downloads) == (2, 4)
    assert (counted.uploaded_bytes, counted.downloaded_bytes) == (2 * 96, 4 * 96)
    del buffer, other
    device.synchronize()
    assert not cuda.memory


def test_a_stream_is_captured_and_replayed(cuda, device):
    a, b = device.allocate(4), device.allocate(4)
    one, two = np.array([1], np.int32), np.array([2], np.int32)
    device.upload(a.address, one)

    def launch() -> None:
        assert not gc.isenabled(), "a collection could free memory, which ends a capture"
        device.copy(b.address, a.address, 4)

    replay = device.capture(launch)
    assert gc.isenabled()
    assert device.download(b.address, (1,), np.int32) == 0, "recording runs nothing"
    replay.replay()
    assert device.download(b.address, (1,), np.int32) == 1
    device.upload(a.address, two)
    replay.replay()
    assert device.download(b.address, (1,), np.int32) == 2
    assert len(cuda.graphs) == 1, "the graph itself is not needed any more"
    del replay
    device.synchronize()
    assert not cuda.graphs


def test_what_is_dropped_during_a_capture_is_freed_afterwards(cuda, device):
    held = [device.allocate(4)]
    replay = device.capture(held.clear)
    assert len(cuda.memory) == 1
    assert "cudaFree" not in cuda.calls
    device.synchronize()
    assert not cuda.memory
    del replay
    device.allocate(4)
    assert not cuda.graphs


def test_all_devices_of_a_process_take_turns(device):
    assert CudaDevice().lock is device.lock, "one thread's allocation would end another's recording"


def test_a_launch_that_fails_ends_the_capture(cuda, device):
    def fail() -> None:
        device.zero(0, 0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        device.capture(fail)
    assert cuda.captured is None
    assert not cuda.graphs
    assert gc.isenabled()
    device.synchronize()


def test_waiting_within_a_capture_is_an_error(cuda, device):
    buffer = device.allocate(4)
    with pytest.raises(tfr.EngineError, match="cudaErrorStreamCaptureUnsupported"):
        device.capture(lambda: device.download(buffer.address, (1,), np.int32))
    assert cuda.captured is None


@pytest.mark.parametrize(
    ("call", "run"),
    [
        ("cudaMalloc", lambda device, _: device.allocate(1)),
        ("cudaMemsetAsync", lambda device, buffer: device.zero(buffer.address, 4)),
        ("cudaMemcpyAsync", lambda device, buffer: device.upload(buffer.address, np.zeros(1, np.int32))),
        ("cudaMemcpyAsync", lambda device, buffer: device.download(buffer.address, (1,), np.int32)),
        ("cudaMemcpyAsync", lambda device, buffer: device.copy(buffer.address, buffer.address, 4)),
        ("cudaMemcpy2DAsync", lambda device, buffer: device.copy(buffer.address, buffer.address, 2, rows=2)),
        ("cudaStreamSynchronize", lambda device, _: device.synchronize()),
        ("cudaStreamSynchronize", lambda device, buffer: device.download(buffer.address, (1,), np.int32)),
        ("cudaStreamBeginCapture", lambda device, _: device.capture(lambda: None)),
        ("cudaStreamEndCapture", lambda device, _: device.capture(lambda: None)),
        ("cudaGraphInstantiate", lambda device, _: device.capture(lambda: None)),
        ("cudaGraphLaunch", lambda device, _: device.capture(lambda: None).replay()),
        ("cudaSetDevice", lambda device, _: device.synchronize()),
    ],
)
def test_every_status_is_checked(cuda, device, call, run):
    buffer = device.allocate(4)
    cuda.fails[call] = Status.cudaErrorIllegalAddress
    with pytest.raises(tfr.EngineError, match="CUDA: cudaErrorIllegalAddress: what cudaErrorIllegalAddress means"):
        run(device, buffer)
    cuda.fails.clear()
    device.synchronize()


def test_memory_that_runs_out_has_a_remedy(cuda, device):
    cuda.fails["cudaMalloc"] = Status.cudaErrorMemoryAllocation
    with pytest.raises(tfr.EngineError, match="cudaErrorMemoryAllocation") as caught:
        device.allocate(1 << 40)
    assert "--batch-size" in caught.value.hint


def test_an_array_has_the_interface_of_cuda(device):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = device.allocate(array.nbytes)
    device.upload(buffer.address, array)
    given = DeviceArray(device, buffer, array.shape, array.dtype)
    interface = given.__cuda_array_interface__
    assert interface == {
        "shape": (2, 3), "typestr": "<f4", "data": (buffer.address, False), "strides": None, "version": 3
    }  # fmt: skip
    assert given.__dlpack_device__() == (2, 0)
    np.testing.assert_array_equal(given.numpy(), array)
    assert repr(given.__dlpack__()).startswith('<capsule object "dltensor"')


def test_an_array_of_others_on_the_gpu_is_copied_to_the_host(cuda, device):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = device.allocate(array.nbytes)
    device.upload(buffer.address, array)
    interface = {"shape": (2, 3), "typestr": "<f4", "data": (buffer.address, False), "version": 3}
    for strides in (None, (12, 4)):
        theirs = SimpleNamespace(__cuda_array_interface__=interface | {"strides": strides})
        cuda.calls.clear()
        np.testing.assert_array_equal(to_host(device, theirs), array)
        assert cuda.calls.count("cudaDeviceSynchronize") == 1, "on whatever stream it was made"
    np.testing.assert_array_equal(to_host(device, DeviceArray(device, buffer, (3, 2), np.float32)), array.reshape(3, 2))
    turned = SimpleNamespace(__cuda_array_interface__=interface | {"strides": (4, 8)})
    with pytest.raises(tfr.InputError, match=r"must be contiguous, got strides \(4, 8\)"):
        to_host(device, turned)
    assert to_host(device, array) is array
    assert to_host(HostDevice(), turned) is turned


class CheckedCuda(FakeCuda):
    """Passes every call on to the real package, too, which answers that there is no driver if it can read it."""

    def __init__(self, real) -> None:
        self.real, self.answers = real, {}
        super().__init__()

    def __getattribute__(self, name: str):
        found = super().__getattribute__(name)
        if name.startswith("cuda") and hasattr(FakeCuda, name) and callable(found) and not isinstance(found, type):
            real = getattr(self.real, name)

            def call(*given):
                answer = found(*given)
                self.answers[name] = real(*given)
                handle = {"cudaStreamCreateWithFlags": "cudaStream_t", "cudaStreamEndCapture": "cudaGraph_t"}.get(name)
                handle = "cudaGraphExec_t" if name == "cudaGraphInstantiate" else handle
                return answer if handle is None else (answer[0], getattr(self.real, handle)(answer[1]))

            return call
        return getattr(self.real, name) if name in ("cudaMemcpyKind", "cudaStreamCaptureMode") else found


def test_the_real_package_understands_every_call(cuda, monkeypatch):
    monkeypatch.undo()
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    if cuda_import.driver_version():
        pytest.skip("with a driver the calls would do something")
    fake = CheckedCuda(real)
    monkeypatch.setattr(cuda_import, "cuda_runtime", lambda: fake)

    def use(device: CudaDevice) -> list[int]:
        a, b = device.allocate(64), device.allocate(64)
        device.upload(a.address, np.arange(16, dtype=np.int32))
        rows = {"rows": 4, "target_step": 16, "source_step": 16}
        device.capture(lambda: device.copy(b.address, a.address, 8, **rows)).replay()
        device.copy(b.address + 48, a.address + 4, 4)
        device.synchronize(everything=True)
        return device.download(b.address, (16,), np.int32).tolist()

    assert use(CudaDevice()) == [0, 1, 0, 0, 4, 5, 0, 0, 8, 9, 0, 0, 1, 13, 0, 0]
    CudaDevice().synchronize()
    assert not fake.memory
    assert not fake.graphs
    unused = {"cudaGetErrorString", "cudaRuntimeGetVersion"}
    calls = {name for name in vars(FakeCuda) if name.startswith("cuda") and callable(vars(FakeCuda)[name])}
    assert set(fake.answers) == {name for name in calls if not isinstance(vars(FakeCuda)[name], type)} - unused
    for name, (status, *_) in fake.answers.items():
        answered = "cudaSuccess" if name == "cudaDriverGetVersion" else "cudaErrorInsufficientDriver"
        assert status.name == answered, name


NOT_THERE = {
    "no driver": ({"cudaDriverGetVersion": (Status.cudaSuccess, 0)}, cuda_import.NO_DRIVER, cuda_import.DRIVER),
    "old driver": (
        {
            "cudaDriverGetVersion": (Status.cudaSuccess, 12040),
            "cudaGetDeviceCount": (Status.cudaErrorInsufficientDriver, None),
        },
        "the NVIDIA driver supports CUDA 12.4, cuda-python needs CUDA 13.4",
        'pip install "cuda-python==12.*", or update the driver',
    ),
    "no device": (
        {"cudaGetDeviceCount": (Status.cudaErrorNoDevice, None)},
        cuda_import.NO_GPU,
        cuda_import.VISIBLE,
    ),
    "none": ({"cudaGetDeviceCount": (Status.cudaSuccess, 0)}, cuda_import.NO_GPU, cuda_import.VISIBLE),
}


@pytest.mark.parametrize(("answers", "message", "hint"), NOT_THERE.values(), ids=NOT_THERE.keys())
def test_what_is_missing_is_named(cuda, monkeypatch, answers, message, hint):
    for name, answer in answers.items():
        monkeypatch.setattr(FakeCuda, name, lambda _, answer=answer: answer)
    with pytest.raises(tfr.EngineError) as caught:
        CudaDevice()
    assert (str(caught.value), caught.value.hint) == (message, hint)


def test_a_driver_that_does_not_load_is_none(cuda, monkeypatch):
    def missing(_: FakeCuda) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(FakeCuda, "cudaDriverGetVersion", missing)
    with pytest.raises(tfr.EngineError, match=cuda_import.NO_DRIVER):
        CudaDevice()


def test_without_cuda_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda_import.import_cuda.cache_clear()
    with pytest.raises(tfr.EngineError, match="cuda-python, which is not installed") as caught:
        CudaDevice()
    assert caught.value.hint == 'pip install "cuda-python>=12.9"'


class HostProgramsDevice(CudaDevice):
    """The stand-in's memory, of which ONNX Runtime thinks as the host's."""

    kind = "cpu"


class StreamBound:
    """A launch that waits for its turn on the stream, as a kernel does."""

    def __init__(self, cuda: FakeCuda, bound: OrtBound) -> None:
        self.launch = lambda: cuda.enqueue(bound.launch)


class StreamProgram:
    """An ONNX Runtime program behind the stream, which is captured as TensorRT's are."""

    def __init__(self, cuda: FakeCuda, device: CudaDevice, program: OrtProgram) -> None:
        self.inputs, self.outputs = program.inputs, program.outputs
        self._cuda, self._device, self._program = cuda, device, program

    def bind(self, addresses, **options) -> StreamBound:
        return StreamBound(self._cuda, self._program.bind(addresses, **options))

    def record(self, launches):
        return self._device.capture(lambda: [launch.launch() for launch in launches])


class StreamMaker:
    """Makes such programs."""

    def __init__(self, cuda: FakeCuda, maker: OrtMaker) -> None:
        self._cuda, self._maker, self.device = cuda, maker, maker.device
        self.name, self.provider, self.precision, self.report = maker.name, maker.provider, "float32", maker.report

    def program(self, *given, **shape) -> StreamProgram:
        return StreamProgram(self._cuda, self.device, self._maker.program(*given, **shape))


@pytest.mark.parametrize("guidance", [0.0, tfr.Guidance(weight=1.3, attention_temperature=0.7), [0.0, 1.0, 2.0]])
def test_the_loop_on_an_asynchronous_device(exported, flows, cuda, monkeypatch, guidance):
    monkeypatch.setattr("tarflow_runtimes.engines.gpu.ort.check_in_place", lambda *_: None)  # it waits for nobody
    model, options = exported("class_n16"), {"guidance": guidance}
    bundle = open_bundle(model.path)
    device = HostProgramsDevice()
    maker = HostMaker(bundle, device)
    z, labels = model.latents(3), model.labels(3)
    with tfr.Flow(bundle, DeviceEngine(bundle, StreamMaker(cuda, maker))) as flow:
        for plan in (None, tfr.Parallel(tolerance=0.0), tfr.Parallel(window=4, tolerance=0.0, init="zeros"), None):
            expected = flows("class_n16").decode(z, labels, **options)
            actual = flow.decode(z, labels, plan=plan, **options)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
        cuda.calls.clear()
        flow.decode(z, labels, **options)
        assert cuda.calls.count("cudaGraphLaunch") == 2, "one group of 14 steps a block"
        assert cuda.calls.count("cudaStreamSynchronize") == 1, "only the images are waited for"
        assert "cudaStreamBeginCapture" not in cuda.calls
        for ours, theirs in zip(
            flow.encode(model.images(2), [0, 1]), flows("class_n16").encode(model.images(2), [0, 1]), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    del flow, maker
    gc.collect()
    device.synchronize()
    assert not cuda.memory
    assert not cuda.graphs


def test_ort_cuda_needs_a_build_for_cuda(exported):
    with pytest.raises(tfr.EngineError, match="is a build without it") as caught:
        tfr.load(exported("class").path, engine="ort-cuda")
    assert caught.value.hint == 'pip uninstall -y onnxruntime, then pip install "tarflow-sdk[ort-cuda]"'


@pytest.fixture
def cuda_build(monkeypatch):
    """ONNX Runtime, which says that it has the CUDA provider, and what was asked of it."""
    import onnxruntime

    asked = SimpleNamespace(sessions=[], preloaded=0)

    def preload() -> None:
        asked.preloaded += 1
        sys.stdout.write("Failed to load libcublasLt.so.13\n")

    def session(model, options, *, providers):
        asked.sessions.append((options, providers))
        raise RuntimeError("no such luck\nin several lines")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_how_ort_cuda_opens_a_session(exported, cuda, cuda_build, capsys, *, precision, tf32):
    model = exported("class", precision)
    with tfr.load(model.path, engine="ort-cuda", tf32=tf32) as flow:
        assert flow.engine_report["device"] == "Fake 9000"
        assert flow.engine.precision == ("tf32" if tf32 else precision)
        with pytest.raises(tfr.EngineError, match=r"cannot open .*step.onnx for block 1: no such luck$"):
            flow.sample(1, seed=0)
        with pytest.raises(tfr.EngineError, match="cannot open"):
            flow.encode(model.images(2))
    assert cuda_build.preloaded == 1
    assert capsys.readouterr().out == ""
    (step, ((provider, given),)), (density, ((_, given_density),)) = cuda_build.sessions
    assert provider == ort_cuda.PROVIDER
    assert given == {
        "user_compute_stream": "77", "use_tf32": str(int(tf32)), "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
    }  # fmt: skip
    assert "enable_cuda_graph" not in given_density
    for options in (step, density):
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_sessions_of_a_gpu_run_in_one_thread(device):
    ran, session = [], SimpleNamespace(get_inputs=list, get_outputs=list, io_binding=SimpleNamespace)
    session.run_with_iobinding = lambda binding, options: ran.append(threading.get_ident())
    with ThreadPoolExecutor(1) as pool:
        program = OrtProgram(session, device, pool, graphs=True)
        launch = program.bind({})
        replay = program.record([launch, launch])
        callers = [threading.Thread(target=work) for work in (launch.launch, launch.launch, replay.replay)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(ran) == 4
        assert {*ran} == {pool.submit(threading.get_ident).result()}


def test_a_provider_that_does_not_load_is_named(exported, cuda, cuda_build, monkeypatch):
    import onnxruntime

    def session(model, options, *, providers):
        try:
            options.get_session_config_entry("session.disable_cpu_ep_fallback")
        except RuntimeError:  # it was not set
            return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
        raise RuntimeError("assigned to the default CPU EP, but fallback to CPU EP has been disabled")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with (
        tfr.load(exported("class").path, engine="ort-cuda") as flow,
        pytest.raises(tfr.EngineError, match="did not take CUDAExecutionProvider: it runs CPUExecutionProvider"),
    ):
        flow.sample(1, seed=0)


def test_nodes_on_the_cpu_are_named(exported, cuda, cuda_build, monkeypatch):
    import onnxruntime

    node = SimpleNamespace(name="positions/Concat", op_type="Concat")
    parts = [
        SimpleNamespace(ep_name="CUDAExecutionProvider", get_nodes=list),
        SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: [node] * 9),
    ]

    def session(model, options, *, providers):
        try:
            options.get_session_config_entry("session.disable_cpu_ep_fallback")
        except RuntimeError:  # it was not set
            return SimpleNamespace(
                get_providers=lambda: [ort_cuda.PROVIDER], get_provider_graph_assignment_info=lambda: parts
            )
        raise RuntimeError(
            "graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been disabled"
        )

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with (
        tfr.load(exported("class").path, engine="ort-cuda") as flow,
        pytest.raises(
            tfr.EngineError, match=r"would run nodes on the CPU: positions/Concat \(Concat\), .* and 1 more$"
        ),
    ):
        flow.sample(1, seed=0)


def test_another_provider_than_asked_for_is_refused(exported, cuda, cuda_build, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *_, **__: SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"]),
    )
    with (
        tfr.load(exported("class").path, engine="ort-cuda") as flow,
        pytest.raises(tfr.EngineError, match="did not take CUDAExecutionProvider: it runs CPUExecutionProvider"),
    ):
        flow.sample(1, seed=0)


def test_graphs_that_are_refused_are_reported(exported, cuda, cuda_build, monkeypatch):
    import onnxruntime

    refuse = onnxruntime.InferenceSession

    def session(model, options, *, providers):
        ((_, given),) = providers
        if given.get("enable_cuda_graph"):
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        return refuse(model, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with tfr.load(exported("class").path, engine="ort-cuda") as flow:
        assert flow.engine_report["cuda_graphs"] == "on"
        with pytest.raises(tfr.EngineError, match="no such luck"):
            flow.sample(1, seed=0)
        assert "graph capture" in flow.engine_report["cuda_graphs"]


def test_a_bundle_without_graphs_for_a_gpu_is_refused(exported, cuda, cuda_build):
    with pytest.raises(tfr.EngineError, match="is of int8 and has no graphs for ort-cuda") as caught:
        tfr.load(exported("class", "int8").path, engine="ort-cuda")
    assert "tarflow convert" in caught.value.hint
