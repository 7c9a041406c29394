"""`Gpu`: the GPU that engines are built for and run on."""

from __future__ import annotations

import dataclasses

from tarflow_runtimes.engines.gpu.cuda import CudaDevice
from tarflow_runtimes.engines.gpu.cuda_import import dotted, driver_version
from tarflow_runtimes.engines.trt.package import Package
from tarflow_runtimes.errors import EngineError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Its name, the target that its engines are for, and the newest CUDA that its driver knows."""

    name: str
    target: str
    driver: str

    @property
    def place(self) -> str:
        """GPU and driver, for which a verification holds."""
        return f"{self.name}, {self.driver}"


def gpu_of(device: CudaDevice) -> Gpu:
    """The GPU behind a device."""
    major, minor = device.capability
    return Gpu(name=device.name, target=f"sm_{major}{minor}", driver=f"CUDA {dotted(driver_version())}")


def present_gpu() -> Gpu | None:
    """The GPU of this machine; None where there is none, no driver, or no package to ask."""
    try:
        return gpu_of(CudaDevice())
    except EngineError:
        return None


def gpu_for(package: Package) -> Gpu | None:
    """The GPU to build for: that of this machine; a package that builds ahead can do without.

    Raises:
        EngineError: when the package needs one and there is none, with what is missing.
    """
    return present_gpu() if package.ahead else gpu_of(CudaDevice())
