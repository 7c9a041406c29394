"""Comparisons measure what they say and cannot pass by accident; the table of tolerances."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tarflow_runtimes import VerificationError
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
