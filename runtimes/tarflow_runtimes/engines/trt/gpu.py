"""`Gpu`: the GPU that engines are built for and run on."""

from __future__ import annotations

import dataclasses

from tarflow_runtimes.engines.gpu.cuda import CudaDevice
from tarflow_runtimes.engines.gpu.cuda_import import dotted, driver_version
from tarflow_runtimes.engines.trt.package import Package
from tarflow_runtimes.errors import EngineError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU: its name, the target of its engines, and the newest CUDA that its driver supports."""

    name: str
    target: str
    driver: str

    @property
    def place(self) -> str:
        """GPU and driver, for which a verification holds."""
        return f"{self.name}, {self.driver}"


def gpu_of(device: CudaDevice) -> Gpu:
    """The GPU of a device."""
    major, minor = device.capability
    return Gpu(name=device.name, target=f"sm_{major}{minor}", driver=f"CUDA {dotted(driver_version())}")


def present_gpu() -> Gpu | None:
    """The GPU of this machine; None if the GPU, the driver or the package is missing."""
    try:
        return gpu_of(CudaDevice())
    except EngineError:
        return None


def gpu_for(package: Package) -> Gpu | None:
    """The GPU to build for, that of this machine; packages that build ahead of time do not need one.

    Raises:
        EngineError: when the package needs one and there is none, with what is missing.
    """
    return present_gpu() if package.ahead else gpu_of(CudaDevice())
