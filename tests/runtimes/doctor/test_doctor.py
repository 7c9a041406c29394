"""`_doctor`: probes that survive what they load, and conclusions from facts of machines that are not here."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes.doctor import Facts, choose, gather, probes, verdicts, warnings
from tarflow_runtimes.doctor.conclusions import CHECKS, INSTALL, PREFERENCE
from tarflow_runtimes.doctor.facts import LIBRARIES, MODULES, Driver, Gpu, Library, Module, Native, Provider
from tarflow_runtimes.doctor.probes import probe

H200 = Gpu(name="NVIDIA H200", capability=(9, 0), memory=150_000_000_000, free=149_000_000_000)
L4 = Gpu(name="NVIDIA L4", capability=(8, 9), memory=24_000_000_000, free=None)
NO_DRIVER = Driver(problem="libcuda.so.1: cannot open shared object file: No such file or directory")

VERSIONS = {
    "onnxruntime": "1.31.1",
    "tensorrt": "11.4.0.106",
    "tensorrt_rtx": "1.7.1.116",
    "cuda.bindings": "13.4.4",
}


def machine(**changes: Any) -> Facts:
    """A machine on which everything is ready, with these facts changed."""
    modules = {name: Module(version=VERSIONS[name], file=f"/site/{name}/__init__.py") for name in MODULES}
    modules["tensorrt_rtx"] = dataclasses.replace(modules["tensorrt_rtx"], targets=("sm_80", "sm_89", "sm_120"))
    facts = Facts(
        system="Linux x86_64",
        python="3.12.0",
        driver=Driver(version="580.65.06", cuda=(13, 1)),
        gpus=(L4,),
        modules=modules | changes.pop("modules", {}),
        libraries={name: Library(file=f"/site/{name}") for name in LIBRARIES},
        provider=Provider(built=True, cuda="13.0"),
        owners={
            "onnxruntime": ("onnxruntime-gpu 1.31.1",),
            "tensorrt": ("tensorrt-cu13 11.4.0.106",),
            "tensorrt_rtx": ("tensorrt-rtx-cu13 1.7.1.116",),
        }
        | changes.pop("owners", {}),
        native=Native(file="/site/libtarflow_native.so", kernel="x86-64-v4", problem=""),
    )
    return dataclasses.replace(facts, **changes)


def without(*names: str) -> dict[str, Module]:
    return {name: Module() for name in names}


def test_a_machine_that_has_everything() -> None:
    facts = machine()
    assert set(verdicts(facts).values()) == {None}
    assert warnings(facts) == []
    assert choose(facts) == ("trt", "auto: trt is ready on NVIDIA L4")


def test_every_engine_has_its_place() -> None:
    with pytest.raises(tfr.EngineError) as caught:
        tfr.load(engine="none")
    assert caught.value.hint == f"valid are {', '.join(CHECKS)}, cpu, auto"
    assert set(CHECKS) == set(PREFERENCE) == set(INSTALL) == set(verdicts(machine()))


CPU_ORT = {
    "owners": {"onnxruntime": ("onnxruntime 1.32.0",)},
    "provider": Provider(),
}
OVERWRITTEN = "installed packages overwrite each other in the folder"
BROKEN = Module(problem="libnvinfer.so.11: cannot open shared object file")

FAULTS: dict[str, tuple[Facts, str, str, str]] = {
    "no onnxruntime": (
        machine(modules=without("onnxruntime"), owners={"onnxruntime": ()}, provider=Provider()),
        "ort-cpu",
        "the package onnxruntime is not installed",
        'pip install "tarflow-sdk[ort]"',
    ),
    "old onnxruntime": (
        machine(modules={"onnxruntime": Module(version="1.27.1", file="f")}),
        "ort-cpu",
        "onnxruntime 1.27.1 is too old, 1.28 is needed",
        'pip install "onnxruntime-gpu>=1.28"',
    ),
    "two onnxruntimes": (
        machine(owners={"onnxruntime": ("onnxruntime 1.32.0", "onnxruntime-gpu 1.31.1")}),
        "ort-cuda",
        f"{OVERWRITTEN} onnxruntime/: onnxruntime 1.32.0, onnxruntime-gpu 1.31.1",
        'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "tarflow-sdk[ort-cuda]"',
    ),
    "onnxruntime without CUDA": (
        machine(**CPU_ORT),
        "ort-cuda",
        "onnxruntime 1.31.1 is a build without CUDA",
        'pip uninstall -y onnxruntime && pip install "tarflow-sdk[ort-cuda]"',
    ),
    "no CUDA libraries": (
        machine(provider=Provider(built=True, cuda="13.0", problem="libcublas.so.13: cannot open")),
        "ort-cuda",
        "onnxruntime's CUDA provider does not load: libcublas.so.13: cannot open",
        'pip install "tarflow-sdk[ort-cuda]"',
    ),
    "no cuDNN": (
        machine(libraries={name: Library(file=name, problem="not found" * ("cudnn" in name)) for name in LIBRARIES}),
        "ort-cuda",
        "onnxruntime needs cuDNN 9: not found",
        'pip install "tarflow-sdk[ort-cuda]"',
    ),
    "onnxruntime whose recordings are wrong": (
        machine(modules={"onnxruntime": Module(version="1.30.0", file="f")}),
        "ort-cuda",
        "onnxruntime 1.30.0 is too old, 1.31 is needed",
        'pip install "onnxruntime-gpu>=1.31"',
    ),
    "no driver, which the provider wants too": (
        machine(driver=NO_DRIVER, gpus=(), provider=Provider(built=True, cuda="13.0", problem=NO_DRIVER.problem)),
        "ort-cuda",
        "no NVIDIA driver is loaded on this machine: libcuda.so.1",
        "install NVIDIA's driver",
    ),
    "no TensorRT": (
        machine(modules=without("tensorrt"), owners={"tensorrt": ()}),
        "trt",
        "the package tensorrt is not installed",
        'pip install "tarflow-sdk[trt]"',
    ),
    "TensorRT without its libraries": (
        machine(modules={"tensorrt": BROKEN}),
        "trt",
        f"tensorrt does not import: {BROKEN.problem}",
        "pip install --force-reinstall tensorrt-cu13",
    ),
    "old TensorRT": (
        machine(modules={"tensorrt": Module(version="10.9.0.34", file="f")}),
        "trt",
        "tensorrt 10.9.0.34 is too old, 10.15 is needed",
        'pip install "tensorrt-cu13>=10.15"',
    ),
    "no cuda-python": (
        machine(modules=without("cuda.bindings")),
        "trt",
        "the package cuda.bindings is not installed",
        'pip install "tarflow-sdk[trt]"',
    ),
    "no driver": (
        machine(driver=NO_DRIVER, gpus=()),
        "trt-rtx",
        "no NVIDIA driver is loaded on this machine: libcuda.so.1",
        "install NVIDIA's driver",
    ),
    "old driver": (
        machine(
            driver=Driver(version="550.54", cuda=(12, 4)), modules={"cuda.bindings": Module(version="12.9", file="f")}
        ),
        "trt",
        "tensorrt 11.4.0.106 is built for CUDA 13, the driver 550.54 runs CUDA up to 12.4",
        "update NVIDIA's driver to 580 or newer",
    ),
    "cuda-python newer than the driver": (
        machine(driver=Driver(version="550.54", cuda=(12, 4)), owners={"tensorrt": ("tensorrt-cu12 10.15.1",)}),
        "trt",
        "cuda.bindings 13.4.4 is built for CUDA 13, the driver 550.54 runs CUDA up to 12.4",
        'pip install "cuda-python==12.*"',
    ),
    "no GPU": (machine(gpus=()), "trt", "the NVIDIA driver finds no GPU", "CUDA_VISIBLE_DEVICES"),
    "Hopper": (
        machine(gpus=(H200, L4)),
        "trt-rtx",
        "TensorRT for RTX 1.7.1.116 builds for sm_80, sm_89, sm_120, not for NVIDIA H200 (sm_90)",
        "use engine trt or ort-cuda",
    ),
    "Volta": (
        machine(gpus=(Gpu(name="NVIDIA V100", capability=(7, 0), memory=1, free=1),)),
        "trt",
        "TensorRT has no kernels for NVIDIA V100 (sm_70)",
        "use engine ort-cuda",
    ),
    "a driver that does not start": (
        machine(driver=Driver(version="580.65", cuda=(13, 0), problem="cuInit failed: X (803)"), gpus=()),
        "ort-cuda",
        "the NVIDIA driver 580.65 does not start: cuInit failed: X (803)",
        "restart the machine",
    ),
    "Windows": (machine(system="Windows AMD64"), "trt", "it runs on Linux only", "use engine ort-cuda"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_the_first_thing_in_an_engines_way(case: str) -> None:
    facts, engine, problem, remedy = FAULTS[case]
    fault = verdicts(facts)[engine]
    assert fault is not None
    assert fault.problem.startswith(problem)
    assert remedy in fault.remedy
    assert "\n" not in fault.problem + fault.remedy


def test_three_different_errors_of_a_gpu_engine() -> None:
    """Without library, without driver, without GPU."""
    machines = (machine(modules=without("tensorrt")), machine(driver=NO_DRIVER, gpus=()), machine(gpus=()))
    faults = [verdicts(facts)["trt"] for facts in machines]
    assert len({fault.problem for fault in faults if fault}) == len({fault.remedy for fault in faults if fault}) == 3


def test_other_engines_do_not_suffer() -> None:
    found = verdicts(machine(gpus=(H200,), modules=without("tensorrt")))
    assert [engine for engine, fault in found.items() if fault is None] == ["native", "ort-cpu", "ort-cuda"]
    found = verdicts(machine(**CPU_ORT, driver=NO_DRIVER, gpus=()))
    assert [engine for engine, fault in found.items() if fault is None] == ["native", "ort-cpu"]


def test_auto_says_what_it_passed_over() -> None:
    facts = machine(gpus=(H200,), modules=without("tensorrt"))
    engine, reason = choose(facts)
    assert engine == "ort-cuda"
    assert reason.split("; ") == [
        "auto: ort-cuda is ready on NVIDIA H200",
        "trt is not: the package tensorrt is not installed",
        "trt-rtx is not: TensorRT for RTX 1.7.1.116 builds for sm_80, sm_89, sm_120, not for NVIDIA H200 (sm_90)",
    ]
    without_gpu = machine(**CPU_ORT, driver=NO_DRIVER, gpus=())
    assert choose(without_gpu)[0] == "native"
    assert choose(without_gpu)[1].startswith("auto: native is ready on x86-64-v4; trt is not: ")
    engine, reason = choose(dataclasses.replace(without_gpu, native=Native()))
    assert engine == "ort-cpu"
    assert "native is not: the native kernel is not there: its library was not built" in reason
    assert all(f"{name} is not: " in reason for name in ("trt", "trt-rtx", "ort-cuda"))
    engine, reason = choose(dataclasses.replace(machine(modules=without(*MODULES)), native=Native()))
    assert engine == "ort-cpu"
    assert reason.startswith("auto: no engine is ready; ")


def test_auto_takes_what_computes_in_the_bundles_precision() -> None:
    everything = machine()
    assert [choose(everything, one)[0] for one in ("float32", "float16", "bfloat16", "int8")] == [
        *("trt", "trt", "trt", "native"),
    ]
    without_gpu = machine(**CPU_ORT, driver=NO_DRIVER, gpus=())
    assert [choose(without_gpu, one)[0] for one in ("float16", "bfloat16", "int8")] == ["ort-cpu", "native", "native"]
    assert "native is not: it does not compute in float16" in choose(without_gpu, "float16")[1]


def test_warnings_name_what_does_not_fit() -> None:
    facts = machine(
        driver=Driver(version="550.54", cuda=(12, 4)),
        modules={"tensorrt_rtx": BROKEN},
        owners={"tensorrt": ("tensorrt-cu12 10.15.1", "tensorrt-cu13 11.4.0.106")},
    )
    assert warnings(facts) == [
        f"{OVERWRITTEN} tensorrt/: tensorrt-cu12 10.15.1, tensorrt-cu13 11.4.0.106",
        f"tensorrt_rtx is installed and does not import: {BROKEN.problem}",
        "cuda.bindings 13.4.4 is built for CUDA 13, the driver 550.54 runs CUDA up to 12.4",
        "onnxruntime 1.31.1 is built for CUDA 13, the driver 550.54 runs CUDA up to 12.4",
        "tensorrt 11.4.0.106 is built for CUDA 13, the driver 550.54 runs CUDA up to 12.4",
        "tensorrt_rtx 1.7.1.116 is built for CUDA 13, the driver 550.54 runs CUDA up to 12.4",
    ]


MODULES_THAT_BREAK: dict[str, tuple[str, str]] = {
    "abort": ("import os; os.abort()", "loading it ended the process with SIGABRT"),
    "exit": ("import os; os._exit(3)", "loading it ended the process with exit code 3"),
    "exit by Python": ("import sys; sys.exit('gone')", "loading it ended the process with exit code 1"),
    "raise": ("raise OSError('libnvinfer.so.11: cannot open\\nand more')", "libnvinfer.so.11: cannot open"),
    "missing part": ("import tensorrt_libs", "No module named 'tensorrt_libs'"),
    "syntax": ("import", "invalid syntax (__init__.py, line 1)"),
}


@pytest.mark.parametrize("kind", MODULES_THAT_BREAK)
def test_a_probe_survives_a_package(kind: str, fake_package: Callable[[str, str], None]) -> None:
    source, problem = MODULES_THAT_BREAK[kind]
    fake_package("tensorrt", source)
    assert probe("module", "tensorrt") == {"problem": problem}


def test_a_probe_that_hangs(fake_package: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package("tensorrt", "import time; time.sleep(60)")
    monkeypatch.setattr(probes, "TIMEOUT", 1.0)
    assert probe("module", "tensorrt") == {"problem": "loading it did not end within 1 s"}


def test_a_probe_of_a_talkative_package(fake_package: Callable[[str, str], None], tmp_path: Path) -> None:
    fake_package("tensorrt", "print('{}', end=''); __version__ = '11.4'")
    found = probe("module", "tensorrt")
    assert (found["version"], found["file"]) == ("11.4", str(tmp_path / "tensorrt" / "__init__.py"))
    assert probe("module", "no_such_package") == {}


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write a package and put it first on the path."""

    def write(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return write


@pytest.fixture
def fake_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries under the names of NVIDIA's, first where the system looks."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux, to make a library that stands in for the driver")
    source = Path(__file__).with_name("fake_driver.c")
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / name, source], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))


@pytest.mark.usefixtures("fake_driver")
def test_driver_and_gpus() -> None:
    facts = gather()
    assert facts.driver == Driver(version="580.65.06", cuda=(13, 1))
    assert facts.gpus == (H200, L4)
    assert [gpu.architecture for gpu in facts.gpus] == ["sm_90", "sm_89"]


@pytest.mark.usefixtures("fake_driver")
def test_driver_without_a_gpu_and_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STATUS", "100")
    facts = gather()
    assert (facts.driver, facts.gpus) == (Driver(version="580.65.06", cuda=(13, 1)), ())
    monkeypatch.setenv("FAKE_STATUS", "999")
    assert gather().driver.problem == "cuInit failed: CUDA_ERROR_UNKNOWN (999)"
    monkeypatch.setenv("FAKE_STATUS", "804")
    assert gather().driver.problem == "cuInit failed: unknown error (804)"


def test_this_machine() -> None:
    """The default engine runs in the tests, so that it is ready; the rest agrees with what Python itself finds."""
    facts = gather()
    found = verdicts(facts)
    assert found["ort-cpu"] is None
    assert facts.modules["onnxruntime"].version == pytest.importorskip("onnxruntime").__version__
    assert any("onnxruntime" in path for path in facts.modules["onnxruntime"].libraries) or sys.platform != "linux"
    for name, distribution in (("tensorrt_rtx", "tensorrt_rtx_cu13"), ("cuda.bindings", "cuda-bindings")):
        from importlib.metadata import PackageNotFoundError, version

        try:
            expected = version(distribution)
        except PackageNotFoundError:
            assert not facts.modules[name].installed
        else:
            assert facts.modules[name].version == expected
    if facts.modules["tensorrt_rtx"].installed:
        assert {"sm_80", "sm_89", "sm_120"} <= set(facts.modules["tensorrt_rtx"].targets)
    if facts.driver.problem:
        assert facts.gpus == ()
        assert all(found[engine] for engine in ("ort-cuda", "trt", "trt-rtx"))
    json.dumps(facts.to_json())


def test_an_environment_without_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "env")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "bin" / "python"))
    monkeypatch.setattr(sys, "path", [])
    facts = gather()
    assert not any(module.installed for module in facts.modules.values())
    assert facts.owners == {"onnxruntime": (), "tensorrt": (), "tensorrt_rtx": ()}
    remedies = {engine: fault and fault.remedy for engine, fault in verdicts(facts).items()}
    extras = {"ort-cpu": "ort", "ort-cuda": "ort-cuda", "trt": "trt", "trt-rtx": "trt-rtx"}
    remedies.pop("native")  # the package's own library, whatever the environment
    assert remedies == {engine: f'pip install "tarflow-sdk[{extra}]"' for engine, extra in extras.items()}


def test_probes_import_no_torch() -> None:
    """Nor do they need anything but the standard library."""
    code = f"""
import runpy, sys
sys.argv[1:] = ["provider"]
runpy.run_path({str(probes.PROBE)!r}, run_name="__main__")
assert not {{"torch", "tarflow_runtimes"}} & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": ""}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, env=environment)


@pytest.mark.parametrize("engine", ["ort-cuda", "trt", "trt-rtx"])
def test_an_engine_that_is_not_ready_is_an_error_with_its_remedy(exported, engine):
    """What the doctor finds in its way is what opening it says; nothing else is run instead."""
    if verdicts(gather())[engine] is None:
        pytest.skip(f"engine {engine} is ready here: tests/gpu runs it")
    with pytest.raises(tfr.EngineError) as caught:
        tfr.load(exported("class").path, engine=engine)
    assert caught.value.hint
    assert "\n" not in f"{caught.value}{caught.value.hint}"


def test_auto_says_what_it_took_and_why(exported):
    with tfr.load(exported("class").path, engine="auto") as flow:
        engine, reason = choose(gather())
        assert (flow.engine_name, flow.engine_report["chosen"]) == (engine, reason)
