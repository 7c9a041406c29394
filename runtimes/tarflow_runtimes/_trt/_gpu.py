"""`Gpu`: the GPU that engines are built for and run on."""

from __future__ import annotations

import dataclasses

from tarflow_runtimes._device.cuda import CudaDevice
from tarflow_runtimes._device.cuda_import import dotted, driver_version
from tarflow_runtimes._errors import EngineError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Its name, the target that its engines are for, and the newest CUDA that its driver knows."""

    name: str
    target: str
    driver: str


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
