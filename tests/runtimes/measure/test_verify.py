"""Comparisons: they measure what they say and cannot pass by accident; `verify` works on any engine and reference."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rooms import Bundle, open_bundle
from tarflow_export import export_bundle
from tarflow_runtimes.bundle.tolerances import (
    FLOOR_FACTOR,
    GPU_ENGINES,
    TOLERANCES,
    WIDEST,
    Record,
    Tolerance,
    compare,
    require_passed,
    tolerance_for,
)
from tarflow_runtimes.engines.ort_cpu.engine import OrtCpuEngine
from tarflow_runtimes.errors import BundleError, VerificationError
from tarflow_runtimes.measure.verify import verify
from tarflow_sdk.testing import random_model, tiny_config

LOOSE = Tolerance(measure="max_abs", limit=1.0, widened=True, reason="a test")


def check(actual: Any, expected: Any, tolerance: Tolerance = LOOSE, floor: float | None = None) -> Record:
    return compare(
        "x",
        "forward",
        np.asarray(actual),
        np.asarray(expected),
        tolerance=tolerance,
        floors={} if floor is None else {"x": floor},
    )


def test_measures() -> None:
    record = check([1.0, -2.0, 10.0], [1.0, -2.5, 12.0])
    assert record.max_abs == 2.0
    assert record.mean_abs == pytest.approx(2.5 / 3)
    assert record.max_scaled == pytest.approx(0.2)
    assert record.relative == pytest.approx(np.sqrt(4.25) / np.sqrt(1 + 6.25 + 144))
    assert record.cosine == pytest.approx(126.0 / np.sqrt(105.0 * 151.25))
    assert not record.passed
    assert check([1.0], [1.5]).passed


@pytest.mark.parametrize("measure", ["max_abs", "max_scaled", "relative"])
def test_each_measure_can_fail_and_pass(measure: Any) -> None:
    tolerance = Tolerance(measure=measure, limit=0.1, reason="a test")
    assert check([5.0, 1.0], [5.05, 1.0], tolerance).passed
    assert not check([5.0, 1.0], [15.0, 1.0], tolerance).passed


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([np.nan, 0.0], [0.0, 0.0]),
        ([0.0, 0.0], [np.nan, 0.0]),
        ([np.inf], [np.inf]),
        ([np.nan], [np.nan]),
        ([0.0], [0.0, 0.0]),
        ([[0.0]], [0.0]),
        ([], []),
        (np.zeros(2, np.int64), [0.0, 0.0]),
    ],
)
def test_what_cannot_be_compared_never_passes(actual: Any, expected: Any) -> None:
    for floor in (None, 1e9, float("inf"), float("nan")):
        record = check(actual, expected, floor=floor)
        assert not record.passed
        with pytest.raises(VerificationError):
            require_passed([record])


def test_floors_widen_a_bound_that_asks_for_them() -> None:
    tight = Tolerance(measure="max_abs", limit=1e-4, widened=True, reason="a test")
    assert check([0.02], [0.0], tight, floor=0.02 / FLOOR_FACTOR).passed
    assert not check([0.02], [0.0], tight, floor=0.019 / FLOOR_FACTOR).passed
    assert not check([0.02], [0.0], tight).passed
    assert not check([0.02], [0.0], tight, floor=float("inf")).passed
    assert not check([0.02], [0.0], tight, floor=float("nan")).passed
    assert not check([2 * WIDEST], [0.0], tight, floor=1e9).passed
    assert not check([0.02], [0.0], dataclasses.replace(tight, widened=False), floor=1.0).passed


def test_a_reference_of_zeros_passes_zeros_only() -> None:
    relative = Tolerance(measure="relative", limit=1e-3, reason="a test")
    assert check([0.0, 0.0], [0.0, 0.0], relative).passed
    assert not check([0.1, 0.0], [0.0, 0.0], relative).passed


def test_nothing_compared_is_a_failure() -> None:
    with pytest.raises(VerificationError, match="nothing"):
        require_passed([])


def test_the_table_has_a_reason_on_every_line_and_float32_is_tight() -> None:
    stages = set(TOLERANCES["*", "float32"])
    for (engine, dtype), table in TOLERANCES.items():
        assert set(table) == stages
        for stage, tolerance in table.items():
            assert tolerance.reason
            if dtype == "float32" and stage != "round_trip":
                assert tolerance.limit <= (1e-4 if engine == "*" else 1e-3)
    assert tolerance_for("any engine", "float32", "gradient").limit == 1e-5


@pytest.mark.parametrize("engine", GPU_ENGINES)
def test_the_tolerances_of_engines_on_a_gpu(engine: str) -> None:
    """Images within 1e-3 in float32, 40 dB in float16, and in bfloat16 a bound that a wrong graph misses."""
    exact, rounded, coarse = (tolerance_for(engine, name, "sample") for name in ("float32", "float16", "bfloat16"))
    assert (exact.measure, exact.limit) == ("max_abs", pytest.approx(1e-3))
    assert (rounded.measure, 20 * np.log10(2 / rounded.limit)) == ("relative", pytest.approx(40))
    assert coarse.limit < 0.5
    assert tolerance_for(engine, "bfloat16", "forward").limit == 8 * tolerance_for(engine, "float16", "forward").limit


# -- an engine against a bundle's reference ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return export_bundle(random_model(tiny_config()), folder / "tiny.tarflow").path


def test_the_default_engine_passes_the_verification_that_travels(exported: Path) -> None:
    bundle = open_bundle(exported)
    seen: list[int] = []
    with contextlib.closing(OrtCpuEngine(bundle)) as engine:
        records = verify(bundle, engine, on_block=seen.append)
    require_passed(records)
    assert seen == list(range(bundle.config.blocks))
    assert {record.stage for record in records} >= {"forward", "gradient", "inverse", "sample", "denoise"}


class Coarse(OrtCpuEngine):
    """An engine that says that it computes in another precision than the bundle's."""

    name = "trt"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.precision = "bfloat16"


def test_an_engine_is_judged_by_the_precision_that_it_computes_in(exported: Path) -> None:
    bundle = open_bundle(exported)
    with contextlib.closing(Coarse(bundle)) as engine:
        records = verify(bundle, engine)
    assert {record.stage: record.tolerance for record in records} == {
        stage: tolerance.limit for stage, tolerance in TOLERANCES["*", "bfloat16"].items()
    }


def test_every_comparison_names_its_graph(exported: Path) -> None:
    bundle = open_bundle(exported)
    with contextlib.closing(OrtCpuEngine(bundle)) as engine:
        records = verify(bundle, engine)
    assert {record.graph for record in records if record.name.startswith("block 1 guided")} == {
        "graphs/ort-cpu/step_guided.onnx",
        "graphs/ort-cpu/window_guided.onnx",
    }
    assert {record.graph for record in records if record.name.startswith("whole model")} == {None}


class Wrong(OrtCpuEngine):
    """An engine with one fault."""

    fault = ""

    def forward(self, block: int, patches: Any, labels: Any) -> Any:
        z, log_det = super().forward(block, patches, labels)
        if self.fault == "z":
            z = z + np.float32(1e-3)
        if self.fault == "log_det":
            log_det = -log_det
        return z, log_det

    def vjp(self, blocks: Any, patches: Any, labels: Any, cotangent: Any) -> Any:
        z, gradient = super().vjp(blocks, patches, labels, cotangent)
        return z, gradient * np.float32(1.0001) if self.fault == "gradient" else gradient

    def invert(self, turns: Any, noise: Any, conditions: Any, on_step: Any = None) -> Any:
        changed: dict[str, Any] = {}
        if self.fault == "guidance":
            changed["guidance"] = conditions.guidance[:, ::-1] * np.array([[1.0], [0.9]], np.float32)
        if self.fault == "temperature":
            changed["inverse_temperature"] = np.ones_like(conditions.inverse_temperature)
        if self.fault == "label":
            changed["labels"] = conditions.labels[:, ::-1].copy()
        return super().invert(turns, noise, dataclasses.replace(conditions, **changed), on_step)


@pytest.mark.parametrize("fault", ["z", "log_det", "gradient", "guidance", "temperature", "label"])
def test_a_wrong_engine_fails(exported: Path, fault: str) -> None:
    bundle = open_bundle(exported)
    engine = Wrong(bundle)
    try:
        engine.fault = fault
        records = verify(bundle, engine)
    finally:
        engine.close()
    with pytest.raises(VerificationError):
        require_passed(records)


def copy_with_reference(exported: Path, folder: Path, **changed: Any) -> Bundle:
    """The bundle with other arrays in its reference (None drops one); digests are not checked here."""
    path = folder / "changed.tarflow"
    shutil.copytree(exported, path)
    with np.load(path / "reference.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays = {name: array for name, array in {**arrays, **changed}.items() if array is not None}
    np.savez(path / "reference.npz", **arrays)
    bundle = open_bundle(exported)
    return dataclasses.replace(bundle, reference=path / "reference.npz")


@pytest.mark.parametrize(
    "changed",
    [
        {"trajectory": np.zeros((3, 1, 2, 2), np.float32)},
        {"trajectory": np.zeros((3,), np.float32)},
        {"log_prob": np.zeros(3, np.float64)},
        {"guided": None},
        {"tempered": None},
        {"sample": None},
        {"labels": None},
    ],
)
def test_a_reference_of_another_model_is_refused(exported: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    bundle = copy_with_reference(exported, tmp_path, **changed)
    engine = OrtCpuEngine(bundle)
    with pytest.raises(BundleError, match="reference"):
        verify(bundle, engine)
    engine.close()


def test_a_damaged_reference_is_refused(exported: Path, tmp_path: Path) -> None:
    bundle = copy_with_reference(exported, tmp_path)
    assert bundle.reference is not None
    bundle.reference.write_bytes(b"PK\x03\x04 not a zip file")
    engine = OrtCpuEngine(bundle)
    with pytest.raises(BundleError, match="damaged"):
        verify(bundle, engine)
    engine.close()


def test_a_bundle_without_reference_says_why(tmp_path: Path) -> None:
    bundle = open_bundle(export_bundle(random_model(tiny_config()), tmp_path / "x.tarflow", verify=False).path)
    engine = OrtCpuEngine(bundle)
    with pytest.raises(VerificationError, match="--no-verify"):
        verify(bundle, engine)
    engine.close()
