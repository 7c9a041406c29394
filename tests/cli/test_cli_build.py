"""`tarflow build` and `tarflow-export --engine` with TensorRT for RTX, which builds for real without a GPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fake_tensorrt
import tarflow_runtimes as tfr
from fake_cuda import FakeCuda, installed

QUICK = ("--engine", "trt-rtx", "--batch", "2", "--window", "1", "--guidance", "0", "--target", "sm_89")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where engines are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tarflow" / "engines"


def test_a_second_build_finds_everything(tarflow: Callable, class_bundle: Path, folder: Path) -> None:
    first, second = (tarflow("build", class_bundle, *QUICK, "--json") for _ in range(2))
    assert (first.code, second.code) == (0, 0), first.err
    built, found = json.loads(first.out), json.loads(second.out)
    assert [one["built"] for one in built["engines"]] == [True] * 6
    assert [one["built"] for one in found["engines"]] == [False] * 6
    assert [one["file"] for one in built["engines"]] == [one["file"] for one in found["engines"]]
    kinds = [(one["block"], one["graph"]) for one in built["engines"]]
    assert kinds == [(block, kind) for block in (0, 1) for kind in ("step", "forward", "gradient")]
    assert (built["precision"], built["targets"], built["folder"]) == ("float32", ["sm_89"], str(folder))
    assert "block 0 step: built in" in first.err
    assert "(never built)" in first.err
    assert "block 0 step: was there" in second.err
    assert second.err.splitlines()[-1].startswith(f"6 engines for sm_89 in {folder}: 0 built, 6 were there")
    sidecar = json.loads(Path(built["engines"][0]["file"]).with_suffix(".json").read_text())
    assert sidecar["made"]["profiles"] == [{"least": 1, "most": 2, "branches": 1, "patches": 1}]
    assert sidecar["built"]["cache_updates"] == 5
    assert sidecar["built"]["gpu"] is None
    assert sidecar["made"]["flags"] == ["STRICT_NANS", "REQUIRE_USER_ALLOCATION"]
    again = tarflow("build", class_bundle, *QUICK, "--rebuild")
    assert "6 built, 0 were there" in again.err


def test_a_gpu_here_is_the_target(tarflow: Callable, class_bundle: Path) -> None:
    with installed(FakeCuda(capability=(8, 6))):
        facts = json.loads(tarflow("build", class_bundle, *QUICK[:-2], "--tf32", "--json").out)
    assert (facts["targets"], facts["precision"]) == (["sm_86"], "tf32")
    with installed(FakeCuda(capability=(9, 0))):
        result = tarflow("build", class_bundle, *QUICK[:-2])
    assert result.code == 2
    assert "cannot build for sm_90" in result.err
    assert "ort-cuda or trt" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "ort-cpu"), "--engine must be trt or trt-rtx, got 'ort-cpu'"),
        ((*QUICK, "--batch", "0"), "--batch 0: '0' is not a whole number from 1 on"),
        ((*QUICK, "--window", "x"), "--window x: 'x' is not a whole number from 1 on"),
        ((*QUICK, "--target", "sm_90"), "cannot build for sm_90"),
        ((*QUICK, "--workspace", "much"), "--workspace much: 'much' is not a size such as 20G"),
        ((*QUICK, "--max-size", "1Q"), "--max-size 1Q"),
        ((*QUICK, "--engine-dir", "/dev/null"), "/dev/null: cannot keep engines there"),
    ],
)
def test_bad_input(refused: Callable, class_bundle: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("build", class_bundle, *arguments).err


def test_what_a_bundle_cannot_be_computed_in(refused: Callable, class_bundle: Path, tmp_path: Path) -> None:
    from tarflow_export import convert_bundle

    paths = {precision: tmp_path / f"{precision}.tarflow" for precision in ("float16", "int8")}
    for precision, path in paths.items():
        convert_bundle(class_bundle, path, precision=precision, verify=False)
    err = refused("build", paths["float16"], *QUICK, "--tf32").err
    assert "tf32 is of float32 bundles, this one is of float16" in err
    err = refused("build", paths["int8"], *QUICK).err
    assert "is of int8 and has no graphs for trt" in err
    assert "tarflow convert" in err


def test_tensorrt_builds_on_its_gpu(refused: Callable, class_bundle: Path) -> None:
    options = ("build", class_bundle, "--engine", "trt")
    with fake_tensorrt.package("trt", None):
        result = refused(*options)
        assert "engine trt needs TensorRT, which is not installed" in result.err
        assert 'hint: pip install "tarflow-sdk[trt]"' in result.err
    with fake_tensorrt.package("trt", fake_tensorrt.module("trt")):
        with installed(FakeCuda(driver=0)):
            assert "no NVIDIA driver is loaded" in refused(*options).err
        with installed(FakeCuda(capability=(9, 0))):
            result = refused(*options, "--target", "sm_89")
        assert "TensorRT builds on the GPU that runs the engine, and this one is sm_90" in result.err
        assert "trt-rtx, which needs no GPU" in result.err


LACKING = {
    "library": ("engine {} needs TensorRT", 'pip install "tarflow-sdk[{}]"'),
    "driver": ("no NVIDIA driver is loaded on this machine", "install NVIDIA's driver"),
    "GPU": ("the NVIDIA driver finds no GPU", "CUDA_VISIBLE_DEVICES"),
}


@pytest.mark.parametrize("engine", ["trt", "trt-rtx"])
@pytest.mark.parametrize("lacking", LACKING)
def test_what_infer_lacks_is_one_line_and_a_remedy(refused: Callable, engine: str, lacking: str) -> None:
    found = None if lacking == "library" else fake_tensorrt.module(engine)
    cuda = FakeCuda(driver=0 if lacking == "driver" else 13000, devices=0)
    with fake_tensorrt.package(engine, found), installed(cuda):
        err = refused("infer", "--engine", engine, "-n", "1").err
    for expected in LACKING[lacking]:
        assert expected.format(engine) in err


def test_export_builds_what_it_has_exported_with_the_defaults(tarflow: Callable, folder: Path, tmp_path: Path) -> None:
    from tarflow_sdk import save_checkpoint
    from tarflow_sdk.testing import random_model, tiny_config

    checkpoint = tmp_path / "tiny.safetensors"
    save_checkpoint(random_model(tiny_config(blocks=1, layers=1, classes=0)), checkpoint)
    result = tarflow("export", checkpoint, "-o", "tiny.tarflow", "--no-verify", "--engine", "trt-rtx", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)["build"]
    assert [one["graph"] for one in facts["engines"]] == ["step", "window", "forward", "gradient"]
    assert {Path(one["file"]).parent for one in facts["engines"]} == {folder}
    assert facts["precision"] == "float32"
    assert facts["targets"] == ["sm_80", "sm_86", "sm_89", "sm_120"]
    for engine in facts["engines"]:
        assert [(one["least"], one["most"]) for one in engine["profiles"]] == [(1, 1), (2, 8), (9, 64)]
        assert {one["patches"] for one in engine["profiles"]} == {3 if engine["graph"] == "window" else 1}
        assert {one["branches"] for one in engine["profiles"]} == {1}
    for options, message in (
        (("--engine", "ort-cpu"), "--engine must be trt or trt-rtx"),
        (("--engine", "trt-rtx", "--engine-dir", "/dev/null"), "/dev/null: cannot keep engines there"),
        (("--engine-dir", "engines"), "--engine-dir needs --engine"),
    ):
        result = tarflow("export", checkpoint, "-o", "other.tarflow", *options)
        assert (result.code, Path("other.tarflow").exists()) == (2, False)
        assert message in result.err


def start(bundle: Path, *options: str) -> subprocess.Popen[str]:
    code = "from tarflow_runtimes.cli.main import main; main()"
    command = [sys.executable, "-c", code, "build", str(bundle), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_two_processes_that_build_the_same_build_it_once(class_bundle: Path, folder: Path) -> None:
    both = [start(class_bundle, *QUICK, "--json") for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    engines = [json.loads(out)["engines"] for out, _ in results]
    for one, other in zip(*engines, strict=True):
        assert one["file"] == other["file"]
        assert one["built"] + other["built"] == 1
    assert len(list(folder.iterdir())) == 12


@pytest.fixture
def building(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a build that takes ten seconds."""
    process = start(tfr.load().bundle.path, "--engine", "trt-rtx")
    try:
        until(lambda: list(folder.glob(".*.lock")))
        time.sleep(1.0)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_is_killed_leaves_nothing_that_loads(
    tarflow: Callable, building: subprocess.Popen[str], folder: Path
) -> None:
    (worker,) = Path(f"/proc/{building.pid}/task/{building.pid}/children").read_text().split()
    building.send_signal(signal.SIGKILL)
    building.communicate()
    until(lambda: not Path("/proc", worker).exists())
    (left,) = folder.iterdir()
    assert left.suffix == ".lock"
    assert json.loads(tarflow("cache", "list", "--json").out)["engines"] == []
    left.touch()
    assert json.loads(tarflow("cache", "prune", "--json").out)["leftovers"] == [left.name], "nobody holds it"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_build_within_two_seconds(
    building: subprocess.Popen[str], folder: Path, number: signal.Signals
) -> None:
    began = time.monotonic()
    building.send_signal(number)
    _, err = building.communicate(timeout=60)
    assert time.monotonic() - began < 2.0
    assert building.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted; the 0 engines that were finished are kept"
    assert list(folder.iterdir()) == []
