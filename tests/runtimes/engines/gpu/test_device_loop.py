"""The device loop on the host's memory, against the CPU engine; what crosses between host and device; failures."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import tarflow_runtimes as tfr
from hard_cases import closed_while_sampling, export_hard_model
from host_device import HostDevice, HostMaker, HostReplay, ReachMaker, open_flow
from rooms import Turn, conditions_of
from tarflow_runtimes.engines.gpu import ort as ort_programs
from tarflow_runtimes.engines.gpu.loop import LOOK, SHAPES
from tarflow_runtimes.engines.gpu.ort import OrtProgram
from tarflow_runtimes.engines.gpu.workspace import Workspace

MODELS = ["class", "class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "tokens"]
ANNEALED = tfr.Guidance(weight=1.3, attention_temperature=0.7, anneal=True)
GUIDED = tfr.Guidance(weight=1.3, guide="a", attention_temperature=1.4)
MIXED = (GUIDED, 0.0, ANNEALED)


@pytest.fixture(scope="module")
def on_device(exported) -> Iterator[Callable[..., tfr.Flow]]:
    """`on_device(name)`: a flow whose device is the host's memory."""
    opened: dict[str, tfr.Flow] = {}

    def get(name: str) -> tfr.Flow:
        if name not in opened:
            opened[name] = open_flow(exported(name).path)
        return opened[name]

    yield get
    for flow in opened.values():
        flow.close()


def exact(window: int = 0, init: str = "noise") -> tfr.Parallel:
    return tfr.Parallel(window=window, tolerance=0.0, init=init)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("guidance", [0.0, ANNEALED, MIXED], ids=["unguided", "annealed", "mixed"])
def test_the_images_are_those_of_the_cpu(exported, flows, on_device, name, guidance):
    model = exported(name)
    blocks = model.config.blocks
    mixed = tuple((exact(3), tfr.Sequential(), exact(init="zeros"))[i % 3] for i in range(blocks))
    for images in (1, 3):
        noise, labels = model.latents(images), model.labels(images)
        options = {"guidance": guidance[:images] if isinstance(guidance, tuple) else guidance}
        expected = flows(name).decode(noise, labels, **options)
        for plan in (None, exact(), exact(1), exact(3), exact(2, "zeros"), tfr.Plan(blocks=mixed)):
            actual = on_device(name).decode(noise, labels, plan=plan, **options)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=str(plan))


@pytest.mark.parametrize("name", ["class_n16", "three_blocks"])
def test_attention_reads_what_is_filled_and_no_less(exported, flows, name):
    model = exported(name)
    patches = model.config.patches
    noise, labels = model.latents(3), model.labels(3)
    with open_flow(model.path, ReachMaker) as flow:
        for plan in (None, exact(), exact(3), exact(2, "zeros")):
            flow.engine.maker.bound.clear()
            np.testing.assert_allclose(
                flow.decode(noise, labels, plan=plan, guidance=MIXED),
                flows(name).decode(noise, labels, guidance=MIXED),
                rtol=0,
                atol=1e-5,
            )
            reaches = set(flow.engine.maker.bound)
            assert all(kv_length <= patches for kv_length in reaches)
            if patches == 16 and plan is None:
                assert reaches == {14, 16}, "a group of 14 steps, then the last"
            if patches == 16 and plan == exact(2, "zeros"):
                assert min(reaches) == 8, "windows of 2 get at most 8 patches further in 4 launches"


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("init", ["noise", "zeros"])
def test_the_report_of_a_parallel_run_is_that_of_the_cpu(exported, flows, on_device, window, init):
    plan = tfr.Parallel(window=window, tolerance=1e-3, init=init)
    noise = exported("class_n16").latents(5) * np.array([0.01, 0.3, 1.0, 2.0, 4.0], np.float32)[:, None, None]
    expected = flows("class_n16").sample(5, noise=noise, plan=plan, denoise=False).report
    report = on_device("class_n16").sample(5, noise=noise, plan=plan, denoise=False).report
    assert [block.block for block in report.blocks] == [1, 0]
    for ours, theirs in zip(report.blocks, expected.blocks, strict=True):
        assert ours.strategy == plan
        assert ours.calls == theirs.calls
        assert ours.residual == pytest.approx(theirs.residual, abs=1e-5)
        assert ours.accepted == ()
        assert ours.sequential_images == ()
    assert len(set(report.blocks[0].calls)) > 1, "the images were to be finished at different times"
    assert report.non_finite == ()


def test_a_sequential_report(on_device):
    report = on_device("three_blocks").sample(2, seed=0).report
    assert [(block.block, block.strategy, block.calls) for block in report.blocks] == [
        (block, tfr.Sequential(), (3, 3)) for block in (2, 1, 0)
    ]


def test_an_image_does_not_depend_on_its_batch(on_device):
    flow = on_device("class_n16")
    for plan in (None, exact(5)):
        together = flow.sample(5, seed=3, plan=plan, denoise=False).images
        for index in range(5):
            alone = flow.sample(1, seed=3, first_index=index, plan=plan, denoise=False).images
            np.testing.assert_allclose(alone[0], together[index], rtol=0, atol=1e-5)


def transfers_of(flow: tfr.Flow, call: Callable[[], Any]) -> tuple[int, int]:
    """Uploads and downloads of a call, its programs and recordings made before."""
    call()
    transfers = flow.engine.device.transfers
    before = dataclasses.astuple(transfers)
    call()
    return transfers.uploads - before[0], transfers.downloads - before[1]


@pytest.mark.parametrize("name", ["class", "class_n16", "three_blocks"])
@pytest.mark.parametrize("images", [1, 4])
def test_nothing_crosses_in_sequential_decoding(exported, on_device, name, images):
    model, flow = exported(name), on_device(name)
    z, labels = model.latents(images), model.labels(images)
    # Up go the noise, the labels, the guidance and the temperatures; down come the patches.
    assert transfers_of(flow, lambda: flow.decode(z, labels)) == (4, 1)
    assert transfers_of(flow, lambda: flow.decode(z, labels, guidance=1.0)) == (4, 1)
    heard: list[tfr.Step] = []
    assert transfers_of(flow, lambda: flow.decode(z, labels, on_step=heard.append)) == (4, 1)
    assert heard


def test_nothing_but_looks_crosses_in_parallel_decoding(exported, on_device):
    model, flow = exported("class_n16"), on_device("class_n16")
    plan = tfr.Plan(blocks=(tfr.Parallel(tolerance=1e-3), tfr.Sequential()))
    z = model.latents(4)
    report = flow.sample(4, noise=z, plan=plan, denoise=False).report
    looks = math.ceil(max(report.blocks[1].calls) / LOOK)
    # Without labels all are of the null class, which is a label, too; the tolerance goes up for the parallel block.
    assert transfers_of(flow, lambda: flow.decode(z, plan=plan)) == (5, 1 + looks)
    assert transfers_of(on_device("unconditional"), lambda: on_device("unconditional").decode(z)) == (3, 1)


def test_memory_stays_and_goes(exported):
    flow = open_flow(exported("class_n16").path)
    device = flow.engine.device
    flow.sample(3, seed=0, plan=exact(4))
    once = device.allocated
    for _ in range(3):
        flow.sample(3, seed=0, plan=exact(4))
    assert device.allocated == once
    for images in (1, 2, 4, 5):
        flow.sample(images, seed=0, denoise=False)
    assert device.allocated < 4 * once
    made = flow.engine.maker.made
    for images in (2, 4, 5)[-SHAPES:]:
        flow.sample(images, seed=0, denoise=False)
    assert flow.engine.maker.made == made, "the shapes used last are kept"
    flow.sample(3, seed=0, denoise=False)
    assert flow.engine.maker.made > made, "the one used longest ago is not"
    images = flow.sample(2, seed=0).images_device
    flow.close()
    assert device.allocated == images.numpy().nbytes
    del images
    assert device.allocated == 0


def test_what_is_given_out_is_taken_without_a_copy(on_device):
    flow = on_device("class")
    sample = flow.sample(2, seed=0)
    array = sample.images_device
    view, tensor = np.from_dlpack(array), torch.from_dlpack(array)
    np.testing.assert_array_equal(view, sample.images)
    tensor[1, 0, 2, 3] = 7.0
    assert view[1, 0, 2, 3] == 7.0
    np.testing.assert_array_equal(array.numpy(), view)
    assert view.__array_interface__["data"][0] == tensor.data_ptr()
    device = flow.engine.device
    held = device.allocated
    del array, sample
    assert view[1, 0, 2, 3] == 7.0
    del view
    assert device.allocated == held, "the tensor still lies there"
    del tensor
    assert device.allocated < held


def test_arrays_say_where_they_are(on_device):
    array = on_device("class").sample(1, seed=0).images_device
    assert array.__dlpack_device__() == (1, 0)
    assert not hasattr(array, "__cuda_array_interface__")
    assert repr(array).startswith("<DeviceArray float32 [1, 1, 8, 8] on ")
    with pytest.raises(BufferError):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        array.__dlpack__(dl_device=(2, 0))
    device = on_device("class").engine.device
    held = device.allocated
    array.__dlpack__()  # a capsule that nobody takes
    assert device.allocated == held
    del array
    assert device.allocated < held


def test_arrays_on_the_device_are_taken(on_device):
    flow = on_device("class")
    sample = flow.sample(2, labels=[0, 1], seed=0, denoise=False)
    z, _ = flow.encode(sample.images_device, [0, 1])
    np.testing.assert_array_equal(z, flow.encode(sample.images, [0, 1])[0])
    np.testing.assert_array_equal(flow.classify(sample.images_device), flow.classify(sample.images))
    latents = flow.engine.to_device(z)
    np.testing.assert_array_equal(flow.decode(latents, [0, 1]), flow.decode(z, [0, 1]))
    again = flow.sample(2, labels=[0, 1], noise=latents, denoise=False)
    np.testing.assert_array_equal(again.images, flow.decode(z, [0, 1]))
    with pytest.raises(tfr.InputError, match=r"z must have shape \[B, 4, 16\]"):
        flow.decode(sample.images_device)


def test_the_host_has_no_images_on_a_device(flows):
    assert flows("class").sample(1, seed=0).images_device is None


def test_progress_comes_in_groups_and_ends_at_the_end(on_device):
    flow = on_device("class_n16")
    heard: list[tfr.Step] = []
    flow.sample(3, seed=0, on_step=heard.append, denoise=False)
    assert [(step.block, step.step, step.total) for step in heard] == [
        (1, 14, 30), (1, 15, 30), (0, 29, 30), (0, 30, 30)
    ]  # fmt: skip
    heard.clear()
    flow.sample(3, seed=0, on_step=heard.append, plan=tfr.Parallel(tolerance=1e-3), denoise=False)
    steps = [step.step for step in heard]
    assert steps == sorted(steps)
    assert heard[-1] == tfr.Step(block=0, step=30, total=30)


@pytest.mark.parametrize("plan", [None, tfr.Parallel(tolerance=0.0)])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_is_stopped_leaves_the_flow_usable(on_device, plan, error):
    flow = on_device("class_n16")
    expected = flow.sample(3, seed=0, plan=plan).images

    def stop(_: tfr.Step) -> bool:
        if error is not None:
            raise error
        return False

    with pytest.raises(error or tfr.Cancelled):
        flow.sample(3, seed=1, plan=plan, on_step=stop)
    np.testing.assert_array_equal(flow.sample(3, seed=0, plan=plan).images, expected)


@pytest.mark.parametrize("failing", [1, 2, 20, 33])
def test_a_launch_that_fails_leaves_the_flow_usable(exported, monkeypatch, failing):
    with open_flow(exported("class_n16").path) as flow:
        run, launched = ort_programs.OrtBound.run, []

        def fail(self):
            launched.append(self)
            if len(launched) == failing:
                raise tfr.EngineError("the device fell off the bus")
            run(self)

        monkeypatch.setattr(ort_programs.OrtBound, "run", fail)
        with pytest.raises(tfr.EngineError, match="fell off"):
            flow.sample(3, seed=0)
        monkeypatch.undo()
        expected = open_flow(exported("class_n16").path).sample(3, seed=0).images
        np.testing.assert_array_equal(flow.sample(3, seed=0).images, expected)


class _Corrupt:
    """A recording that forgets its last launch."""

    def __init__(self, launches: Sequence[Any]) -> None:
        self._launches = launches

    def replay(self) -> None:
        for launch in self._launches[:-1]:
            launch.launch()


class _CorruptMaker(HostMaker):
    def program(self, block: int, kind: str, **shape: int) -> OrtProgram:
        program = super().program(block, kind, **shape)
        program.record = _Corrupt  # type: ignore[method-assign, assignment]
        return program


@pytest.mark.parametrize("plan", [None, tfr.Parallel(tolerance=0.0)])
def test_a_recording_that_computes_something_else_is_refused(exported, plan):
    with (
        open_flow(exported("class_n16").path, maker=_CorruptMaker) as flow,
        pytest.raises(tfr.EngineError, match="recorded steps of block 1 give other values"),
    ):
        flow.sample(1, seed=0, plan=plan)


class _Unsteady:
    """A launch whose images differ from run to run, as those of kernels that add in no fixed order do."""

    def __init__(self, bound: ort_programs.OrtBound, finished: np.ndarray, size: float) -> None:
        self._bound, self._finished, self._size = bound, finished, size
        self._random = np.random.default_rng(0)

    def launch(self) -> None:
        self._bound.launch()
        self._finished += self._size * self._random.choice((-1, 1), self._finished.shape)


class _UnsteadyMaker(HostMaker):
    def program(self, block: int, kind: str, **shape: int) -> OrtProgram:
        program = super().program(block, kind, **shape)
        bind, spec = program.bind, program.inputs["finished"]

        def unsteady(addresses, **options):
            memory = (ctypes.c_float * (spec.nbytes // 4)).from_address(addresses["finished"])
            return _Unsteady(bind(addresses, **options), np.frombuffer(memory, np.float32), 1e-7)

        program.bind = unsteady  # type: ignore[method-assign]
        program.record = lambda launches: HostReplay(lambda: [one.launch() for one in launches])  # type: ignore[method-assign, assignment]
        return program


def test_launches_that_differ_from_themselves_are_no_fault_of_a_recording(exported, flows):
    with open_flow(exported("class_n16").path, maker=_UnsteadyMaker) as flow:
        found = flow.sample(1, seed=0, denoise=False).images
    np.testing.assert_allclose(found, flows("class_n16").sample(1, seed=0, denoise=False).images, atol=1e-4)


def test_a_block_that_never_settles_is_an_error(exported, monkeypatch):
    look = Workspace.look

    def stuck(self, parity):
        position, calls, residual = look(self, parity)
        return np.zeros_like(position), calls, residual

    monkeypatch.setattr(Workspace, "look", stuck)
    with (
        open_flow(exported("class_n16").path) as flow,
        pytest.raises(tfr.EngineError, match="block 1 is not settled after 15 evaluations"),
    ):
        flow.sample(1, seed=0, plan=tfr.Parallel(window=4))


def test_a_cache_that_is_not_updated_in_place_is_refused(exported, monkeypatch):
    launch, bind = ort_programs.OrtBound.launch, OrtProgram.bind

    def bind_noting(self, addresses, **options):
        bound = bind(self, addresses, **options)
        bound.addresses = addresses
        return bound

    def launch_losing(self):
        launch(self)
        if self.addresses["key_0"] == self.addresses["next_key_0"]:
            HostDevice().zero(self.addresses["key_0"], 4)

    monkeypatch.setattr(OrtProgram, "bind", bind_noting)
    monkeypatch.setattr(ort_programs.OrtBound, "launch", launch_losing)
    with (
        open_flow(exported("class").path) as flow,
        pytest.raises(tfr.EngineError, match="computes next_key_0 wrongly"),
    ):
        flow.sample(1, seed=0)


@pytest.fixture(scope="module")
def hard_path(tmp_path_factory):
    return export_hard_model(tmp_path_factory.mktemp("hard") / "hard.tarflow")


def test_values_that_are_not_finite_lead_to_the_sequential_answer(hard_path):
    options = {"seed": 0, "denoise": False}
    with warnings.catch_warnings(), tfr.load(hard_path) as cpu, open_flow(hard_path) as flow:
        warnings.simplefilter("ignore", tfr.DecodeWarning)
        expected = cpu.sample(8, **options)
        sequential = flow.sample(8, **options)
        heard: list[tfr.Step] = []
        parallel = flow.sample(8, plan=tfr.Parallel(tolerance=1e-5), on_step=heard.append, **options)
        again = flow.sample(8, **options)
        one = flow.sample(1, first_index=4, plan=tfr.Parallel(tolerance=1e-5), **options)
    finite = [i for i in range(8) if i not in expected.report.non_finite]
    assert finite
    assert expected.report.non_finite == sequential.report.non_finite == parallel.report.non_finite
    scale = np.abs(expected.images[finite]).max()
    for sample in (sequential, parallel):
        np.testing.assert_allclose(sample.images[finite], expected.images[finite], atol=1e-4 * scale)
    np.testing.assert_array_equal(again.images, sequential.images)
    steps = [step.step for step in heard]
    assert steps == sorted(steps)
    assert steps[-1] == 30
    report = parallel.report.blocks[1]
    assert report.sequential_images
    assert all(calls > 15 for calls in report.calls), "what was tried in parallel counts, too"
    assert report.residual == 0.0
    assert one.report.blocks[1].sequential_images == (0,), "its iterates overflow, not its answer"
    assert one.report.non_finite == ()
    np.testing.assert_allclose(one.images[0], expected.images[4], atol=1e-4 * scale)


def test_density_score_and_posteriors_are_those_of_the_cpu(exported, flows, on_device):
    for name in ("class", "three_blocks", "no_nvp_unconditional"):
        model, cpu, flow = exported(name), flows(name), on_device(name)
        images, labels = model.images(3), model.labels(3)
        for ours, theirs in zip(flow.encode(images, labels), cpu.encode(images, labels), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        options = {"sigma": 0.3}
        np.testing.assert_allclose(
            flow.denoise(images, labels, **options), cpu.denoise(images, labels, **options), rtol=0, atol=1e-5
        )
        if labels is not None:
            np.testing.assert_allclose(flow.classify(images), cpu.classify(images), rtol=1e-4, atol=1e-4)


def test_large_batches_of_the_density_run_in_pieces(exported, flows, monkeypatch):
    model = exported("class")
    monkeypatch.setattr("tarflow_runtimes.engines.gpu.engine.ACTIVATION_BYTES", 3 * 4 * 4 * (4 * 2 * 4 + 20 * 16))
    monkeypatch.setattr("tarflow_runtimes.engines.gpu.engine.PROGRAM_BYTES", 1)
    with open_flow(model.path) as flow:
        images, labels = model.images(7), model.labels(7)
        np.testing.assert_allclose(flow.denoise(images, labels), flows("class").denoise(images, labels), atol=1e-5)
        made = flow.engine.maker.made
        flow.encode(images[:3], labels[:3])
        assert flow.engine.maker.made == made + 2, "two programs are kept at most"


def test_blocks_by_themselves(exported, flows, on_device):
    """Turns that end early, that start from given patches, and images that are guided differently."""
    model = exported("class_n16")
    ours, theirs = (flow.engine for flow in (on_device("class_n16"), flows("class_n16")))
    noise, patches = model.latents(3), model.latents(3, seed=1)
    guidance = [tfr.Guidance(weight=0.5, attention_temperature=0.5), tfr.Guidance(), ANNEALED]
    conditions = conditions_of(guidance, np.array([0, 1, 3]), on_device("class_n16").config)
    for block in range(2):
        for steps in (0, 3, 4, None):
            heard: list[tuple[int, int]] = []
            turns = [Turn(block=block, strategy=tfr.Sequential(), steps=steps)]
            x, (report,) = ours.invert(turns, noise, conditions, lambda *step, heard=heard: heard.append(step))
            expected, (other,) = theirs.invert(turns, noise, conditions)
            np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5)
            assert report == other
            assert [done for _, done in heard] == {0: [], 3: [2, 3], 4: [4], None: [14, 15]}[steps]
            for strategy in (exact(), exact(5), exact(1, "zeros")):
                for start in (None, patches):
                    turns = [Turn(block=block, strategy=strategy, steps=steps, start=start)]
                    x, (report,) = ours.invert(turns, noise, conditions)
                    expected, (other,) = theirs.invert(turns, noise, conditions)
                    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5)
                    assert report.calls == other.calls


def test_the_gradient_is_that_of_the_cpu(exported, flows, on_device):
    model = exported("class_n16")
    x, labels, cotangent = model.latents(2), np.array([0, 1]), model.latents(2, seed=1)
    for blocks in ([0], [1], [0, 1]):
        ours, theirs = (
            flow.engine.vjp(blocks, x, labels, lambda z, images: z + cotangent[images])
            for flow in (on_device("class_n16"), flows("class_n16"))
        )
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_float16_bundle_runs_in_half_of_the_memory(exported, flows):
    single = flows("class_n16").sample(3, seed=0).images
    expected = flows("class_n16", "float16").sample(3, seed=0).images
    sizes = {}
    for precision in ("float32", "float16"):
        with open_flow(exported("class_n16", precision).path) as flow:
            sample = flow.sample(3, seed=0)
            assert flow.engine_report["weights"] == flow.engine.precision == sample.metadata["precision"] == precision
            sizes[precision] = flow.engine.device.allocated
    np.testing.assert_allclose(sample.images, expected, rtol=0, atol=2e-2)
    assert 1e-5 < np.abs(sample.images - single).max() < 5e-2
    assert sizes["float16"] < 0.8 * sizes["float32"]


def test_an_int8_bundle_is_refused_with_what_to_do(exported):
    with pytest.raises(tfr.EngineError, match="is of int8 and has no graphs for ort-cuda") as caught:
        open_flow(exported("class", "int8").path)
    assert "tarflow convert" in caught.value.hint


def test_threads_may_share_a_flow(exported):
    model = exported("class_n16")
    with open_flow(model.path) as flow:
        calls = [
            lambda: flow.sample(3, labels=[0, 1, 2], seed=1, guidance=1.0).images,
            lambda: flow.sample(3, seed=2, plan=tfr.Parallel(tolerance=0.0)).images,
            lambda: flow.encode(model.images(2), model.labels(2))[0],
        ]
        with ThreadPoolExecutor(4) as pool:
            found = [result.result() for result in [pool.submit(call) for _ in range(4) for call in calls]]
        expected = [call() for call in calls]
    for i, array in enumerate(found):
        np.testing.assert_array_equal(array, expected[i % len(calls)])


def test_a_callback_may_decode(on_device):
    flow = on_device("class_n16")
    expected = flow.sample(2, seed=0, denoise=False).images
    inner: list[np.ndarray] = []
    outer = flow.sample(
        2, seed=0, denoise=False, on_step=lambda _: inner.append(flow.sample(2, seed=0, denoise=False).images)
    )
    for images in (outer.images, *inner):
        np.testing.assert_array_equal(images, expected)


def test_a_closed_flow_is_an_error(exported):
    model = exported("class")
    flow = open_flow(model.path)
    flow.sample(1, seed=0)
    flow.close()
    for call in (
        lambda: flow.sample(1, seed=0),
        lambda: flow.encode(model.images(1)),
        lambda: flow.denoise(model.images(1)),
    ):
        with pytest.raises(tfr.EngineError, match="closed"):
            call()


def test_closing_while_another_thread_runs(exported):
    flow = open_flow(exported("class_n16").path)
    outcome = closed_while_sampling(flow)
    assert len(outcome) == 1
