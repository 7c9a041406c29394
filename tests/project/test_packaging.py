"""The project as a stranger installs it: the wheel, a clean environment, the direction of imports."""

import ast
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "tarflow_sdk": ROOT / "tarflow_sdk",
    "tarflow_export": ROOT / "export" / "tarflow_export",
    "tarflow_runtimes": ROOT / "runtimes" / "tarflow_runtimes",
}
FORBIDDEN = {
    "tarflow_sdk": {"tarflow_export", "tarflow_runtimes", "onnx", "onnx_ir", "onnxruntime"},
    "tarflow_export": set(),
    "tarflow_runtimes": {
        "tarflow_sdk",
        "tarflow_export",
        "torch",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "safetensors",
        "google",
    },
}


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


ROOMS = ("cli", "measure", "model", "engines", "decode", "doctor", "bundle", "io", "errors")
"""The rooms of the runtime from top to bottom: no import runs back up."""


def modules_of(node: ast.AST) -> list[str]:
    """Every module of the runtime that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom) or not node.module:
        return []
    if node.module == "tarflow_runtimes":
        return [f"tarflow_runtimes.{alias.name}" for alias in node.names]
    return [node.module]


def test_no_import_runs_back_up() -> None:
    """Also inside functions; what is only for type checkers is no exception."""
    root = PACKAGES["tarflow_runtimes"]
    found = {path.relative_to(root).parts[0].removesuffix(".py") for path in root.rglob("*.py")} - {"__init__"}
    assert found == set(ROOMS)
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            for module in modules_of(node):
                names = module.split(".")
                if room in ROOMS and names[0] == "tarflow_runtimes" and names[1:] and names[1] in ROOMS:
                    assert ROOMS.index(names[1]) >= ROOMS.index(room), f"{path}: imports {module}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_the_runtime_needs_onnxruntime_and_nothing_else_of_onnx() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [requirement.split(">=")[0] for requirement in extras["ort"]] == ["onnxruntime"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_clean_environment(tmp_path: Path) -> None:
    """The wheel with the `ort` extra samples where neither torch nor onnx is installed."""
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=600
    )
    (wheel,) = tmp_path.glob("tarflow_sdk-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    assert "tarflow_runtimes/models/mnist.tarflow/manifest.json" in names
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    subprocess.run([binaries / "python", *pip, "install", f"{wheel}[ort]"], check=True, timeout=600)
    absent = subprocess.run([binaries / "python", "-c", "import torch, onnx"], capture_output=True, check=False)
    assert absent.returncode != 0
    subprocess.run([binaries / "python", "-c", "import tarflow_runtimes"], check=True, cwd=tmp_path)
    subprocess.run(
        [binaries / "tarflow-infer", "-n", "2", "--labels", "3,7", "-o", "two.png"],
        check=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert (tmp_path / "two.png").stat().st_size > 100
    refused = subprocess.run([binaries / "tarflow-export", "model.pth"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "tarflow-sdk[export]" in refused.stderr
    assert "Traceback" not in refused.stderr
