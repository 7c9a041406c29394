"""What libtarflow is built with. Where a machine lacks it, its tests skip and say what; in CI they fail."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

FETCH = Path(__file__).parents[2] / "runtimes" / "cpp" / "cmake" / "fetch_onnxruntime_headers.sh"


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{what}; make cpp-deps")
    pytest.skip(f"{what}; make cpp-deps")


@pytest.fixture(scope="session")
def cpp_headers() -> Path:
    """ONNX Runtime's headers, and the certainty that compilers, CMake and the other headers are there."""
    for tool in ("cmake", "ctest", "c++", "cc", "pkg-config"):
        if shutil.which(tool) is None:
            _missing(f"{tool} is not installed")
    for header in ("nlohmann/json.hpp", "png.h"):
        if not any((Path(folder) / header).is_file() for folder in ("/usr/include", "/usr/local/include")):
            _missing(f"{header} is not installed")
    fetched = subprocess.run([FETCH], capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        _missing(fetched.stderr.strip())
    return Path(fetched.stdout.strip())


@pytest.fixture(scope="session")
def cpp_library() -> Path:
    """The shared library inside the installed onnxruntime package."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        _missing("this onnxruntime package has no separate libonnxruntime.so")
    return found[0]
