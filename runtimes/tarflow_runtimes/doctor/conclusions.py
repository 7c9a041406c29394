"""`verdicts`, `warnings`, `choose`: pure functions that draw conclusions from facts, for each engine and for `auto`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Final

from tarflow_runtimes.doctor.facts import Facts
from tarflow_runtimes.doctor.requirements import (
    DRIVER,
    INSTALL,
    MINIMUM_ORT,
    NATIVE_BUILD,
    NO_DRIVER,
    NO_GPU,
    PACKAGES,
    VISIBLE,
)

PREFERENCE: Final = ("trt", "trt-rtx", "ort-cuda", "native", "ort-cpu")
"""The engines in the order in which `auto` prefers them, by expected speed; `benchmarks/gpu.py` measures it."""

UNFIT: Final = {
    "float16": ("native",),
    "bfloat16": ("ort-cpu",),
    "int8": ("trt", "trt-rtx", "ort-cuda"),
}
"""By precision, the engines that cannot run such bundles."""

DRIVER_OF_CUDA: Final = {12: "525", 13: "580"}
"""The oldest driver for each major version of CUDA (CUDA release notes, minor version compatibility)."""

OLDEST_FOR_TENSORRT: Final = (7, 5)
"""The oldest compute capability that TensorRT has kernels for (its support matrix)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Why an engine cannot run, and how to fix it, with a command if possible."""

    problem: str
    remedy: str


Check = Callable[[Facts], Fault | None]


def verdicts(facts: Facts) -> dict[str, Fault | None]:
    """For each engine, the first problem that stops it; None if it is ready."""
    return {engine: next(filter(None, (check(facts) for check in checks)), None) for engine, checks in CHECKS.items()}


def choose(facts: Facts, precision: str = "float32") -> tuple[str, str]:
    """The engine that `auto` chooses for a bundle of that precision, and why.

    It is the first of PREFERENCE that is ready and supports the precision, else ort-cpu, whose error says what to do.
    """
    found = verdicts(facts)
    passed: list[str] = []
    for engine in PREFERENCE:
        fault = found[engine]
        if engine in UNFIT.get(precision, ()):
            passed.append(f"{engine} is not: it does not compute in {precision}")
        elif fault is None:
            where = {"native": facts.native.kernel, "ort-cpu": ""}
            on = where[engine] if engine in where else facts.gpus[0].name
            why = f"auto: {engine} is ready" + (f" on {on}" if on else "")
            return engine, "; ".join([why, *passed])
        else:
            passed.append(f"{engine} is not: {fault.problem}")
    return "ort-cpu", "; ".join(["auto: no engine is ready", *passed])


def warnings(facts: Facts) -> list[str]:
    """Conflicts between packages, even if no engine needs them now."""
    found = [_overwritten(facts, package) for package, several in facts.owners.items() if len(several) > 1]
    for name, module in facts.modules.items():
        if module.problem:
            found.append(f"{name} is installed and does not import: {module.problem}")
    for name, major in _cuda_majors(facts):
        fault = _driver_for(facts, name, major)
        if fault is not None and fault.problem not in found:
            found.append(fault.problem)
    return found


def _overwritten(facts: Facts, package: str) -> str:
    return f"installed packages overwrite each other in the folder {package}/: {', '.join(facts.owners[package])}"


def _package(engine: str, name: str, minimum: tuple[int, ...] = ()) -> Check:
    """Check that the package is installed once, imports, and is new enough."""

    def check(facts: Facts) -> Fault | None:
        module, install = facts.modules[name], INSTALL[engine]
        distributions = _distributions(facts, name)
        if len(distributions) > 1:
            remedy = f"pip uninstall -y {' '.join(distributions)} && {install}"
            return Fault(problem=_overwritten(facts, name), remedy=remedy)
        if not module.installed:
            return Fault(problem=f"the package {name} is not installed", remedy=install)
        distribution = distributions[0] if distributions else name.replace("google.", "").replace(".", "-")
        if module.problem:
            remedy = f"pip install --force-reinstall {distribution}"
            return Fault(problem=f"{name} does not import: {module.problem}", remedy=remedy)
        if _numbers(module.version) < minimum:
            wanted = ".".join(map(str, minimum))
            remedy = f'pip install "{distribution}>={wanted}"'
            return Fault(problem=f"{name} {module.version} is too old, {wanted} is needed", remedy=remedy)
        return None

    return check


def _distributions(facts: Facts, package: str) -> list[str]:
    """Names of the distributions that a package came from, if known."""
    return [owner.split()[0] for owner in facts.owners.get(package, ())]


def _linux(facts: Facts) -> Fault | None:
    if facts.system.startswith("Linux"):
        return None
    return Fault(problem=f"it runs on Linux only, this is {facts.system}", remedy="use engine ort-cuda or ort-cpu")


def _built_for_cuda(facts: Facts) -> Fault | None:
    if facts.provider.built:
        return None
    others = " ".join(_distributions(facts, "onnxruntime")) or "onnxruntime"
    return Fault(
        problem=f"onnxruntime {facts.modules['onnxruntime'].version} is a build without CUDA",
        remedy=f"pip uninstall -y {others} && {INSTALL['ort-cuda']}",
    )


def _provider_loads(facts: Facts) -> Fault | None:
    """Check that ONNX Runtime finds CUDA's libraries."""
    if not facts.provider.problem:
        return None
    problem = f"onnxruntime's CUDA provider does not load: {facts.provider.problem}"
    return Fault(problem=problem, remedy=INSTALL["ort-cuda"])


def _cudnn_loads(facts: Facts) -> Fault | None:
    """Check for cuDNN, which ONNX Runtime loads only for a node that needs it, such as in the step graphs."""
    problem = facts.libraries["cudnn-9"].problem
    return Fault(problem=f"onnxruntime needs cuDNN 9: {problem}", remedy=INSTALL["ort-cuda"]) if problem else None


def _driver(facts: Facts) -> Fault | None:
    driver = facts.driver
    if not driver.problem:
        return None
    if driver.cuda != (0, 0):
        problem = f"the NVIDIA driver {driver.version} does not start: {driver.problem}"
        return Fault(
            problem=problem, remedy="restart the machine, as after an update of the driver, or install it again"
        )
    return Fault(problem=f"{NO_DRIVER}: {driver.problem}", remedy=DRIVER)


def _driver_is_new_enough(*packages: str) -> Check:
    """Check that the driver supports the CUDA version that each package is built for."""

    def check(facts: Facts) -> Fault | None:
        needs = (_driver_for(facts, name, major) for name, major in _cuda_majors(facts) if name.split()[0] in packages)
        return next(filter(None, needs), None)

    return check


def _driver_for(facts: Facts, what: str, major: int) -> Fault | None:
    driver = facts.driver
    if driver.problem or driver.cuda[0] >= major:
        return None
    newer = f"{DRIVER_OF_CUDA[major]} or newer" if major in DRIVER_OF_CUDA else "a newer one"
    update = f"update NVIDIA's driver to {newer} (nvidia.com/drivers)"
    if what.startswith("cuda.bindings"):
        update = f'pip install "cuda-python=={driver.cuda[0]}.*", or {update}'
    runs = f"the driver {driver.version} runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    return Fault(problem=f"{what} is built for CUDA {major}, {runs}", remedy=update)


def _cuda_majors(facts: Facts) -> Iterator[tuple[str, int]]:
    """The packages that are built for one major version of CUDA, as `name version`, and that version."""
    bindings, provider = facts.modules["cuda.bindings"], facts.provider
    if bindings.version:
        yield f"cuda.bindings {bindings.version}", _numbers(bindings.version)[0]
    if provider.cuda:
        yield f"onnxruntime {facts.modules['onnxruntime'].version}", _numbers(provider.cuda)[0]
    for package in ("tensorrt", "tensorrt_rtx"):
        for owner in facts.owners.get(package, ()):
            if suffix := re.search(r"-cu(\d+)\b", owner):
                yield f"{package} {owner.split()[1]}", int(suffix[1])


def _gpu(facts: Facts) -> Fault | None:
    if facts.gpus:
        return None
    return Fault(problem=NO_GPU, remedy=VISIBLE)


def _kernels_of_tensorrt(facts: Facts) -> Fault | None:
    gpu = facts.gpus[0]  # engines run on the first GPU
    if gpu.capability >= OLDEST_FOR_TENSORRT:
        return None
    problem = f"TensorRT has no kernels for {gpu.name} ({gpu.architecture})"
    return Fault(problem=problem, remedy="use engine ort-cuda or ort-cpu")


def _target_of_tensorrt_rtx(facts: Facts) -> Fault | None:
    gpu, package = facts.gpus[0], facts.modules["tensorrt_rtx"]
    if gpu.architecture in package.targets:
        return None
    builds = f"TensorRT for RTX {package.version} builds for {', '.join(package.targets)}"
    return Fault(problem=f"{builds}, not for {gpu.name} ({gpu.architecture})", remedy="use engine trt or ort-cuda")


def _native(facts: Facts) -> Fault | None:
    if facts.native.kernel:
        return None
    return Fault(problem=f"the native kernel is not there: {facts.native.problem}", remedy=NATIVE_BUILD)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _device(engine: str, package: str) -> tuple[Check, ...]:
    """What every GPU engine needs besides its own library, whose package also limits the driver's version."""
    bindings = "cuda.bindings"
    return (_package(engine, bindings), _driver, _driver_is_new_enough(bindings, package), _gpu)


CHECKS: Final[dict[str, tuple[Check, ...]]] = {
    "native": (_native,),
    "ort-cpu": (_package("ort-cpu", "onnxruntime", MINIMUM_ORT["ort-cpu"]),),
    "ort-cuda": (
        _package("ort-cuda", "onnxruntime", MINIMUM_ORT["ort-cuda"]),
        _built_for_cuda,
        *_device("ort-cuda", "onnxruntime"),
        _provider_loads,
        _cudnn_loads,
    ),
    "trt": (
        _linux,
        _package("trt", "tensorrt", PACKAGES["trt"].minimum),
        *_device("trt", "tensorrt"),
        _kernels_of_tensorrt,
    ),
    "trt-rtx": (
        _linux,
        _package("trt-rtx", "tensorrt_rtx", PACKAGES["trt-rtx"].minimum),
        *_device("trt-rtx", "tensorrt_rtx"),
        _target_of_tensorrt_rtx,
    ),
}
"""What each engine needs, in the order in which a person would fix it."""
