"""`tarflow doctor`: what it prints, its JSON, its exit code."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_machine import Driver, Gpu, Library, Module, Provider, finding, here

GPU = Gpu(name="NVIDIA H200", capability=(9, 0), memory=150_000_000_000, free=149_000_000_000)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the doctor find this machine with other facts."""
    return finding(monkeypatch)


def test_this_machine(tarflow: Callable) -> None:
    result = tarflow("doctor")
    assert result.code == 0
    lines = [line.split(maxsplit=1) for line in result.out.splitlines() if line and not line.startswith(" ")]
    words = {line[0]: line[1] for line in lines}
    assert words["ort-cpu"] == "ready"
    assert {"system", "driver", "onnxruntime", "tensorrt", "tensorrt_rtx", "auto"} <= set(words)
    report = json.loads(tarflow("doctor", "--json").out)
    assert list(report["engines"]) == ["native", "ort-cpu", "ort-cuda", "trt", "trt-rtx"]
    assert report["engines"]["ort-cpu"] == {
        "ready": True,
        "problem": None,
        "remedy": None,
        "experimental": False,
    }
    assert report["facts"]["modules"]["onnxruntime"]["file"] in result.out
    for name, verdict in report["engines"].items():
        if not verdict["ready"]:
            assert f"not ready{' (experimental)' * verdict['experimental']}: {verdict['problem']}" == words[name]
            assert verdict["remedy"] in result.out
    assert words["auto"] == f"takes {report['auto']['engine']}"


def test_a_machine_with_a_gpu(tarflow: Callable, found: Callable) -> None:
    found(
        driver=Driver(version="580.65.06", cuda=(13, 1)),
        gpus=(GPU, dataclasses.replace(GPU, free=None)),
        provider=Provider(built=True, cuda="13.0"),
        modules=here().modules | {"cuda.bindings": Module(version="13.4.4", file="f"), "tensorrt": Module()},
        owners={"onnxruntime": ("onnxruntime-gpu 1.31.1",)},
        libraries={name: Library(file=name) for name in here().libraries},
    )
    result = tarflow("doctor")
    assert result.code == 0
    assert "GPU 0               NVIDIA H200, sm_90, 150.0 GB, 149.0 GB free\n" in result.out
    assert "GPU 1               NVIDIA H200, sm_90, 150.0 GB\n" in result.out
    assert "driver              580.65.06, runs CUDA up to 13.1\n" in result.out
    assert "CUDA provider       of onnxruntime, for CUDA 13.0, loads\n" in result.out
    assert re.search(r"^native kernel       (none: \S.*|[a-z]\S+)$", result.out, re.MULTILINE)
    assert "ort-cuda            ready (experimental)\n" in result.out
    assert result.out.endswith("auto                takes ort-cuda\n")


def test_the_default_engine_is_not_ready(tarflow: Callable, found: Callable) -> None:
    owners = {"onnxruntime": ("onnxruntime 1.32.0", "onnxruntime-gpu 1.31.1")}
    found(modules=here().modules | {"tensorrt": Module(problem="libnvinfer.so.11: \x1b[31m")}, owners=owners)
    result = tarflow("doctor")
    assert result.code == 1
    assert "not ready: installed packages overwrite each other" in result.out
    assert result.out.endswith("auto                takes ort-cpu, which is not ready\n")
    assert "warning: installed packages overwrite each other in the folder onnxruntime/: " in result.err
    assert "\x1b" not in result.out + result.err
    report = tarflow("doctor", "--json")
    assert report.code == 1
    assert len(json.loads(report.out)["warnings"]) == 2


@pytest.mark.parametrize("engine", ["ort-cuda", "trt", "trt-rtx"])
def test_asking_for_an_engine_that_is_not_ready(
    tarflow: Callable, refused: Callable, class_bundle: Path, engine: str
) -> None:
    """One line with what is missing and one with what mends it, exit code 2, and nothing runs instead."""
    if json.loads(tarflow("doctor", "--json").out)["engines"][engine]["ready"]:
        pytest.skip(f"engine {engine} is ready here: tests/gpu runs it")
    result = refused("infer", class_bundle, "--engine", engine)
    error, hint = result.err.splitlines()
    assert "NVIDIA driver" in error or f"engine {engine} needs" in error
    assert ("driver" in hint) == ("NVIDIA driver" in error)


def test_auto_explains_itself(tarflow: Callable, class_bundle: Path) -> None:
    """With the doctor's words, on stderr and in the report."""
    reason = json.loads(tarflow("doctor", "--json").out)["auto"]["reason"]
    result = tarflow("infer", class_bundle, "--engine", "auto", "-n", 1, "--json")
    assert result.err.splitlines()[0] == reason
    assert json.loads(result.out)["chosen"] == reason
