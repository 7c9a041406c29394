"""Targets of the tests: every engine and dtype on the GPU of this machine (`-m gpu`), and stand-ins on the host.

A stand-in is the same engine over the host's memory, so that what a test says is proven where there is no GPU; what a
GPU alone can show (that its kernels are right) is then still open, and is what `-m gpu` is for.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes import _doctor as doctor
from tarflow_runtimes._bundle import open_bundle
from tarflow_runtimes._device.host import HostDevice
from tarflow_runtimes._engines.device_engine import DeviceEngine
from tarflow_runtimes._engines.ort_programs import OrtMaker
from tarflow_runtimes._flow import shipped_bundle

ENGINES = ("ort-cuda", "trt", "trt-rtx")
DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Target:
    """An engine in a dtype, on the GPU or standing in for it."""

    engine: str
    dtype: str
    stands_in: bool


STAND_INS = [pytest.param(Target("ort-cuda", "float32", stands_in=True), id="ort-cuda-on-the-host")]


@functools.cache
def found() -> dict[str, doctor.Fault | None]:
    """What is in the way of each engine on this machine."""
    return {engine: fault for engine, fault in doctor.verdicts(doctor.gather()).items() if engine in ENGINES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test on the engines that are ready; `test_ready` says of the others, once, what is missing."""
    if "target" in metafunc.fixturenames:
        ready = [engine for engine, fault in found().items() if fault is None]
        on_gpu = [
            pytest.param(Target(engine, dtype, stands_in=False), id=f"{engine}-{dtype}", marks=pytest.mark.gpu)
            for engine in ready
            for dtype in DTYPES
        ]
        metafunc.parametrize("target", [*on_gpu, *STAND_INS], scope="module")


@pytest.fixture
def faults() -> dict[str, doctor.Fault | None]:
    return found()


@pytest.fixture(scope="module")
def flow(target: Target) -> Iterator[tfr.Flow]:
    """The shipped digits on the target."""
    with open_flow(target, shipped_bundle()) as opened:
        yield opened


def open_flow(target: Target, path: Path) -> tfr.Flow:
    """A bundle on the target."""
    if not target.stands_in:
        return tfr.load(path, engine=target.engine, dtype=target.dtype)
    bundle = open_bundle(path)
    provider: dict[str, Any] = {"provider": "CPUExecutionProvider", "options": {}}
    maker = OrtMaker(bundle, HostDevice(), name=target.engine, dtype=target.dtype, **provider)
    return tfr.Flow(bundle, DeviceEngine(bundle, maker), "stands in")


@pytest.fixture(scope="session")
def cpu() -> Iterator[tfr.Flow]:
    """The shipped digits on the default engine."""
    with tfr.load() as opened:
        yield opened


@pytest.fixture
def close(target: Target, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Compare pictures in -1 .. 1: within 1e-3 in float32, at least 40 dB in float16; bfloat16 is reported.

    Less than 20 dB is another picture, in any dtype.
    """

    def check(images: np.ndarray, expected: np.ndarray) -> None:
        difference = images.astype(np.float64) - expected
        assert np.isfinite(difference).all()
        square = float(np.square(difference).mean())
        psnr = 10 * np.log10(4 / square) if square else np.inf
        largest = float(np.abs(difference).max())
        record_property("psnr_db", psnr)
        record_property("max_difference", largest)
        sys.stdout.write(f"{target.engine} {target.dtype}: {psnr:.1f} dB, largest difference {largest:.1e}\n")
        if target.dtype == "float32":
            assert largest <= 1e-3
        assert psnr >= {"float32": 40.0, "float16": 40.0, "bfloat16": 20.0}[target.dtype]

    return check
