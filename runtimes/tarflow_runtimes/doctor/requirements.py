"""What engines need: packages, versions, the commands that bring them; `owners`: who wrote into a package's folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Final

PROVIDERS: Final = {
    "onnxruntime": ("onnxruntime", "ort-"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
}
"""Packages that several distributions provide, and how the names of these begin."""


MINIMUM_ORT: Final = {"ort-cpu": (1, 28), "ort-cuda": (1, 31)}
"""For CUDA 1.31: the recordings of those before read freed memory in GatherND (microsoft/onnxruntime, pull 32120)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A package before it is imported: NVIDIA's name, and the first version that updates caches in place."""

    title: str
    module: str
    distribution: str
    minimum: tuple[int, int]


PACKAGES: Final = {
    "trt": Described(title="TensorRT", module="tensorrt", distribution="tensorrt", minimum=(10, 15)),
    "trt-rtx": Described(
        title="TensorRT for RTX", module="tensorrt_rtx", distribution="tensorrt-rtx-cu13", minimum=(1, 7)
    ),
}
"""By engine."""

NATIVE_NAMES: Final = {"win32": "tarflow_native.dll", "darwin": "libtarflow_native.dylib"}
NATIVE_LIBRARY: Final = "TARFLOW_NATIVE_LIBRARY"
NATIVE_PRECISIONS: Final = ("float32", "bfloat16", "int8")
"""Of bundles that the native kernel reads."""

NATIVE_BUILD: Final = "install a C++ compiler, and then the package again; in a checkout: make native"

INSTALL: Final = {engine: f'pip install "tarflow-sdk[{engine}]"' for engine in ("ort-cuda", *PACKAGES)} | {
    "ort-cpu": 'pip install "tarflow-sdk[ort]"',
    "native": NATIVE_BUILD,
}
"""The command that brings an engine's packages."""

DRIVER: Final = "install NVIDIA's driver (nvidia.com/drivers); in a container, start it with --gpus all"
VISIBLE: Final = "look at nvidia-smi and at the variable CUDA_VISIBLE_DEVICES"
NO_DRIVER: Final = "no NVIDIA driver is loaded on this machine"
NO_GPU: Final = "the NVIDIA driver finds no GPU"
"""What is said of a driver or a GPU that is missing, and how to mend it."""


def native_library() -> Path | None:
    """The native kernel's library: that which TARFLOW_NATIVE_LIBRARY names, else the package's own if it is there."""
    if named := os.environ.get(NATIVE_LIBRARY):
        return Path(named)
    name = NATIVE_NAMES.get(sys.platform, "libtarflow_native.so")
    path = Path(__file__).parents[1] / "engines" / "native" / name
    return path if path.is_file() else None


def choose_cpu(precision: str) -> tuple[str, str]:
    """The engine that `cpu` stands for on a bundle of that precision, and why; nothing is loaded for it."""
    if precision not in NATIVE_PRECISIONS:
        return "ort-cpu", f"cpu: native does not read {precision}"
    if native_library() is None:
        return "ort-cpu", f"cpu: the library of native is not there; {NATIVE_BUILD}"
    return "native", "cpu: the library of native is there"


def owners(package: str) -> list[str]:
    """Installed distributions that own files of one of the PROVIDERS, as `name version`, sorted."""
    found = set()
    for distribution in importlib.metadata.distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if not name.startswith(PROVIDERS[package]):
            continue
        if any(file.parts[:2] == (package, "__init__.py") for file in distribution.files or ()):
            found.add(f"{name} {distribution.version}")
    return sorted(found)
