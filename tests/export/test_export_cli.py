"""`tarflow-export`: the plan, the table, the exit codes, and one clear line for each kind of bad input."""

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tarflow_runtimes.bundle.reader import open_bundle
from tarflow_sdk import save_checkpoint
from tarflow_sdk.testing import random_model, tiny_config


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `tarflow-export ...` in an empty folder that holds tiny.safetensors."""
    from tarflow_export._cli import main

    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_model(tiny_config()), tmp_path / "tiny.safetensors")

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["tarflow-export", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        written = capsys.readouterr()
        return Result(int(ended.value.code or 0), written.out, written.err)

    return call


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
    import tarflow_runtimes.bundle.tolerances as parity

    strict = parity.Tolerance(measure="max_abs", limit=1e-12, reason="cannot be met")
    monkeypatch.setattr(parity, "TOLERANCES", {("*", "float32"): {**parity._EXACT, "gradient": strict}})
    result = run("tiny.safetensors")
    assert result.code == 1
    assert "MISSED" in result.err
    assert "error: 4 of" in result.err
    assert listing(tmp_path) == ["tiny.safetensors"]


def test_an_interrupt_exits_130_and_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tarflow_export._export

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tarflow_export._export, "compute_reference", interrupted)
    result = run("tiny.safetensors")
    assert result.code == 130
    assert "Traceback" not in result.err
    assert listing(tmp_path) == ["tiny.safetensors"]


class Code:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return print, ("executed",)


@pytest.fixture
def bad_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_checkpoint(random_model(tiny_config()), whole)
    (tmp_path / "truncated.safetensors").write_bytes(whole.read_bytes()[:-1000])
    whole.unlink()
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with (tmp_path / "code.pth").open("wb") as file:
        pickle.dump({"blocks.0.proj_in.weight": Code()}, file)
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "gap.txt").write_text("a\n\nc\n")
    (tmp_path / "bundle.tarflow").mkdir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.safetensors"], "no such file"),
        (["truncated.safetensors"], "truncated"),
        (["foreign.pth"], "not a TarFlow checkpoint"),
        (["code.pth"], "code"),
        (["tiny.safetensors", "--patch-size", "3"], "patch_size"),
        (["tiny.safetensors", "--image-channels", "3"], "image_channels"),
        (["tiny.safetensors", "--head-dim", "48"], "head_dim"),
        (["tiny.safetensors", "--noise-std", "0.5"], "noise_std"),
        (["tiny.safetensors", "--labels", "two.txt"], "2 label names for 3 classes"),
        (["tiny.safetensors", "--labels", "gap.txt"], "empty line"),
        (["tiny.safetensors", "--labels", "none.txt"], "none.txt"),
        (["tiny.safetensors", "--dtype", "float8"], "float8"),
        (["tiny.safetensors", "-o", "bundle.tarflow"], "exists already"),
        (["tiny.safetensors", "-o", "bundle.tarflow", "--overwrite"], "not a bundle"),
        (["tiny.safetensors", "-o", "missing/x.tarflow"], "does not exist"),
        (["tiny.safetensors", "--frobnicate"], "--frobnicate"),
        ([], "checkpoint"),
    ],
)
@pytest.mark.usefixtures("bad_files")
def test_bad_input_is_one_clear_line(run: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    before = listing(tmp_path)
    result = run(*arguments)
    assert result.code == 2
    first, *rest = result.err.strip().splitlines()
    assert first.startswith("error: ")
    assert words.lower() in first.lower()
    assert all(line.startswith("hint: ") for line in rest)
    assert len(rest) <= 1
    assert result.out == ""
    assert listing(tmp_path) == before


def test_help_answers_without_pytorch() -> None:
    script = (
        "import sys; sys.argv = ['tarflow-export', '--help']\n"
        "from tarflow_export._cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)\n"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert time.perf_counter() - start < 5.0  # half a second on an idle machine


def test_public_names_are_exact() -> None:
    import tarflow_export

    assert sorted(tarflow_export.__all__) == ["ExportError", "ExportReport", "convert_bundle", "export_bundle"]
    public = {name for name in dir(tarflow_export) if not name.startswith("_")}
    assert public == set(tarflow_export.__all__)
