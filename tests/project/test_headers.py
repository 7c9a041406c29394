"""Every C and C++ header begins with an example that compiles."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

RUNTIMES = Path(__file__).parents[2] / "runtimes"
HEADERS = sorted([*RUNTIMES.glob("*/include/*.h"), *RUNTIMES.glob("*/include/*/*.h*")])
FOLDERS = [f"-I{folder}" for folder in sorted(RUNTIMES.glob("*/include"))]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only"]


def test_the_headers_are_found() -> None:
    assert {header.name for header in HEADERS} == {"tarflow.h", "tarflow.hpp", "tarflow_native.h"}


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.name)
def test_the_example_compiles(header: Path) -> None:
    compiler, language, standard = ("c++", "c++", "-std=c++17") if header.suffix == ".hpp" else ("cc", "c", "-std=c11")
    block = re.search(r"^(?:(?: \*|//)(?:   .*)?\n)+", header.read_text("utf-8"), re.MULTILINE)
    assert block, "the first comment has no indented lines"
    example = re.sub(r"^(?: \*|//)(?:   )?", "", block[0], flags=re.MULTILINE).strip()
    assert 12 <= len(example.splitlines()) <= 20, "about 15 lines, indented by three spaces"
    assert f"{header.name}>" in example, "a complete program includes its header"
    if shutil.which(compiler) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{compiler} is not installed")
    command = [compiler, "-x", language, standard, *WARNINGS, *FOLDERS, "-"]
    done = subprocess.run(command, input=f"{example}\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
