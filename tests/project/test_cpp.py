"""libtarflow: built in build/cpp, its quick tests in `make test`, and everything (`-m cpp`) in `make test-cpp`."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import tarflow_runtimes as tfr
from tarflow_export import export_bundle
from tarflow_sdk.testing import random_model

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runtimes" / "cpp"
BUNDLE = ROOT / "runtimes" / "tarflow_runtimes" / "models" / "mnist.tarflow"
SHIPPED = ROOT / "tests" / "goldens" / "shipped.safetensors"

pytestmark = pytest.mark.slow


def _module(path: Path) -> ModuleType:
    """A module by its path: scripts and the tests' own matrix of models are in no package."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_for_cpp", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


golden = _module(SOURCE / "tests" / "golden.py")


def _run(*command: str | Path, **environment: str | Path) -> str:
    """The output of a command that must succeed."""
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:]
    return done.stdout


@pytest.fixture(scope="session")
def build(cpp_headers: Path, cpp_library: Path) -> Callable[..., Path]:
    """`build(name, *settings)`: the folder of that name under build/, configured and up to date."""

    def make(name: str, *settings: str) -> Path:
        folder = ROOT / "build" / name
        _run(
            "cmake",
            "-S",
            SOURCE,
            "-B",
            folder,
            f"-DONNXRUNTIME_INCLUDE_DIR={cpp_headers}",
            f"-DONNXRUNTIME_LIBRARY={cpp_library}",
            *settings,
        )
        _run("cmake", "--build", folder, "--parallel", "2")
        return folder

    return make


def _ctest(folder: Path, label: str) -> str:
    return _run("ctest", "--test-dir", folder, "-L", label, "--output-on-failure", "--no-tests=error")


def test_python_computes_the_committed_golden_file() -> None:
    cases, arrays = golden.read(SHIPPED)
    with tfr.load(BUNDLE) as flow:
        assert cases == [
            {**case, "arrays": committed["arrays"]}
            for case, committed in zip(golden.cases(flow.config, small=True), cases, strict=True)
        ]
        for case in cases:
            images = arrays.get(case["arguments"].get("images", ""))
            for name, array in golden.compute(flow, case, images).items():
                limit = case["arrays"][name]["limit"]
                assert golden.difference(name, array, arrays[name]) <= limit, name
                if case["call"] == "noise":
                    np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.timeout(600)
def test_quick(build: Callable[..., Path]) -> None:
    listed = _ctest(build("cpp"), "quick")
    for name in ("unit_sampling", "parity_shipped", "consumer_installed", "symbols"):
        assert name in listed


@pytest.mark.cpp
@pytest.mark.timeout(900)
def test_full(build: Callable[..., Path]) -> None:
    """The rest of ctest."""
    assert "consumer_subproject" in _ctest(build("cpp"), "full")


MATRIX = _module(ROOT / "tests" / "runtimes" / "conftest.py").CONFIGS


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.timeout(600)
def test_matrix(name: str, dtype: str, build: Callable[..., Path], cpp_library: Path, tmp_path: Path) -> None:
    """Random models: every guidance, batches of 1, 3 and 17, bit for bit what Python computes here."""
    bundle, expected = tmp_path / f"{name}.tarflow", tmp_path / "golden.safetensors"
    export_bundle(random_model(MATRIX[name], seed=1), bundle, dtype=dtype, verify=False)
    golden.write(bundle, expected, small=False)
    program = build("cpp") / "tests" / "tarflow_parity"
    assert "bit-identical" in _run(program, bundle, expected, TARFLOW_ORT_LIBRARY=cpp_library)
