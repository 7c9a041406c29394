"""`Facts`: what this machine has of what an engine may need. Conclusions are drawn from nothing else."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Final

MODULES: Final = ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.bindings")
"""Python packages that engines import."""

LIBRARIES: Final = ("cudart-12", "cudart-13", "cublasLt-12", "cublasLt-13", "cudnn-9")
"""Shared libraries of CUDA, by name and major version, whose absence ONNX Runtime meets first."""


def file_name(library: str) -> str:
    """The name under which the system's loader finds one of LIBRARIES.

    >>> file_name("cudart-13")  # on Linux
    'libcudart.so.13'
    """
    stem, _, major = library.partition("-")
    return f"{stem}64_{major}.dll" if sys.platform == "win32" else f"lib{stem}.so.{major}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """An NVIDIA GPU: its compute capability, its memory in bytes, and how much of it is free; None is unknown."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int | None

    @property
    def architecture(self) -> str:
        """The target of compilers, as `sm_90`."""
        return "sm_{}{}".format(*self.capability)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """The NVIDIA driver: its version, and the newest CUDA that it runs; (0, 0) and `problem` where there is none."""

    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    problem: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A Python package as a process of its own found it.

    `file` is where it lies, or empty when it is not installed; `problem` says why it does not import, in one line;
    `libraries` are the files of NVIDIA's and ONNX Runtime's libraries that came with it into that process; `targets`
    are the architectures that it can build for without their GPU.
    """

    version: str = ""
    file: str = ""
    problem: str = ""
    libraries: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether there is anything to import."""
        return bool(self.file or self.problem)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A shared library: the file that loads, or why none does."""

    file: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Native:
    """The native kernel: its library and the kernel that runs on this processor, or why there is none."""

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
    """All that was found.

    `modules` has the names of MODULES, `libraries` those of LIBRARIES; `owners` are the distributions, as
    `name version`, that have written into the folder of a package, for packages that several distributions provide.
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
