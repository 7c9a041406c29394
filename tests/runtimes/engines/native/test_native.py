"""Engine `native` in the runtime: images and densities of ort-cpu, one set of bits, progress, cancelling, refusals."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes.engines.native import library
from tarflow_runtimes.engines.native.library import NATIVE_BUILD, native_library

is_built = pytest.mark.skipif(native_library() is None, reason=f"the native kernel was not built: {NATIVE_BUILD}")

GUIDANCE = {
    "plain": 0.0,
    "guided": tfr.Guidance(weight=1.5, attention_temperature=0.7),
    "annealed": tfr.Guidance(weight=2.0, guide="b", attention_temperature=1.4, anneal=True),
}
MODELS = ["class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "tokens"]


@pytest.fixture(scope="module")
def native(exported: Callable) -> Iterator[Callable[..., tfr.Flow]]:
    """`native(name, precision)`: an open flow on the engine."""
    opened: dict[tuple[str, str], tfr.Flow] = {}

    def get(name: str, precision: str = "float32") -> tfr.Flow:
        key = name, precision
        return opened.setdefault(key, opened.get(key) or tfr.load(exported(name, precision).path, engine="native"))

    yield get
    for flow in opened.values():
        flow.close()


@is_built
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", GUIDANCE)
def test_pictures_are_those_of_ort_cpu(exported, flows, native, name, kind):
    noise, labels = exported(name).latents(5), exported(name).labels(5)
    found = native(name).decode(noise, labels, guidance=GUIDANCE[kind])
    np.testing.assert_array_equal(noise, exported(name).latents(5), "the caller's noise was written to")
    np.testing.assert_allclose(found, flows(name).decode(noise, labels, guidance=GUIDANCE[kind]), rtol=0, atol=2e-5)


@is_built
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_rounded_weights(exported, flows, native, precision):
    noise, labels = exported("class").latents(3), exported("class").labels(3)
    whole, rounded = flows("class").decode(noise, labels), native("class", precision).decode(noise, labels)
    assert 1e-5 < np.abs(rounded - whole).max() < 0.05
    assert native("class", precision).engine_report["weights"] == precision


@is_built
def test_an_image_has_one_set_of_bits(native):
    """In any batch, beside guided and unguided ones."""
    flow = native("class_n16")
    guidance = [GUIDANCE["guided"], 0.0, GUIDANCE["annealed"], 0.0, GUIDANCE["guided"]]
    labels, seeds = [0, 1, 2, None, 0], [3, 1, 4, 1, 5]
    together = flow.sample(5, labels=labels, seed=seeds, guidance=guidance, denoise=False).images
    for i in range(5):
        alone = flow.sample(1, labels=labels[i : i + 1], seed=seeds[i], guidance=guidance[i], denoise=False).images[0]
        np.testing.assert_array_equal(alone, together[i])
    whole = flow.sample(40, seed=2, denoise=False).images
    np.testing.assert_array_equal(flow.sample(40, seed=2, denoise=False, batch_size=7).images, whole)


@is_built
@pytest.mark.parametrize("name", MODELS)
def test_densities_are_those_of_ort_cpu(exported, flows, native, name):
    source, flow, other = exported(name), native(name), flows(name)
    images, labels = source.images(5), source.labels(5)
    for found, expected in zip(flow.encode(images, labels), other.encode(images, labels), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    z, log_det = flow.encode(images, labels)
    assert (z.dtype, log_det.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(flow.decode(z, labels), images, rtol=0, atol=1e-5)


@is_built
def test_a_density_has_one_set_of_bits(exported, native):
    flow, images = native("class_n16"), exported("class_n16").images(64)
    labels = np.arange(64) % 3
    z, log_det = flow.encode(images, labels)
    log_prob, posteriors = flow.log_prob(images, labels), flow.classify(images)
    for first, count in ((0, 1), (7, 1), (59, 5)):
        few = slice(first, first + count)
        for found, expected in zip(flow.encode(images[few], labels[few]), (z, log_det), strict=True):
            np.testing.assert_array_equal(found, expected[few])
        np.testing.assert_array_equal(flow.log_prob(images[few], labels[few]), log_prob[few])
        np.testing.assert_array_equal(flow.classify(images[few]), posteriors[few])


@is_built
def test_gradients_and_windows_are_those_of_ort_cpu(exported, flows, native):
    source, flow, other = exported("class"), native("class"), flows("class")
    images, labels = source.images(3), source.labels(3)
    np.testing.assert_array_equal(flow.denoise(images, labels), other.denoise(images, labels))
    plan = tfr.Parallel(window=2, tolerance=1e-5)
    noise = source.latents(2)
    np.testing.assert_array_equal(flow.decode(noise, plan=plan), other.decode(noise, plan=plan))


@is_built
def test_progress_and_cancelling(native):
    flow = native("class_n16")
    told: list[tfr.Step] = []
    expected = flow.sample(20, seed=0, denoise=False, on_step=told.append).images
    steps = [step.step for step in told]
    assert steps == sorted(set(steps))
    assert steps[-1] == told[-1].total == 2 * 15
    assert {step.block for step in told} == {0, 1}
    for _ in range(50):  # a block may end before anybody looks at it
        mixed: list[tfr.Step] = []
        flow.sample(3, labels=[0, 1, 2], guidance=[0.0, 1.0, 0.0], seed=0, denoise=False, on_step=mixed.append)
        assert mixed[-1].step == 2 * 15
        assert 15 in {step.step for step in mixed}
    threads = threading.active_count()
    with pytest.raises(tfr.Cancelled):
        flow.sample(20, seed=0, on_step=lambda _: False)
    assert threading.active_count() == threads
    np.testing.assert_array_equal(flow.sample(20, seed=0, denoise=False).images, expected)


@is_built
def test_ctrl_c_ends_the_kernel(native):
    flow = native("class_n16")
    threads = threading.active_count()

    def interrupt(_: tfr.Step) -> None:
        _thread.interrupt_main()

    def draw() -> None:
        for _ in range(100):
            flow.sample(200, seed=0, denoise=False, on_step=interrupt)

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert threading.active_count() == threads


@is_built
def test_ctrl_c_ends_a_long_encoding(exported, native, monkeypatch):
    from tarflow_runtimes.engines.native import engine

    flow, images = native("class_n16"), exported("class_n16").images(500)
    expected = flow.log_prob(images)
    monkeypatch.setattr(engine, "MOMENT", 0.0)
    np.testing.assert_array_equal(flow.log_prob(images), expected)

    def encode() -> None:
        threading.Timer(0.05, _thread.interrupt_main).start()
        for _ in range(1000):
            flow.log_prob(images)

    with pytest.raises(KeyboardInterrupt):
        encode()
    assert "tarflow-native" not in {thread.name for thread in threading.enumerate()}


WITHOUT_ONNXRUNTIME = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)

sys.meta_path.insert(0, Missing())
import tarflow_runtimes as tfr

with tfr.load(engine="native") as flow:
    images = flow.sample(2, labels=[3, 7], seed=0, guidance=1.0, denoise=False).images
    z, log_det = flow.encode(images, [3, 7])
    assert abs(flow.decode(z, [3, 7]) - images).max() < 1e-3
    assert flow.log_prob(images, [3, 7]).shape == log_det.shape == (2,)
    assert flow.classify(images).argmax(axis=1).tolist() == [3, 7]
    steps = []
    for call in (
        lambda: flow.denoise(images, [3, 7]),
        lambda: flow.sample(1, seed=0, on_step=steps.append),
        lambda: flow.decode(z, [3, 7], plan=tfr.Parallel(window=4)),
    ):
        try:
            call()
        except tfr.EngineError as error:
            print(error)
            print(error.hint)
    assert not steps, "it decoded before it said that it cannot denoise"
assert "onnxruntime" not in sys.modules
"""


@is_built
def test_what_needs_no_gradient_needs_no_onnx_runtime():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ONNXRUNTIME], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    says = "engine native leaves gradients (denoise) and windows to ort-cpu: "
    says += "engine ort-cpu needs ONNX Runtime, which is not installed"
    assert done.stdout.splitlines() == [says, 'pip install "tarflow-sdk[ort]"'] * 3


@is_built
def test_what_it_does_not_run(exported):
    with pytest.raises(tfr.EngineError, match=r"does not read float16, .* class\.tarflow") as caught:
        tfr.load(exported("class", "float16").path, engine="native")
    assert "ort-cpu" in caught.value.hint
    with tfr.load(exported("class", "bfloat16").path, engine="native") as flow:
        assert np.isfinite(flow.sample(1, seed=0, denoise=False).images).all()
        with pytest.raises(tfr.EngineError, match="no graphs for ort-cpu"):
            flow.sample(1, seed=0)
    flow = tfr.load(exported("class").path, engine="native")
    flow.close()
    with pytest.raises(tfr.EngineError, match="closed"):
        flow.sample(1, seed=0)


def test_a_library_that_is_not_there_says_how_to_build_it(exported, monkeypatch, tmp_path):
    library.open_library.cache_clear()
    monkeypatch.setattr(library, "native_library", lambda: None)
    with pytest.raises(tfr.EngineError, match="was not built") as caught:
        tfr.load(exported("class").path, engine="native")
    assert caught.value.hint == NATIVE_BUILD
    (tmp_path / "other.so").write_bytes(b"not a library")
    monkeypatch.undo()
    monkeypatch.setenv("TARFLOW_NATIVE_LIBRARY", str(tmp_path / "other.so"))
    with pytest.raises(tfr.EngineError, match="does not load"):
        tfr.load(exported("class").path, engine="native")
    library.open_library.cache_clear()
