"""Engines: names, missing and doubled installations, threads, the cutting of batches, closing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tarflow_runtimes as tfr
from rooms import Conditions, Turn, open_bundle
from tarflow_runtimes.engines.onnxruntime import import_onnxruntime
from tarflow_runtimes.engines.ort_cpu import engine as cpu_engine
from tarflow_runtimes.engines.ort_cpu.caches import CachePool
from tarflow_runtimes.engines.ort_cpu.cpus import usable_cpus
from tarflow_runtimes.engines.ort_cpu.engine import Limits, OrtCpuEngine
from tarflow_runtimes.engines.ort_cpu.session import Session, aligned_zeros


def test_tf32_is_of_gpus_and_float32(exported):
    with pytest.raises(tfr.InputError, match="tf32 needs an engine on a GPU and a float32 bundle, not ort-cpu"):
        tfr.load(exported("class").path, "ort-cpu", tf32=True)
    with pytest.raises(tfr.InputError, match="not trt and float16"):
        tfr.load(exported("class", "float16").path, engine="trt", tf32=True)


def test_no_cpu_computes_in_bfloat16(exported):
    with pytest.raises(tfr.EngineError, match="is of bfloat16 and has no graphs for ort-cpu") as caught:
        tfr.load(exported("class", "bfloat16").path, "ort-cpu")
    assert "convert" in caught.value.hint


def test_an_unknown_engine_lists_the_known(exported):
    with pytest.raises(tfr.EngineError, match="'cuda'") as caught:
        tfr.load(exported("class").path, engine="cuda")
    assert "ort-cpu" in caught.value.hint
    assert "auto" in caught.value.hint


def without_onnxruntime(code: str) -> subprocess.CompletedProcess[str]:
    blocker = "import sys; sys.modules['onnxruntime'] = None\n"
    return subprocess.run([sys.executable, "-c", blocker + code], capture_output=True, text=True, check=False)


def test_a_missing_onnxruntime_names_the_command(exported):
    code = f"""
import tarflow_runtimes as tfr
try:
    tfr.load({str(exported("class").path)!r}, "ort-cpu")
except tfr.EngineError as error:
    print(error, "|", error.hint)
"""
    done = without_onnxruntime(code)
    assert (
        done.stdout == 'engine ort-cpu needs ONNX Runtime, which is not installed | pip install "tarflow-sdk[ort]"\n'
    ), done.stderr


def distribution(name: str, *files: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, version="1.2.3", files=[importlib.metadata.PackagePath(file) for file in files])


@pytest.fixture
def _fresh_import(monkeypatch):
    import_onnxruntime.cache_clear()
    yield
    monkeypatch.undo()
    import_onnxruntime.cache_clear()


@pytest.mark.usefixtures("_fresh_import")
def test_two_packages_in_one_folder_are_named(exported, monkeypatch):
    installed = [
        distribution("onnxruntime", "onnxruntime/__init__.py"),
        distribution("onnxruntime_gpu", "onnxruntime/__init__.py"),
        distribution("onnxruntime-genai", "onnxruntime_genai/__init__.py"),
        distribution("numpy", "numpy/__init__.py"),
        distribution("onnxruntime-broken"),
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed)
    with pytest.raises(tfr.EngineError, match=r"onnxruntime 1\.2\.3, onnxruntime-gpu 1\.2\.3") as caught:
        tfr.load(exported("class").path, "ort-cpu")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in caught.value.hint


@pytest.mark.usefixtures("_fresh_import")
def test_an_old_onnxruntime_is_refused(exported, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    with pytest.raises(tfr.EngineError, match=r"1\.20\.1 is too old"):
        tfr.load(exported("class").path, "ort-cpu")
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    with pytest.raises(tfr.EngineError, match=r"1\.30\.0 is too old for engine ort-cuda, 1\.31 is needed"):
        tfr.load(exported("class").path, engine="ort-cuda")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "garbage"}, None),
    ],
)
def test_cpus_of_a_control_group(tmp_path: Path, monkeypatch, files, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == (expected or 8)


def test_buffers_start_a_cache_line():
    for shape in ((1,), (3, 5), (2, 7, 11)):
        for dtype in (np.float32, np.float16, np.int32):
            array = aligned_zeros(shape, dtype)
            assert array.ctypes.data % 64 == 0
            assert array.shape == shape
            assert array.dtype == dtype
            assert not array.any()


def conditions(images: int, *forms: str, patches: int = 4) -> Conditions:
    """Those of images that take graphs of these forms in turn; no labels."""
    guidance = np.zeros((images, 2, patches), np.float32)
    temperatures = np.ones((1 + any(forms), images), np.float32)
    for image in range(images):
        form = forms[image % len(forms)]
        guidance[image] = 1.0 if form else 0.0
        temperatures[-1, image] = 2.0 if form == "_tempered" else 1.0
    return Conditions(labels=None, guidance=guidance, inverse_temperature=temperatures)


@pytest.fixture
def on_cpus(exported, monkeypatch) -> Callable[..., OrtCpuEngine]:
    """`on_cpus(count, name)`: an engine of its own on so many CPUs."""

    def opened(cpus: int, name: str = "class") -> OrtCpuEngine:
        monkeypatch.setattr(cpu_engine, "usable_cpus", lambda: cpus)
        return OrtCpuEngine(open_bundle(exported(name).path))

    return opened


@pytest.fixture
def rows(monkeypatch) -> Callable[..., list[int]]:
    """`rows(engine, images, *forms)`: the rows of the caches of each part that such a batch is cut into, sorted."""
    taken, take = [], CachePool.take

    def noted(pool: CachePool, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        taken.append(shape[0])
        return take(pool, shape, dtype)

    def of(engine: OrtCpuEngine, images: int, *forms: str, noise: np.ndarray | None = None) -> list[int]:
        taken.clear()
        config = engine.bundle.config
        z = np.zeros((images, config.patches, config.patch_values), np.float32) if noise is None else noise[:images]
        given = conditions(images, *forms, patches=config.patches)
        of.x, _ = engine.invert([Turn(block=0, strategy=tfr.Sequential(), steps=1)], z, given)
        return sorted(taken)[:: 2 * config.layers]

    monkeypatch.setattr(CachePool, "take", noted)
    return of


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("forms", [("",), ("_guided",), ("", "_guided"), ("_tempered", "", "_guided")])
def test_parts_cover_the_batch_once(exported, on_cpus, rows, workers, forms):
    single, engine, noise = on_cpus(1), on_cpus(workers), exported("class").latents(100)
    turn, every = Turn(block=0, strategy=tfr.Sequential(), steps=1), conditions(100, *forms)
    alone = [single.invert([turn], noise[i : i + 1], every.of(slice(i, i + 1)))[0] for i in range(100)]
    for images in (1, 2, 3, 5, 16, 17, 64, 100):
        parts = rows(engine, images, *forms, noise=noise)
        assert sum(parts) == sum(2 if forms[image % len(forms)] else 1 for image in range(images))
        assert len(parts) == 1 or max(parts) <= 16
        np.testing.assert_allclose(rows.x, np.concatenate(alone[:images]), rtol=0, atol=1e-5)


def test_parts_keep_their_caches_small(on_cpus, rows, monkeypatch):
    engine = on_cpus(2)
    config = engine.bundle.config
    row_bytes = 2 * 4 * config.layers * config.patches * config.width
    assert [len(rows(engine, images, "")) for images in (1, 11, 12, 32, 33, 64)] == [1, 1, 2, 2, 4, 4]
    monkeypatch.setattr(cpu_engine, "PART_CACHE_BYTES", 8 * row_bytes)
    assert rows(engine, 32, "") == rows(engine, 16, "_guided") == [8, 8, 8, 8]
    monkeypatch.setattr(cpu_engine, "PART_CACHE_BYTES", 1)
    assert rows(engine, 24, "") == [6, 6, 6, 6]


def test_large_batches_run_in_pieces(exported, monkeypatch):
    source = exported("class")
    with tfr.load(source.path, "ort-cpu") as flow:
        whole = flow.encode(source.images(7), source.labels(7))
        gradient = flow.denoise(source.images(7), source.labels(7))
        monkeypatch.setattr(cpu_engine, "ACTIVATION_BYTES", 1)
        for ours, theirs in zip(flow.encode(source.images(7), source.labels(7)), whole, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(flow.denoise(source.images(7), source.labels(7)), gradient, rtol=0, atol=1e-6)


def test_large_blocks_keep_their_batch_whole(exported, flows, on_cpus, rows, monkeypatch):
    options = {"labels": [i % 3 for i in range(9)], "seed": 1, "guidance": 1.0}
    expected = flows("class_n16").sample(9, **options).images
    monkeypatch.setattr(cpu_engine, "OPERATOR_THREADS_BYTES", 1)
    engine = on_cpus(16, "class_n16")
    with tfr.Flow(engine.bundle, engine) as flow:
        assert rows(engine, 64, "_guided") == [128]
        np.testing.assert_allclose(flow.sample(9, **options).images, expected, rtol=0, atol=1e-5)
        monkeypatch.setattr(cpu_engine, "CACHE_BYTES", 2 * 2 * 8 * 2 * 16 * 64)
        assert rows(engine, 5, "_guided") == [2, 4, 4]
        np.testing.assert_allclose(flow.sample(9, **options).images, expected, rtol=0, atol=1e-5)


def test_parts_in_threads_give_the_same_images(flows, on_cpus, monkeypatch):
    options = {"labels": [i % 3 for i in range(12)], "seed": 3, "guidance": 1.0}
    expected = flows("class_n16").sample(12, **options).images
    monkeypatch.setattr(cpu_engine, "ROWS_PER_PART", 2)
    for workers in (1, 2, 5):
        engine = on_cpus(workers, "class_n16")
        found = tfr.Flow(engine.bundle, engine).sample(12, **options).images
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_failing_part_stops_the_others(on_cpus, monkeypatch):
    started, inputs = [], cpu_engine.StepInputs

    def failing(**given: Any) -> Any:
        started.append(given)
        if len(started) == 2:
            raise tfr.EngineError("out of order")
        return inputs(**given)

    monkeypatch.setattr(cpu_engine, "StepInputs", failing)
    monkeypatch.setattr(cpu_engine, "ROWS_PER_PART", 1)
    monkeypatch.setattr(cpu_engine, "LEAST_ROWS_PER_PART", 1)
    engine = on_cpus(3, "class_n16")
    threads = threading.active_count()
    for plan in (None, tfr.Parallel()):
        started.clear()
        with pytest.raises(tfr.EngineError, match="out of order"):
            tfr.Flow(engine.bundle, engine).sample(6, seed=0, plan=plan)
        assert threading.active_count() == threads
        assert len(started) <= 6


@pytest.fixture
def sessions(monkeypatch) -> weakref.WeakSet[Session]:
    """The sessions that are open."""
    alive: weakref.WeakSet[Session] = weakref.WeakSet()

    class Noted(Session):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            alive.add(self)

    monkeypatch.setattr(cpu_engine, "Session", Noted)
    return alive


def test_few_sessions_stay_open(exported, sessions):
    with tfr.load(exported("three_blocks").path, "ort-cpu") as flow:
        expected = flow.sample(2, seed=0).images
        assert len(sessions) == 9
    assert len(sessions) == 0
    with tfr.Flow(flow.bundle, OrtCpuEngine(flow.bundle, Limits(sessions=1))) as flow:
        np.testing.assert_array_equal(flow.sample(2, seed=0).images, expected)
        assert len(sessions) == 1


@pytest.mark.parametrize("name", ["class", "no_nvp", "unconditional"])
def test_a_gradient_that_is_recomputed_is_the_same(exported, sessions, name):
    source = exported(name)
    options = {"images": source.images(5), "labels": source.labels(5), "sigma": 0.5}
    with tfr.load(source.path, "ort-cpu") as flow:
        expected = flow.denoise(**options)
    with tfr.Flow(flow.bundle, OrtCpuEngine(flow.bundle, Limits(activations=1))) as flow:
        found = flow.denoise(**options)
        assert not any("vjp" in session.name for session in sessions)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_a_closed_flow_is_an_error(exported):
    source = exported("class")
    with tfr.load(source.path, "ort-cpu") as flow:
        flow.sample(1, seed=0)
    flow.close()
    for call in (
        lambda: flow.sample(1, seed=0),
        lambda: flow.encode(source.images(1)),
        lambda: flow.denoise(source.images(1)),
    ):
        with pytest.raises(tfr.EngineError, match="closed"):
            call()


@pytest.mark.parametrize("name", ["class_n16", "no_nvp"])
def test_the_window_of_a_block_is_a_fixed_point(exported, flows, name):
    source, engine = exported(name), flows(name).engine
    z, patches = source.latents(2), flows(name).config.patches
    labels = np.array([1, 3]) if source.config.classes else None
    given = Conditions(
        labels=None if labels is None else labels[None],
        guidance=np.zeros((2, 2, patches), np.float32),
        inverse_temperature=np.ones((1, 2), np.float32),
    )
    for block in range(2):
        x, _ = engine.invert([Turn(block=block, strategy=tfr.Sequential())], z, given)
        turn = Turn(block=block, strategy=tfr.Parallel(tolerance=0.0), steps=1, start=x)
        again, _ = engine.invert([turn], z, given)
        np.testing.assert_allclose(again, x, rtol=0, atol=5e-6)
        back, log_det = engine.forward(block, x, labels)
        np.testing.assert_allclose(back, z, rtol=0, atol=1e-5)
        assert log_det.shape == (2,)


def test_the_first_steps_of_an_inverse(exported, flows):
    engine, z = flows("class_n16").engine, exported("class_n16").latents(5)
    given = Conditions(
        labels=np.array([[0, 1, 2, 3, 0]]),
        guidance=np.zeros((5, 2, 16), np.float32),
        inverse_temperature=np.ones((1, 5), np.float32),
    )
    for block in range(2):
        whole, some, none = (
            engine.invert([Turn(block=block, strategy=tfr.Sequential(), steps=steps)], z, given)[0]
            for steps in (15, 3, 0)
        )
        order = slice(None, None, -1 if block else 1)
        np.testing.assert_array_equal(some[:, order][:, :4], whole[:, order][:, :4])
        np.testing.assert_array_equal(some[:, order][:, 4:], z[:, order][:, 4:])
        np.testing.assert_array_equal(none, z)
