"""The project as a stranger installs it: the wheel, a clean environment, the direction of imports."""

import ast
import re
import subprocess
import sys
import sysconfig
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
sys.path.insert(0, str(ROOT / "runtimes" / "native"))
from native_build import compiler, library_name  # noqa: E402

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


ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"


def test_the_exporter_needs_nothing_private_of_the_core() -> None:
    for path in PACKAGES["tarflow_export"].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not name.startswith("tarflow_sdk._"), f"{path}: imports {name}"


ROOMS = ("cli", "measure", "model", "engines", "decode", "doctor", "bundle", "io", "errors")
"""The folders of the runtime from top to bottom, as in ARCHITECTURE: each may import only the ones below it."""


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
    assert tuple(re.findall(r"^\| `(\w+)/?` \|", ARCHITECTURE.read_text("utf-8"), re.MULTILINE)) == ROOMS
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


PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True, timeout=600)
    (path,) = folder.glob("tarflow_sdk-*.whl")
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    built = {"__pycache__", ".so", ".dylib", ".dll"}  # on this machine, for this machine
    sources = {
        (package / path.relative_to(folder)).as_posix()
        for package, folder in ((Path(name), folder) for name, folder in PACKAGES.items())
        for path in folder.rglob("*")
        if path.is_file() and not built & {*path.parts, path.suffix}
    }
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    library = f"tarflow_runtimes/engines/native/{library_name()}"
    assert {name for name in names if not name.startswith(info)} == sources | ({library} if compiler() else set())
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.stem.endswith(f"py3-none-{platform}" if compiler() else "py3-none-any")
    shipped = "tarflow_runtimes/models/mnist.tarflow"
    assert {f"{shipped}/manifest.json", f"{shipped}/reference.npz", f"{shipped}/graphs/ort-cpu/step.onnx"} <= names
    assert {f"{info}/entry_points.txt", f"{info}/licenses/LICENSE"} <= names
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert {line.split()[1].split(">")[0] for line in needed} == {"numpy", "typer", "rich", "pillow"}


WITHOUT = """
import sys
for name in ("google", "onnx", "onnx_ir", "torch"):
    sys.modules[name] = None
import tarflow_runtimes as tfr
with tfr.load() as flow:
    assert flow.sample(2, labels=[3, 7], seed=0, guidance=1.0).images.shape == (2, 1, 28, 28)
    print(flow.engine_name)
"""
"""ONNX Runtime brings protobuf along, but nothing here needs it."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """The wheel with the `ort` extra samples where neither torch nor onnx is installed."""
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    subprocess.run([binaries / "python", *PIP, "install", f"{wheel}[ort]"], check=True, timeout=600)
    for absent in ("torch", "onnx", "onnx_ir", "safetensors"):
        done = subprocess.run([binaries / "python", "-c", f"import {absent}"], capture_output=True, check=False)
        assert done.returncode != 0, absent
    drew = subprocess.run(
        [binaries / "python", "-c", WITHOUT], check=True, cwd=tmp_path, timeout=120, capture_output=True, text=True
    )
    assert drew.stdout.strip() == ("native" if compiler() else "ort-cpu")
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
