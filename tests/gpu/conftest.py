"""Targets of the tests: every engine and precision on the GPU of this machine (`-m gpu`), and stand-ins on the host.

A stand-in is the same engine over the host's memory, so that what a test says is proven where there is no GPU; what a
GPU alone can show (that its kernels are right) is then still open, and is what `-m gpu` is for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import command_line
import fake_tensorrt
import host_device
import tarflow_runtimes as tfr

ENGINES = ("ort-cuda", "trt", "trt-rtx")
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Target:
    """An engine in a precision, on the GPU or standing in for it."""

    engine: str
    precision: str
    stands_in: bool


STAND_INS = [pytest.param(Target(engine, "float32", stands_in=True), id=f"{engine}-on-the-host") for engine in ENGINES]


@functools.cache
def found() -> dict[str, Any]:
    """What `tarflow doctor` says of each engine on this machine."""
    command = [command_line.script("tarflow"), "doctor", "--json"]
    engines = json.loads(subprocess.run(command, capture_output=True, check=False).stdout)["engines"]
    return {engine: engines[engine] for engine in ENGINES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test on the engines that are ready; `test_ready` says of the others, once, what is missing."""
    if "target" in metafunc.fixturenames:
        ready = [engine for engine, verdict in found().items() if verdict["ready"]]
        on_gpu = [
            pytest.param(Target(engine, precision, stands_in=False), id=f"{engine}-{precision}", marks=pytest.mark.gpu)
            for engine in ready
            for precision in PRECISIONS
        ]
        metafunc.parametrize("target", [*on_gpu, *STAND_INS], scope="module")


@pytest.fixture
def verdicts() -> dict[str, Any]:
    return found()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stand-ins run, which are slow: 3 blocks of 16 patches, verified."""
    from tarflow_export import export_bundle
    from tarflow_sdk.testing import random_model, tiny_config

    config = tiny_config(patch_size=2, blocks=3, layers=1)
    return export_bundle(random_model(config), tmp_path_factory.mktemp("bundle") / "tiny.tarflow").path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The shipped digits in a precision."""
    from tarflow_export import convert_bundle

    with tfr.load() as flow:
        shipped = flow.bundle.path

    @functools.cache
    def get(precision: str) -> Path:
        if precision in {"float32", "tf32"}:
            return shipped
        path = tmp_path_factory.mktemp("digits") / f"{precision}.tarflow"
        convert_bundle(shipped, path, precision=precision)
        return path

    return get


@pytest.fixture(scope="module")
def bundle(target: Target, request: pytest.FixtureRequest) -> Path:
    """What the target runs."""
    if target.stands_in:
        return request.getfixturevalue("tiny_bundle")  # type: ignore[no-any-return]
    return request.getfixturevalue("digits")(target.precision)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def engine_dir(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where TensorRT's engines are kept, empty at first."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def open_flow(target: Target, bundle: Path, engine_dir: Path) -> Iterator[Callable[..., tfr.Flow]]:
    """Open the bundle on the target."""
    options: dict[str, Any] = {"engine": target.engine, "tf32": target.precision == "tf32", "engine_dir": engine_dir}
    with stand_in(target.engine) if target.stands_in else contextlib.nullcontext():
        yield lambda **more: tfr.load(bundle, **options, **more)


def stand_in(engine: str) -> contextlib.AbstractContextManager[None]:
    """Put the host's memory in place of the GPU, and under an engine what runs there."""
    return host_device.stand_in() if engine == "ort-cuda" else fake_tensorrt.stand_in(engine)


@pytest.fixture(scope="module")
def flow(open_flow: Callable[..., tfr.Flow]) -> Iterator[tfr.Flow]:
    """One flow for all tests of a target."""
    with open_flow() as opened:
        yield opened


@pytest.fixture(scope="module")
def cpu(target: Target, bundle: Path, digits: Callable[[str], Path]) -> Iterator[tfr.Flow]:
    """The same model on the default engine, in float32."""
    with tfr.load(bundle if target.stands_in else digits("float32")) as opened:
        yield opened


@pytest.fixture
def close(target: Target, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Compare pictures in -1 .. 1: within 1e-3 in float32, at least 40 dB in float16 and tf32; bfloat16 is reported.

    Less than 20 dB is another picture, in any precision.
    """

    def check(images: np.ndarray, expected: np.ndarray) -> None:
        difference = images.astype(np.float64) - expected
        assert np.isfinite(difference).all()
        square = float(np.square(difference).mean())
        psnr = float(10 * np.log10(4 / square)) if square else float("inf")
        largest = float(np.abs(difference).max())
        record_property("psnr_db", psnr)
        record_property("max_difference", largest)
        sys.stdout.write(f"{target.engine} {target.precision}: {psnr:.1f} dB, largest difference {largest:.1e}\n")
        if target.precision == "float32":
            assert largest <= 1e-3
        assert psnr >= (20.0 if target.precision == "bfloat16" else 40.0)

    return check
