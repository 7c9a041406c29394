"""The TensorRT engines over a fake TensorRT on the host's memory: whole pictures, shapes, sharing, and refusals."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes.bundle.reader import open_bundle
from tarflow_runtimes.engines.trt import engine as engine_module
from tarflow_runtimes.engines.trt import package as _package
from tarflow_runtimes.engines.trt import supply as _supply
from tarflow_runtimes.engines.trt.engine import TrtMaker, open_trt, record_verification
from tarflow_runtimes.engines.trt.gpu import Gpu
from tarflow_runtimes.engines.trt.package import import_package
from tarflow_runtimes.engines.trt.profiles import Profile
from tarflow_runtimes.engines.trt.supply import Building

sys.path.insert(0, str(Path(__file__).parent))

import fake_tensorrt as fake
from host_device import HostDevice

GPU = Gpu(name="Host GPU", target="sm_89", driver="CUDA 13.0")
MIXED = tfr.Guidance(weight=1.0, attention_temperature=0.5)


class HostGpu(HostDevice):
    """The host's memory under a GPU's name."""

    stream = 7
    capability = (8, 9)

    def capture(self, launch):
        fake.recording = True
        try:
            launch()
        finally:
            fake.recording = False
        return super().capture(launch)


@pytest.fixture(params=["trt", "trt-rtx"])
def engine(request, monkeypatch) -> str:
    """The name of an engine whose package is the fake one, on a GPU that is the host."""
    made = fake.module(request.param)
    monkeypatch.setattr(_package, "import_module", {made.__name__: made}.__getitem__)
    monkeypatch.setattr(_package, "owners", lambda _: [])
    monkeypatch.setattr(_supply, "build", fake.build)
    monkeypatch.setattr(engine_module, "CudaDevice", HostGpu)
    monkeypatch.setattr(engine_module, "gpu_of", lambda _: GPU)
    _package._import.cache_clear()
    yield request.param
    _package._import.cache_clear()


@pytest.fixture
def opened(exported, tmp_path, engine) -> Callable[..., tfr.Flow]:
    """`opened(name, precision)`: the bundle on the engine; engines are kept below tmp_path."""

    def open_flow(name: str = "class", precision: str = "float32", *, tf32: bool = False) -> tfr.Flow:
        bundle = open_bundle(exported(name, precision).path)
        return tfr.Flow(bundle, open_trt(bundle, engine, tf32=tf32, folder=tmp_path / "engines"))

    return open_flow


def maker_of(flow: tfr.Flow) -> TrtMaker:
    return flow.engine.maker


def builds(engine: str) -> int:
    return import_package(engine).module.Builder.built


@pytest.mark.parametrize("name", ["class", "unconditional", "class_n16"])
def test_pictures_are_those_of_the_cpu(opened, flows, name):
    flow, cpu = opened(name), flows(name)
    labels = [0, 2, None] if cpu.config.classes else None
    for options in (
        {},
        {"guidance": tfr.Guidance(weight=1.5, attention_temperature=0.7)},
        {"plan": tfr.Parallel(window=5, tolerance=1e-6)},
        {"plan": tfr.Parallel(tolerance=1e-6, init="zeros"), "guidance": [MIXED, 0.0, MIXED]},
    ):
        found = flow.sample(3, labels=labels, seed=3, **options).images
        np.testing.assert_allclose(found, cpu.sample(3, labels=labels, seed=3, **options).images, atol=2e-4)
    x = cpu.sample(3, labels=labels, seed=3).images
    np.testing.assert_allclose(flow.log_prob(x, labels), cpu.log_prob(x, labels), atol=1e-3)
    np.testing.assert_allclose(flow.denoise(x, labels), cpu.denoise(x, labels), atol=1e-4)


def test_float16_bundles_run_in_float16(opened, flows):
    flow, cpu = opened("class", "float16"), flows("class", "float16")
    found = flow.sample(2, labels=[0, 1], seed=0).images
    np.testing.assert_allclose(found, cpu.sample(2, labels=[0, 1], seed=0).images, atol=0.05)
    program = maker_of(flow).program(0, "step", images=2)
    assert program.inputs["key_0"].dtype == np.float16
    assert program.inputs["window"].dtype == np.float32
    assert flow.engine.precision == flow.engine_report["weights"] == "float16"


def test_programs_have_the_shapes_of_the_graph(opened):
    maker, config = maker_of(opened()), opened().config
    program = maker.program(1, "window", images=3, branches=2, window=4)
    n, d = config.patches, config.patch_values
    assert program.inputs["window"].shape == program.outputs["next_window"].shape == (3, 5, d)
    assert program.inputs["labels"].shape == program.inputs["inverse_temperature"].shape == (2, 3)
    assert program.inputs["guidance"].shape == (3, 2, n)
    assert program.inputs["kv_positions"].shape == (n,)
    assert program.outputs["next_key_1"].shape == (6, config.heads, n, config.head_dim)
    assert program.outputs["next_calls"].dtype == np.int64
    assert set(maker.program(0, "gradient", images=2).inputs) == {"patches", "cotangent", "labels"}


def test_nothing_crosses_per_step(opened):
    flow = opened("class_n16")
    flow.sample(2, labels=[0, 1], seed=0, denoise=False)  # recordings are compared with launches once
    before = flow.engine.device.transfers.uploads, flow.engine.device.transfers.downloads
    flow.sample(2, labels=[0, 1], seed=1, denoise=False)
    after = flow.engine.device.transfers
    assert after.uploads - before[0] <= 4 + flow.config.blocks
    assert after.downloads - before[1] == 1


def test_one_engine_serves_smaller_batches_and_is_there_next_time(opened, engine):
    flow = opened()
    flow.sample(4, labels=[0] * 4, seed=0, denoise=False)
    blocks = flow.config.blocks
    assert builds(engine) == blocks
    flow.sample(2, labels=[0] * 2, seed=0, denoise=False)
    assert builds(engine) == blocks
    again = opened()
    images = again.sample(3, labels=[0] * 3, seed=0, denoise=False).images
    assert builds(engine) == blocks
    np.testing.assert_allclose(images[:2], flow.sample(2, labels=[0] * 2, seed=0, denoise=False).images, atol=1e-5)
    again.sample(5, labels=[0] * 5, seed=0, denoise=False)
    assert builds(engine) == 2 * blocks
    assert len(again.engine_report["engines"]) == 2 * blocks


def test_contexts_share_one_scratch(opened):
    maker = maker_of(opened())
    large = maker.program(0, "step", images=4)
    others = [maker.program(1, "step", images=2), maker.program(0, "forward", images=4)]
    assert all(other.scratch is large.scratch for other in others)
    assert large.scratch.nbytes >= 4 * fake.SCRATCH_PER_IMAGE
    larger = maker.program(0, "step", images=5, branches=2)
    assert larger.scratch is not large.scratch
    assert larger.scratch.nbytes > large.scratch.nbytes


def test_engines_that_nobody_uses_are_let_go(opened):
    maker = maker_of(opened())
    program = maker.program(0, "step", images=1)
    assert len(maker._loaded) == 1
    assert maker.program(0, "step", images=1).engine is program.engine
    del program
    assert len(maker._loaded) == 0


def test_an_output_that_does_not_share_its_inputs_memory_is_refused(opened, engine, monkeypatch):
    monkeypatch.setattr(fake.CudaEngine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(tfr.EngineError, match=r"writes next_.* to the memory of None, expected (key|value|finished)"):
        opened().sample(1, labels=[0], denoise=False)
    monkeypatch.setattr(fake.CudaEngine, "get_aliased_input_tensor", lambda self, name: name.removeprefix("next_"))
    with pytest.raises(tfr.EngineError, match="expected None"):
        opened().sample(1, labels=[0], denoise=False)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("Runtime.deserialize_cuda_engine", "cannot load"),
        ("CudaEngine.create_execution_context", "cannot run"),
        ("ExecutionContext.set_optimization_profile_async", "cannot run"),
        ("ExecutionContext.set_input_shape", "cannot run"),
        ("ExecutionContext.set_tensor_address", "cannot run"),
        ("ExecutionContext.execute_async_v3", "cannot run"),
    ],
)
def test_refusals_are_errors_with_the_first_line_that_says_why(opened, monkeypatch, engine, where, what):
    owner, _, method = where.partition(".")
    flow = opened()

    def refuse(*_: object) -> None:
        from tarflow_runtimes.engines.trt.log import logger

        logger(import_package(engine)).log(fake.Severity.ERROR, "out of\n luck")

    monkeypatch.setattr(getattr(fake, owner), method, refuse)
    with pytest.raises(tfr.EngineError, match=f"{what} the engine of class.tarflow block .*: out of luck") as caught:
        flow.sample(1, labels=[0], denoise=False)
    assert "tarflow cache explain" in caught.value.hint


def test_shapes_that_the_graph_does_not_say_are_refused(opened, monkeypatch):
    monkeypatch.setattr(fake.ExecutionContext, "get_tensor_shape", lambda self, name: (1, 2))
    with pytest.raises(tfr.EngineError, match=r"cannot make next_.* of shape"):
        opened().sample(1, labels=[0], denoise=False)


@pytest.mark.parametrize(("field", "value"), [("dtype", "INT32"), ("location", "HOST")])
def test_tensors_that_no_graph_of_ours_has_are_refused(opened, monkeypatch, field, value):
    kind = {"dtype": fake.DataType, "location": fake.TensorLocation}[field]
    monkeypatch.setattr(fake.CudaEngine, f"get_tensor_{field}", lambda self, name: kind[value])
    with pytest.raises(tfr.EngineError, match=r"which no graph of ours has|in the host's memory"):
        opened().sample(1, labels=[0], denoise=False)


def test_an_engine_that_failed_its_verification_is_refused(opened, flows):
    flow = opened()
    flow.sample(1, labels=[0], seed=0, denoise=False)
    assert record_verification(flow.engine, passed=True, facts={"worst": "inverse"}) == flow.config.blocks
    opened().sample(1, labels=[0], seed=0, denoise=False)
    record_verification(flow.engine, passed=False, facts={"worst": "inverse"})
    with pytest.raises(tfr.EngineError, match=r"failed its verification on this Host GPU with CUDA 13\.0") as caught:
        opened().sample(1, labels=[0], seed=0, denoise=False)
    assert "--rebuild" in caught.value.hint
    cache = maker_of(flow).supply.cache
    assert record_verification(flows("class").engine, passed=False, facts={}) == 0
    assert [len(one.verifications) for one in cache.entries()] == [1] * flow.config.blocks
    for block in range(flow.config.blocks):
        maker_of(flow).supply.get(block, "step", [Profile(least=1, most=1)], rebuild=True)
    assert opened().sample(1, labels=[0], seed=0, denoise=False).images.shape[0] == 1


def test_a_damaged_engine_is_built_again_and_not_loaded(opened, engine, tmp_path):
    opened().sample(1, labels=[0], seed=0, denoise=False)
    for path in (tmp_path / "engines").glob("*.engine"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    before = builds(engine)
    flow = opened()
    flow.sample(1, labels=[0], seed=0, denoise=False)
    assert builds(engine) == before + flow.config.blocks


def test_a_damaged_engine_that_another_process_builds_is_waited_for(opened, engine):
    flow = opened()
    supply, profiles = maker_of(flow).supply, [Profile(least=1, most=1)]
    sidecar = supply.get(0, "step", profiles).sidecar
    path = supply.cache.path / f"{sidecar.key}.engine"
    whole, before = path.read_bytes(), builds(engine)
    path.write_bytes(bytes(len(whole)))

    def on_building(building: Building) -> bool:
        assert building.reason == "another process builds it"
        return False

    supply._on_building = on_building
    with supply.cache.lock(sidecar.key), pytest.raises(tfr.Cancelled):
        supply.get(0, "step", profiles)
    held = contextlib.ExitStack()
    held.enter_context(supply.cache.lock(sidecar.key))

    def other_process_ends(_: Building) -> None:
        path.write_bytes(whole)
        held.close()

    supply._on_building = other_process_ends
    assert supply.get(0, "step", profiles).reason == ""
    assert builds(engine) == before


def test_compiled_kernels_are_shared_and_kept(opened, engine, tmp_path):
    def launch(maker: TrtMaker, block: int) -> Any:
        program = maker.program(block, "forward", images=1)
        buffers = {name: maker.device.allocate(one.nbytes) for name, one in (program.inputs | program.outputs).items()}
        program.bind({name: buffer.address for name, buffer in buffers.items()}).launch()
        return program.engine._how

    def kernels(*blocks: int) -> list[bytes]:
        maker = maker_of(opened())
        return [launch(maker, block).runtime_cache.blob for block in blocks]

    folder = tmp_path / "engines"
    if engine == "trt":
        launch(maker_of(opened()), 0)
        assert not list(folder.glob("kernels-*"))
        return
    assert kernels(0, 1) == [b"1 launches", b"2 launches"]
    (file,) = folder.glob("kernels-*")
    assert file.name == "kernels-1.7.1-sm_89.bin"
    assert kernels(0) == [b"3 launches"]
    file.write_bytes(file.read_bytes() + b"x")
    assert kernels(1) == [b"1 launches"]


def test_flags_of_the_build_are_those_of_the_precision(opened, engine, monkeypatch, tmp_path):
    flags = []
    build = fake.Builder.build_serialized_network

    def watched(self: Any, network: Any, config: Any) -> bytes:
        flags.append({flag.name for flag in config.flags})
        return build(self, network, config)

    monkeypatch.setattr(fake.Builder, "build_serialized_network", watched)
    own = {"STRICT_NANS"} if engine == "trt" else {"STRICT_NANS", "REQUIRE_USER_ALLOCATION"}
    for tf32, more in ((False, set()), (True, {"TF32"})):
        flow = opened(tf32=tf32)
        maker_of(flow).program(0, "forward", images=1)
        assert flow.engine.precision == ("tf32" if tf32 else "float32")
        assert flags[-1] == own | more
    assert len(flags) == 2
    for path in (tmp_path / "engines").glob("*.json"):
        assert json.loads(path.read_text())["built"]["gpu"] == "Host GPU"


def test_kernel_times_are_shared_between_builds(opened, engine, tmp_path):
    maker = maker_of(opened())
    maker.program(0, "forward", images=1)
    files = list((tmp_path / "engines").glob("timing-*.bin"))
    if engine == "trt-rtx":
        assert files == []
        return
    assert files[0].name == "timing-11.4.0-sm_89.bin"
    assert files[0].read_bytes() == fake.TimingCache.known
    files[0].write_bytes(b"of another GPU")
    maker.program(1, "forward", images=1)
    assert files[0].read_bytes() == fake.TimingCache.known


def test_what_a_bundle_cannot_be_computed_in(opened):
    with pytest.raises(tfr.InputError, match="tf32 is of float32 bundles, this one is of float16"):
        opened("class", "float16", tf32=True)
    with pytest.raises(tfr.EngineError, match="is of int8 and has no graphs for trt") as caught:
        opened("class", "int8")
    assert "tarflow convert" in caught.value.hint


def test_a_gpu_that_the_package_has_no_target_for(opened, engine, monkeypatch):
    monkeypatch.setattr(engine_module, "gpu_of", lambda _: Gpu(name="H200", target="sm_90", driver="CUDA 13.0"))
    if engine == "trt":
        assert opened().sample(1, labels=[0], denoise=False).images.shape[0] == 1
        return
    with pytest.raises(tfr.EngineError, match=r"TensorRT for RTX 1\.7\.1 cannot build for sm_90"):
        opened()
