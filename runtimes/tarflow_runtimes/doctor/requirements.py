"""What engines need: packages, versions, install commands; `owners`: the distributions that provide a package."""

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
"""Packages that several distributions provide, and the common prefix of the names of these."""


MINIMUM_ORT: Final = {"ort-cpu": (1, 28), "ort-cuda": (1, 31)}
"""CUDA needs 1.31: recordings of older versions read freed memory in GatherND (microsoft/onnxruntime, pull 32120)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A TensorRT package: NVIDIA's name for it, and the first version that updates caches in place."""

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
"""The TensorRT package of each engine."""

NATIVE_NAMES: Final = {"win32": "tarflow_native.dll", "darwin": "libtarflow_native.dylib"}
NATIVE_LIBRARY: Final = "TARFLOW_NATIVE_LIBRARY"
NATIVE_PRECISIONS: Final = ("float32", "bfloat16", "int8")
"""Of bundles that the native kernel reads."""

NATIVE_BUILD: Final = "install a C++ compiler, and then the package again; in a checkout: make native"

INSTALL: Final = {engine: f'pip install "tarflow-sdk[{engine}]"' for engine in ("ort-cuda", *PACKAGES)} | {
    "ort-cpu": 'pip install "tarflow-sdk[ort]"',
    "native": NATIVE_BUILD,
}
"""The command that installs what an engine needs."""

DRIVER: Final = "install NVIDIA's driver (nvidia.com/drivers); in a container, start it with --gpus all"
VISIBLE: Final = "look at nvidia-smi and at the variable CUDA_VISIBLE_DEVICES"
NO_DRIVER: Final = "no NVIDIA driver is loaded on this machine"
NO_GPU: Final = "the NVIDIA driver finds no GPU"
"""Messages for a missing driver or GPU, and how to fix it."""


def native_library() -> Path | None:
    """The library of the native kernel: TARFLOW_NATIVE_LIBRARY if set, else the one in the package if it exists."""
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
