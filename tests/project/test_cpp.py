"""libtarflow: configured, built, its quick ctest part run against this environment's ONNX Runtime, and installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runtimes" / "cpp"
BUNDLE = ROOT / "runtimes" / "tarflow_runtimes" / "models" / "mnist.tarflow"


def _library() -> Path:
    """The shared library inside the installed onnxruntime package."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("this onnxruntime package has no separate libonnxruntime.so")
    return found[0]


def _settings() -> list[str]:
    """CMake settings; skips where a tool or a header is missing."""
    for tool in ("cmake", "ctest", "c++", "cc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    settings = []
    for variable, header, folders in (
        ("ONNXRUNTIME_INCLUDE_DIR", "onnxruntime_cxx_api.h", ("/usr/include/onnxruntime",)),
        ("NLOHMANN_JSON_INCLUDE_DIR", "nlohmann/json.hpp", ("/usr/include", "/usr/local/include")),
    ):
        given = os.environ.get(variable)
        found = [folder for folder in ((given,) if given else folders) if (Path(folder) / header).is_file()]
        if not found:
            pytest.skip(f"{header} is not found; {variable} names its folder")
        settings.append(f"-D{variable}={found[0]}")
    has_png = any(Path(folder).is_file() for folder in ("/usr/include/png.h", "/usr/local/include/png.h"))
    return [*settings, f"-DTARFLOW_BUILD_TOOL={'ON' if has_png else 'OFF'}"]


def _run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


CONSUMER = """
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES C CXX)
find_package(tarflow 0.1 CONFIG REQUIRED)
add_executable(consumer embed.c)
target_link_libraries(consumer PRIVATE tarflow::tarflow)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_build_and_quick_tests(tmp_path: Path) -> None:
    settings, library = _settings(), _library()
    golden, build, prefix = tmp_path / "golden.bin", tmp_path / "build", tmp_path / "prefix"
    _run(sys.executable, SOURCE / "tests" / "golden.py", BUNDLE, golden)
    _run(
        "cmake",
        "-S",
        SOURCE,
        "-B",
        build,
        f"-DCMAKE_INSTALL_PREFIX={prefix}",
        f"-DTARFLOW_TEST_GOLDEN={golden}",
        *settings,
    )
    _run("cmake", "--build", build, "--parallel", "2")
    listed = _run("ctest", "--test-dir", build, "-L", "quick", "--output-on-failure", TARFLOW_ORT_LIBRARY=str(library))
    assert "parity" in listed
    _run("cmake", "--install", build)
    consumer = tmp_path / "consumer"
    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(CONSUMER)
    shutil.copy(SOURCE / "examples" / "embed.c", consumer)
    _run("cmake", "-S", consumer, "-B", consumer / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    _run("cmake", "--build", consumer / "build")
    assert "2 images of 28 x 28" in _run(consumer / "build" / "consumer", BUNDLE, TARFLOW_ORT_LIBRARY=str(library))
