"""`tarflow convert`: what it leaves behind, what it refuses, and that it needs no PyTorch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tarflow_runtimes as tfr
from rooms import open_bundle


@pytest.mark.parametrize("option", [("--weights", "int8"), ("--dtype", "float16")])
def test_a_bundle_of_another_precision(tarflow: Callable, class_bundle: Path, option: tuple[str, str]) -> None:
    result = tarflow("convert", class_bundle, "-o", "x.tarflow", *option)
    assert result.code == 0, result.err
    assert Path(result.out.strip()) == Path.cwd() / "x.tarflow"
    assert [path.name for path in Path.cwd().iterdir()] == ["x.tarflow"]
    assert "Comparison with PyTorch" in result.err
    assert "ort-cpu/step_guided" in result.err
    bundle = open_bundle("x.tarflow")
    assert bundle.precision == option[1]
    assert bundle.manifest["verification"]["status"] == "passed"
    assert bundle.manifest["converted"] == {"digest": open_bundle(class_bundle).digest, "precision": "float32"}
    assert f"from float32, digest {open_bundle(class_bundle).digest}" in tarflow("inspect", "x.tarflow").out
    assert f"comparisons passed on ort-cpu, {option[1]}" in tarflow("verify", "x.tarflow", "--engine", "ort-cpu").err
    with tfr.load(class_bundle) as one, tfr.load("x.tarflow") as other:
        difference = np.abs(other.sample(2, seed=0).images - one.sample(2, seed=0).images).max()
    assert 0 < difference < 0.1


def test_bfloat16_is_not_verified_here(tarflow: Callable, class_bundle: Path) -> None:
    result = tarflow("convert", class_bundle, "-o", "x.tarflow", "--dtype", "bfloat16", "--json")
    assert json.loads(result.out)["verification"]["status"] == "unverified"
    again = tarflow("convert", class_bundle, "-o", "x.tarflow", "--dtype", "bfloat16", "--overwrite")
    assert again.err.startswith("not verified: no processor computes in bfloat16; tarflow verify does it on a GPU")
    assert "unverified" in tarflow("inspect", "x.tarflow").out
    assert "no graphs for ort-cpu" in tarflow("verify", "x.tarflow").err


def test_without_verification(tarflow: Callable, colour_bundle: Path, refused: Callable) -> None:
    """The source holds no reference, so that there is nothing to verify with."""
    options = ("convert", colour_bundle, "-o", "x.tarflow", "--weights", "int8")
    assert "--no-verify" in refused(*options).err
    result = tarflow(*options, "--no-verify")
    assert result.code == 0
    assert result.err.startswith("not verified: --no-verify\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --dtype and --weights"),
        (("--dtype", "float16", "--weights", "int8"), "give one of --dtype and --weights"),
        (("--dtype", "float32"), "--dtype must be float16 or bfloat16, got 'float32'"),
        (("--weights", "int4"), "--weights must be int8, got 'int4'"),
        (("-o", "here.tarflow", "--weights", "int8"), "exists already"),
        (("-o", "no/x.tarflow", "--weights", "int8"), "does not exist"),
    ],
)
def test_bad_input(refused: Callable, class_bundle: Path, arguments: tuple[str, ...], message: str) -> None:
    shutil.copytree(class_bundle, "here.tarflow")
    assert message in refused("convert", class_bundle, "-o", "x.tarflow", *arguments).err


def test_other_sources(refused: Callable, tarflow: Callable, class_bundle: Path) -> None:
    options = ("--dtype", "float16", "--no-verify")
    assert "no such directory" in refused("convert", "none.tarflow", "-o", "x.tarflow", *options).err
    assert tarflow("convert", class_bundle, "-o", "half.tarflow", *options).code == 0
    assert "half.tarflow is of float16" in refused("convert", "half.tarflow", "-o", "x.tarflow", *options).err
    assert (
        "is the bundle to convert"
        in refused("convert", "half.tarflow", "-o", "half.tarflow", "--overwrite", *options).err
    )


def test_it_needs_no_pytorch(class_bundle: Path, tmp_path: Path) -> None:
    code = """
import sys
for name in ("torch", "safetensors", "onnxscript", "scipy"):
    sys.modules[name] = None
from tarflow_runtimes.cli.main import dispatch
dispatch(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "convert", class_bundle, "-o", tmp_path / "x.tarflow", "--weights", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert open_bundle(tmp_path / "x.tarflow").precision == "int8"
