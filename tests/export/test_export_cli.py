"""`tarflow-export`: the plan, the table, the exit codes, and one clear line for each kind of bad input."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import command_line
from rooms import open_bundle
from tarflow_sdk import save_checkpoint
from tarflow_sdk.testing import random_model, tiny_config

Run = Callable[..., command_line.Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `tarflow-export ...` in an empty folder that holds tiny.safetensors."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_model(tiny_config()), tmp_path / "tiny.safetensors")
    return functools.partial(command_line.run, capsys, "tarflow-export")


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_a_bundle_named_after_the_checkpoint(run: Run, tmp_path: Path) -> None:
    result = run("tiny.safetensors")
    assert result.code == 0, result.err
    assert result.out.strip() == str(tmp_path / "tiny.tarflow")
    assert listing(tmp_path) == ["tiny.safetensors", "tiny.tarflow"]
    assert open_bundle(tmp_path / "tiny.tarflow").manifest["verification"]["status"] == "passed"
    for words in ("Comparison with PyTorch", "portable/gradient", "ort-cpu/step_tempered", "guided sample", "floor"):
        assert words in result.err
    assert "MISSED" not in result.err


def test_reports_as_json(run: Run) -> None:
    result = run("tiny.safetensors", "-o", "named.tarflow", "--dtype", "float16", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["verification"]["status"] == "passed"
    assert report["digest"] == open_bundle("named.tarflow").digest
    assert set(report["seconds"]) == {"check", "load", "plan", "write", "reference", "verify"}


def test_dry_run_says_the_plan_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    result = run("tiny.safetensors", "--dry-run")
    assert result.code == 0, result.err
    for words in ("forward", "step", "gradient", "nodes", "parameters", "peak memory", "verification"):
        assert words in result.out
    facts = json.loads(run("tiny.safetensors", "--dry-run", "--json").out)
    assert listing(tmp_path) == ["tiny.safetensors"]
    run("tiny.safetensors", "--no-verify")
    sizes = {name: file["size"] for name, file in open_bundle("tiny.tarflow").manifest["files"].items()}
    assert facts["files"] == sizes
    assert facts["verification"]["end_to_end"]


def test_dry_run_makes_the_same_checks(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.tarflow").mkdir()
    assert run("tiny.safetensors", "--dry-run").code == 2
    assert run("tiny.safetensors", "--dry-run", "-o", "missing/x.tarflow").code == 2


def test_names_of_the_classes_from_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Ameise\nBiene\nKatze \n\n", "utf-8")
    result = run("tiny.safetensors", "--labels", "names.txt", "--no-verify")
    assert result.code == 0, result.err
    assert open_bundle("tiny.tarflow").class_names == ("Ameise", "Biene", "Katze")
    assert "not verified" in result.err


def test_a_missed_tolerance_exits_1_with_the_table(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(onnxruntime.InferenceSession):
        def run(self, names: list[str], feed: Any) -> Any:
            made = zip(names, super().run(names, feed), strict=True)
            return [array * 1.1 if name == "log_det" else array for name, array in made]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    result = run("tiny.safetensors")
    assert result.code == 1
    missed = [line for line in result.err.splitlines() if "MISSED" in line]
    assert any("portable/forward" in line and "log_det" in line for line in missed)
    assert not any("portable/gradient" in line for line in missed)
    assert re.search(r"error: \d+ of \d+ comparisons", result.err)
    assert "Traceback" not in result.err
    assert listing(tmp_path) == ["tiny.safetensors"]


def test_bad_input_is_one_clear_line(run: Run, tmp_path: Path) -> None:
    """`tarflow export` is tested with every kind of it."""
    for arguments, words in ((["tiny.safetensors", "--frobnicate"], "--frobnicate"), ([], "checkpoint")):
        result = run(*arguments)
        assert (result.code, result.out) == (2, "")
        first, hint = result.err.strip().splitlines()
        assert first.startswith("error: ")
        assert words in first.lower()
        assert hint.startswith("hint: tarflow-export --help")
    assert listing(tmp_path) == ["tiny.safetensors"]


def test_help_answers_without_pytorch() -> None:
    assert not {"torch", "onnx", "onnx_ir", "onnxruntime"} & command_line.loaded_by("tarflow-export", "--help")


def test_public_names_are_exact() -> None:
    import tarflow_export

    assert sorted(tarflow_export.__all__) == ["ExportError", "ExportReport", "convert_bundle", "export_bundle"]
    public = {name for name in dir(tarflow_export) if not name.startswith("_")}
    assert public == set(tarflow_export.__all__)
