"""`import_package`: import TensorRT or TensorRT for RTX, check its version, and describe how the two differ."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from importlib import import_module
from typing import Any, Final

from tarflow_runtimes.doctor.requirements import PACKAGES, owners
from tarflow_runtimes.errors import EngineError

ENGINES: Final = ("trt", "trt-rtx")

PORTABLE_TARGETS: Final = ("sm_80", "sm_86", "sm_89", "sm_120")
"""Default targets of TensorRT for RTX if there is no GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """An imported package: `engine` is our name for it, `title` NVIDIA's.

    `ahead` tells the two apart where they differ: TensorRT for RTX builds ahead of time, without a GPU, for chosen
    targets, and compiles the kernels on the GPU when an engine is loaded; TensorRT builds on the GPU that runs the
    engine, where it times kernels and keeps the times in a timing cache.
    """

    engine: str
    title: str
    module: Any
    version: str

    @property
    def ahead(self) -> bool:
        """Whether engines are built without their GPU, for several targets."""
        return self.engine == "trt-rtx"

    @property
    def name(self) -> str:
        """Title and version, for messages."""
        return f"{self.title} {self.version}"

    def targets(self) -> dict[str, Any]:
        """The targets that this version can build for ahead of time, by name: `sm_80` -> its ComputeCapability."""
        members = self.module.ComputeCapability.__members__ if self.ahead else {}
        return {f"sm_{name[2:]}": member for name, member in members.items() if re.fullmatch(r"SM\d+", name)}


@functools.cache
def import_package(engine: str) -> Package:
    """The package behind engine `trt` or `trt-rtx`.

    Raises:
        EngineError: when it is missing, without its libraries, too old, or not for this operating system.
    """
    described = PACKAGES[engine]
    install = f'pip install "tarflow-sdk[{engine}]"'
    if sys.platform != "linux":
        raise EngineError(f"engine {engine} runs on Linux only", hint="use engine ort-cuda or ort-cpu")
    installed = owners(described.module)
    if len(installed) > 1:
        raise EngineError(
            f"installed packages overwrite each other in the folder {described.module}/: {', '.join(installed)}",
            hint=f"pip uninstall -y {' '.join(one.split()[0] for one in installed)}, then {install}",
        )
    try:
        module = import_module(described.module)
    except ModuleNotFoundError as error:
        raise EngineError(
            f"engine {engine} needs {described.title}, which is not installed ({error})", hint=install
        ) from error
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{described.title} is installed, but its libraries do not load: {error}",
            hint=f"pip install --force-reinstall {described.distribution}, and see that its libraries come with it",
        ) from error
    version = str(getattr(module, "__version__", ""))
    if not hasattr(module, "Builder"):
        raise EngineError(
            f"{described.title} {version} is installed without its builder", hint=f"{install} --force-reinstall"
        )
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < described.minimum:
        wanted = ".".join(map(str, described.minimum))
        raise EngineError(
            f"{described.title} {version} is too old, {wanted} is needed",
            hint=f'pip install "{described.distribution}>={wanted}"',
        )
    return Package(engine=engine, title=described.title, module=module, version=version)
