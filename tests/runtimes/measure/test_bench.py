"""`bench`: the arithmetic of its rates, what it measures and in which order, the ceilings and the picture."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import host_device
import tarflow_runtimes as tfr
from rooms import CPU_ENGINE
from tarflow_runtimes.measure.bench import PROFILES, bench, parallel_of, settled_curve, slope, step_times
from tarflow_runtimes.measure.bench_plot import BAR, COLOURS, WIDTH, draw_plot, round_ticks
from tarflow_runtimes.measure.bench_results import BenchResult, Case, sequential_work
from tarflow_runtimes.measure.ceilings import measure_ceilings

DECODES = ("sequential", "parallel", "parallel:2", "auto")


@pytest.fixture(scope="module")
def result(exported: Callable) -> BenchResult:
    """All ways of decoding, guided and not, two batches; three rounds."""
    told: list[tuple[int, int]] = []
    found = bench(
        exported("class_n16").path,
        batches=(1, 3),
        decodes=DECODES,
        guidance=(0.0, 1.5),
        rounds=3,
        ceilings=False,
        on_progress=lambda done, total: told.append((done, total)),
    )
    total = 16 * (1 + PROFILES + 3)
    assert told == [(done, total) for done in range(1, total + 1)]
    return found


@pytest.mark.parametrize("name", ["class_n16", "no_nvp", "one_head"])
def test_the_work_counts_every_linear_weight(exported: Callable, flows: Callable, name: str) -> None:
    parameters = exported(name).model.named_parameters()
    matrices = [
        p
        for key, p in parameters
        if p.ndim == 2 and key.endswith("weight") and "embed" not in key and "norm" not in key
    ]
    config = flows(name).config
    weights = sum(p.numel() for p in matrices)
    one, two = (sequential_work(config, rows=rows) for rows in (1, 2))
    steps, depth = config.patches - 1, config.blocks * config.layers * config.width
    known = sum(range(1, config.patches))
    assert one.operations == 2 * weights * steps + 4 * depth * known
    assert one.bytes == 4 * weights * steps + 2 * 4 * depth * (known + steps)
    assert two.operations == 2 * one.operations
    assert two.bytes - one.bytes == 2 * 4 * depth * (known + steps)
    half = sequential_work(config, rows=1, weight_bytes=2, cache_bytes=2)
    assert 2 * half.bytes == one.bytes


def test_settled_curve() -> None:
    assert settled_curve([], 5) == ()
    assert settled_curve([(1, 3), (1, 1, 1, 1)], 5) == (1.0, 2.0, 4.0, 4.5, 5.0)


def test_slope_ignores_what_disturbs_single_steps() -> None:
    steps = np.array([np.arange(20) * 0.25 + 100.0] * 3)
    assert slope(steps.tolist()) == pytest.approx(0.25)
    steps[0] += 50.0
    steps[:, 0] = steps[:, 7] = 900.0
    assert slope(steps.tolist()) == pytest.approx(0.25)
    assert slope([[1.0], [2.0]]) is None


def test_parallel_of() -> None:
    assert parallel_of("sequential", None) is None
    assert parallel_of("auto", 1e-3) is None
    assert parallel_of("parallel", None) == tfr.Parallel()
    assert parallel_of("parallel:7", 1e-3) == tfr.Parallel(window=7, tolerance=1e-3)
    for word in ("jacobi", "", "parallel:", "parallel:0", "parallel:-1", "parallel:x", "auto:3", "sequential:"):
        with pytest.raises(tfr.InputError, match="unknown way of decoding"):
            parallel_of(word, None)
    with pytest.raises(tfr.InputError, match="tolerance"):
        parallel_of("parallel", -1.0)


def test_every_case_is_measured(result: BenchResult) -> None:
    expected = [
        Case(engine="cpu", guidance=weight, batch=batch, decode=decode)
        for weight in (0.0, 1.5)
        for batch in (1, 3)
        for decode in DECODES
    ]
    assert [one.case for one in result.cases] == expected
    for one in result.cases:
        assert 0.0 < one.p50_ms <= one.p95_ms
        assert one.first_ms > 0.0
        assert one.images_per_s == pytest.approx(1e3 * one.case.batch / one.p50_ms)
        assert one.step_us == pytest.approx(1e3 * one.p50_ms / (2 * 15))
        assert one.speedup > 0.0
        assert one.max_difference < 1e-3
        assert one.non_finite == 0
        assert [block.block for block in one.blocks] == [1, 0]
        assert all(block.ms > 0.0 for block in one.blocks)


def test_sequential_cases_have_rates_and_parallel_ones_calls(result: BenchResult) -> None:
    for one in result.cases:
        sequential = one.case.decode in ("sequential", "auto")  # nothing is tuned beside this bundle
        assert (one.gflops is not None) == (one.gbs is not None) == (one.slope_us is not None) == sequential
        if one.case.decode == "sequential":
            assert (one.speedup, one.max_difference) == (1.0, 0.0)
        for block in one.blocks:
            assert len(block.step_us) == (15 if sequential else 0)
            assert all(value > 0.0 for value in block.step_us)
            assert block.strategy["decode"] == ("sequential" if sequential else "parallel")
            if sequential:
                assert (block.settled, block.calls_mean, block.calls_max) == ((), 15.0, 15)
            else:
                assert (block.settled[0], block.settled[-1]) == (1.0, 16.0)
                assert len(block.settled) == block.calls_max + 1 <= 16
                assert list(block.settled) == sorted(block.settled)
                assert 1.0 <= block.calls_mean <= block.calls_max
    assert "tarflow tune" in result.engines[0].plans


def test_rates_are_work_by_time(result: BenchResult, flows: Callable) -> None:
    for one in result.cases:
        rows = one.case.batch * (2 if one.case.guidance else 1)
        work = sequential_work(flows("class_n16").config, rows=rows)
        if one.gflops is not None and one.gbs is not None:
            assert one.gflops == pytest.approx(1e-6 * work.operations / one.p50_ms)
            assert one.gbs == pytest.approx(1e-6 * work.bytes / one.p50_ms)


def test_the_report_is_json_with_a_header(result: BenchResult, exported: Callable) -> None:
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(document)[:2] == ["schema", "schema_version"]
    assert (document["schema"], document["schema_version"]) == ("tarflow-bench", 1)
    head = document["header"]
    assert head["digest"] == tfr.load(exported("class_n16").path).bundle.digest
    assert {"date", "tarflow-sdk", "python", "numpy", "system", "processor", "cpus", "bundle"} <= set(head)
    assert (head["rounds"], head["seed"], head["patches"]) == (3, 0, 16)
    assert document["ceilings"] is None
    assert document["memory"]["weights"] > 0
    assert document["engines"][0]["report"]["engine"] == CPU_ENGINE
    assert document["engines"][0]["load_ms"] > 0
    assert document["engines"][0]["first_image_ms"] > 0
    assert len(document["cases"]) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_known_on_linux(result: BenchResult) -> None:
    memory = result.memory
    assert memory.start is not None
    assert memory.ready is not None
    assert memory.peak is not None
    assert memory.peak >= max(memory.start, memory.ready) > 0


def test_rounds_go_there_and_back_and_images_change(exported: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []
    noises: dict[int, list[bytes]] = {1: [], 2: []}
    sample = tfr.Flow.sample

    def recorded(flow: tfr.Flow, n: int, *, noise: np.ndarray, **options: Any) -> tfr.Sample:
        if noise.tobytes() not in noises[n]:
            noises[n].append(noise.tobytes())
        drawn.append((n, noises[n].index(noise.tobytes())))
        return sample(flow, n, noise=noise, **options)

    monkeypatch.setattr("tarflow_runtimes.measure.bench.PROFILES", 1)
    monkeypatch.setattr(tfr.Flow, "sample", recorded)
    bench(exported("class").path, batches=(1, 2), decodes=("sequential",), rounds=2, ceilings=False)
    warm_up, rounds = drawn[:5], drawn[5:]
    assert warm_up == [(1, 0), (1, 0), (1, 0), (2, 0), (2, 0)]
    assert rounds == [(1, 0), (1, 0), (2, 0), (2, 0), (2, 1), (2, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("name", ["unconditional", "tokens"])
def test_a_model_without_classes_is_guided_by_temperature(exported: Callable, name: str) -> None:
    options = {"decodes": ("sequential",), "guidance": (1.0,), "rounds": 1, "ceilings": False}
    found = bench(exported(name).path, batches=(2,), **options)  # type: ignore[arg-type]
    assert found.cases[0].gflops is not None
    assert found.header["shape"] == list(exported(name).config.shape)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_rounded_weights_are_fewer_bytes(exported: Callable, precision: str) -> None:
    options = {"batches": (1,), "decodes": ("sequential",), "rounds": 1, "ceilings": False}
    found = bench(exported("class", precision).path, **options)  # type: ignore[arg-type]
    exact = sequential_work(exported("class").config, rows=1)
    [case] = found.cases
    assert found.header["precision"] == precision
    assert case.gbs is not None
    assert 1e6 * case.gbs * case.p50_ms < 0.6 * exact.bytes


def test_steps_are_the_times_between_reports() -> None:
    """Two blocks of three steps; the second block reports its last two at once, as a device does."""
    marks = [[(1, 2.0), (2, 3.0), (3, 5.0)], [(4, 6.0), (6, 10.0)]]
    times = list(step_times(marks, 3, 1.0))
    assert [block.tolist() for block in times] == [[1.0, 1.0, 2.0], [1.0, 2.0, 2.0]]


def test_a_parallel_block_takes_until_its_last_report() -> None:
    [times] = step_times([[(2, 3.0), (3, 4.0)]], 5, 1.0)
    assert times.sum() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"batches": (0,)}, "batch"),
        ({"guidance": (-1.0,)}, "guidance"),
        ({"rounds": 0}, "rounds"),
        ({"seed": -1}, "seed"),
        ({"decodes": ("fast",)}, "fast"),
        ({"decodes": ("parallel",), "tolerance": float("nan")}, "tolerance"),
        ({"engines": ()}, "nothing to measure"),
    ],
)
def test_bad_arguments_are_refused_before_the_bundle_is_read(options: dict[str, Any], what: str) -> None:
    with pytest.raises(tfr.InputError, match=what):
        bench("no such bundle", ceilings=False, **options)  # type: ignore[arg-type]


def test_an_engine_that_is_not_there(exported: Callable) -> None:
    with pytest.raises(tfr.EngineError, match="unknown engine 'cuda'"):
        bench(exported("class").path, engines=("ort-cpu", "cuda"), ceilings=False)


def test_ceilings(flows: Callable) -> None:
    found = measure_ceilings(gemm_size=64, stream_bytes=1 << 20, rounds=2)
    assert found.threads == flows("class").engine_report["threads"]
    assert found.blas
    for rates in (found.one_thread, found.all_threads):
        assert all(0.0 < rate < 1e7 for rate in dataclasses.astuple(rates))


def test_ceilings_that_fail() -> None:
    with pytest.raises(tfr.EngineError, match=r"could not be measured: .*Error") as raised:
        measure_ceilings(gemm_size=-1)
    assert "--no-ceilings" in raised.value.hint


def test_the_plot(result: BenchResult) -> None:
    picture = draw_plot(result)
    assert (picture.mode, picture.width) == ("RGB", WIDTH)
    values = np.asarray(picture)
    bars = values[120 : 120 + BAR * len(result.cases), 200:1000]
    for block in (0, 1):
        colour = [int(COLOURS[block][i : i + 2], 16) for i in (1, 3, 5)]
        assert (bars == colour).all(axis=2).sum() > 200


def test_the_bars_have_the_lengths_of_the_times(result: BenchResult) -> None:
    times = {1: 6.0, 0: 2.0}
    blocks = tuple(dataclasses.replace(block, ms=times[block.block]) for block in result.cases[0].blocks)
    picture = draw_plot(dataclasses.replace(result, cases=(dataclasses.replace(result.cases[0], blocks=blocks),)))
    row = np.asarray(picture)[84 + 36 + 10]
    pixels = [
        int((row == [int(COLOURS[block][i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).sum()) for block in (1, 0)
    ]
    assert pixels[0] == pytest.approx(3 * pixels[1], rel=0.05)
    assert sum(pixels) > 500


@pytest.mark.parametrize("decode", DECODES)
def test_a_plot_of_one_way_of_decoding(result: BenchResult, decode: str) -> None:
    cases = tuple(one for one in result.cases if one.case.decode == decode)
    assert draw_plot(dataclasses.replace(result, cases=cases)).height > 300


def test_ticks_are_round_numbers() -> None:
    assert round_ticks(59.0) == [0, 10, 20, 30, 40, 50]
    assert round_ticks(0.31) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert round_ticks(3, whole=True) == [0, 1, 2, 3]
    assert round_ticks(0.0) == [0]


def test_an_engine_on_a_device_is_measured(exported: Callable) -> None:
    path = exported("class_n16").path
    with host_device.stand_in():
        with tfr.load(path, "ort-cuda") as flow:
            plans = tfr.tune(flow, [2], draws=1)
        result = bench(path, engines=["ort-cuda"], batches=[2], decodes=["sequential"], rounds=1, ceilings=False)
    assert plans.entries[0].identity["engine"] == "ort-cuda"
    (case,) = result.cases
    assert case.gflops is not None
    assert case.gflops > 0
    assert all(block.ms > 0 for block in case.blocks)
