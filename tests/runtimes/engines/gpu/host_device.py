"""The host's memory as a device, and ONNX Runtime's CPU provider as what makes its programs.

It is how everything above `Device` is tested without a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.reader import Bundle, open_bundle
from tarflow_runtimes.engines.gpu.device import ALIGNMENT, Transfers
from tarflow_runtimes.engines.gpu.engine import DeviceEngine
from tarflow_runtimes.engines.gpu.ort import OrtMaker
from tarflow_runtimes.model.flow import Flow


class HostBuffer:
    """NumPy's memory."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
        self.address: int = self._memory.ctypes.data + -self._memory.ctypes.data % ALIGNMENT


@dataclasses.dataclass(frozen=True, slots=True)
class HostReplay:
    """A callable, kept."""

    replay: Callable[[], None]


class HostDevice:
    """Memory of the host; everything is done at once."""

    kind = "cpu"
    ordinal = 0

    def __init__(self) -> None:
        self.name = platform.processor() or platform.machine()
        self.lock = threading.RLock()
        self.transfers = Transfers()

    def allocate(self, nbytes: int) -> HostBuffer:
        """Zeroed memory."""
        return HostBuffer(nbytes)

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array to that address."""
        array = np.ascontiguousarray(array)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        self.transfers.uploads += 1
        self.transfers.uploaded_bytes += array.nbytes

    def download(self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A copy of the array at that address."""
        array = np.empty(shape, dtype)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        self.transfers.downloads += 1
        self.transfers.downloaded_bytes += array.nbytes
        return array

    def copy(
        self, target: int, source: int, nbytes: int, *, rows: int = 1, target_step: int = 0, source_step: int = 0
    ) -> None:
        """Copy `rows` times `nbytes`."""
        for row in range(rows):
            ctypes.memmove(target + row * target_step, source + row * source_step, nbytes)

    def zero(self, address: int, nbytes: int) -> None:
        """Set memory to zero."""
        ctypes.memset(address, 0, nbytes)

    def capture(self, launch: Callable[[], None]) -> HostReplay:
        """Keep the callable."""
        return HostReplay(launch)

    def synchronize(self, *, everything: bool = False) -> None:
        """Nothing is ever under way."""


class HostMaker(OrtMaker):
    """The graphs of `ort-cuda` on the CPU."""

    required: ClassVar[Mapping[str, str]] = {}  # all nodes run on the CPU

    def __init__(self, bundle: Bundle, device: Any = None) -> None:
        given: dict[str, Any] = {"execution": "CPUExecutionProvider", "options": {}}
        super().__init__(bundle, device or HostDevice(), precision=bundle.precision, **given)


def open_host(bundle: Bundle, **_: Any) -> DeviceEngine:
    """In place of `open_ort_cuda`."""
    return DeviceEngine(bundle, HostMaker(bundle))


def open_flow(path: Any, maker: Callable[[Bundle], OrtMaker] = HostMaker) -> Flow:
    """A bundle on the host's memory."""
    bundle = open_bundle(path)
    return Flow(bundle, DeviceEngine(bundle, maker(bundle)))
