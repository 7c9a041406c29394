"""Every `sh` block of the examples' READMEs runs, in order, in a copy of the examples."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(folder.name for folder in EXAMPLES.iterdir() if (folder / "README.md").is_file())
COMPILED = ("05_embed_cpp", "06_embed_c")


def test_the_index_lists_every_example() -> None:
    listed = re.findall(r"^\| \[(\w+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert listed == FOLDERS


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.cpp] if name in COMPILED else []) for name in FOLDERS]
)
def test_commands(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name in COMPILED:
        request.getfixturevalue("cpp_headers")
    blocks = re.findall(r"^```sh\n(.*?)^```", (EXAMPLES / name / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks, f"{name} shows no command"
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("build"))
    (tmp_path / "runtimes").symlink_to(ROOT / "runtimes")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", "\n".join(blocks)],
        cwd=tmp_path / "examples" / name,
        env=os.environ | {"PATH": path, "CMAKE_BUILD_TYPE": "Debug"},  # which takes half as long to compile
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
