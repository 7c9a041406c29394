"""The commands in this process, on tiny bundles."""

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import command_line
from command_line import Result

ANIMALS = ("ant", "bee", "cat")


Tarflow = Callable[..., Result]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def tarflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tarflow:
    """Run `tarflow ...` in the empty working folder tmp_path / "work"."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    return functools.partial(command_line.run, capsys, "tarflow")


@pytest.fixture
def refused(tarflow: Tarflow) -> Callable[..., Result]:
    """Run a command that must fail with an error and a hint, a line each, and leave the working folder as it was."""

    def run(*arguments: object, code: int = 2, hinted: bool = True) -> Result:
        before = contents(Path.cwd())
        result = tarflow(*arguments)
        assert contents(Path.cwd()) == before
        assert result.code == code, result
        assert result.out == ""
        error, *hint = result.err.splitlines()
        assert error.startswith("error: "), result.err
        assert len(hint) == 1 or not hinted, result.err
        assert all(line.startswith("hint: ") for line in hint), result.err
        return result

    return run


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the digest of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def class_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8x8x1 images of ants, bees and cats; verified when it was written."""
    return bundle_of(tmp_path_factory, classes=3, labels=ANIMALS)


@pytest.fixture(scope="session")
def colour_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8x8x3 images without classes; not verified."""
    return bundle_of(tmp_path_factory, verify=False, image_channels=3, classes=0)


@pytest.fixture(scope="session")
def deep_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8x8x2 images without classes or a known sigma, of which no PNG file can be made; not verified."""
    return bundle_of(tmp_path_factory, verify=False, image_channels=2, classes=0, noise_std=None)


@pytest.fixture(scope="session")
def token_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens [5, 3] of ants, bees and cats; verified when it was written."""
    return bundle_of(tmp_path_factory, data="tokens", classes=3, labels=ANIMALS)


def bundle_of(factory: pytest.TempPathFactory, *, data: str = "image", verify: bool = True, **shape: Any) -> Path:
    from tarflow_export import export_bundle  # loads PyTorch, which most of these tests do not need
    from tarflow_sdk.testing import random_model, tiny_config, tiny_token_config

    path = factory.mktemp("bundles") / "tiny.tarflow"
    config = tiny_config(**shape) if data == "image" else tiny_token_config(**shape)
    export_bundle(random_model(config), path, verify=verify)
    return path


@pytest.fixture
def own_bundle(class_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the class bundle to damage."""
    return Path(shutil.copytree(class_bundle, tmp_path / "own.tarflow"))
