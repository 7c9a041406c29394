"""`Facts`: hardware and software of this machine that engines need. Conclusions are based on these facts only."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Final

MODULES: Final = ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.bindings")
"""Python packages that engines import."""

LIBRARIES: Final = ("cudart-12", "cudart-13", "cublasLt-12", "cublasLt-13", "cudnn-9")
"""Shared libraries of CUDA, by name and major version, that ONNX Runtime loads first."""


def file_name(library: str) -> str:
    """The file name of one of LIBRARIES for the system's loader.

    >>> file_name("cudart-13")  # on Linux
    'libcudart.so.13'
    """
    stem, _, major = library.partition("-")
    return f"{stem}64_{major}.dll" if sys.platform == "win32" else f"lib{stem}.so.{major}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """An NVIDIA GPU: its compute capability, and its total and free memory in bytes; None means unknown."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int | None

    @property
    def architecture(self) -> str:
        """The compiler target, such as `sm_90`."""
        return "sm_{}{}".format(*self.capability)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """The NVIDIA driver: its version, and the newest CUDA that it supports; (0, 0) and a `problem` without a driver."""

    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    problem: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A Python package, as imported in a separate process.

    `file` is its path, empty when it is not installed; `problem` says in one line why it does not import; `libraries`
    are the files of NVIDIA's and ONNX Runtime's libraries that importing it loaded; `targets` are the architectures
    that it can build for without such a GPU.
    """

    version: str = ""
    file: str = ""
    problem: str = ""
    libraries: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether the package is installed."""
        return bool(self.file or self.problem)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A shared library: the file that loads, or the reason why none does."""

    file: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Native:
    """The native kernel: its library and the kernel for this processor, or the reason why there is none."""

    file: str = ""
    kernel: str = ""
    problem: str = "its library was not built"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """ONNX Runtime's CUDA provider: whether this build has it, for which CUDA, and why it does not load."""

    built: bool = False
    cuda: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All facts about this machine.

    The keys of `modules` are MODULES, those of `libraries` are LIBRARIES; `owners` are the distributions, as
    `name version`, that were installed into the folder of a package, for packages that several distributions provide.
    """

    system: str
    python: str
    driver: Driver
    gpus: tuple[Gpu, ...]
    modules: dict[str, Module]
    libraries: dict[str, Library]
    provider: Provider
    owners: dict[str, tuple[str, ...]]
    native: Native = Native()

    def to_json(self) -> dict[str, Any]:
        """The fields, JSON values only."""
        return dataclasses.asdict(self)
