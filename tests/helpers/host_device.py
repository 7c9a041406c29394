"""The host's memory as a device, and ONNX Runtime's CPU provider as what makes its programs.

It is how everything above `Device` is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import platform
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes.bundle.reader import Bundle, open_bundle
from tarflow_runtimes.engines.gpu import ort_cuda
from tarflow_runtimes.engines.gpu.device import ALIGNMENT, Transfers
from tarflow_runtimes.engines.gpu.engine import DeviceEngine
from tarflow_runtimes.engines.gpu.ort import OrtBound, OrtMaker, OrtProgram


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
        self.buffers: weakref.WeakSet[HostBuffer] = weakref.WeakSet()

    @property
    def allocated(self) -> int:
        """Bytes of all buffers that anybody holds."""
        gc.collect()
        return sum(buffer.nbytes for buffer in self.buffers)

    def allocate(self, nbytes: int) -> HostBuffer:
        """Zeroed memory."""
        buffer = HostBuffer(nbytes)
        self.buffers.add(buffer)
        return buffer

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
    """The graphs of `ort-cuda` on the CPU; `made` counts the programs."""

    required: ClassVar[Mapping[str, str]] = {}  # all nodes run on the CPU

    def __init__(self, bundle: Bundle, device: Any = None) -> None:
        given: dict[str, Any] = {"execution": "CPUExecutionProvider", "options": {}}
        super().__init__(bundle, device or HostDevice(), precision=bundle.precision, **given)
        self.made = 0

    def program(self, block: int, kind: str, **shape: int) -> OrtProgram:
        self.made += 1
        return super().program(block, kind, **shape)


class ReachMaker(HostMaker):
    """The graphs of `trt`: attention reads the first part of the caches; `bound` are the lengths asked for."""

    provider = "trt"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self._without_graphs = "each length has a session of its own"
        self.bound: list[int] = []

    def _open(self, block: int, provider: str, kind: str, sizes: Mapping[str, int], *, graphs: bool) -> OrtProgram:
        def of(length: int) -> OrtProgram:
            return super(ReachMaker, self)._open(block, provider, kind, {**sizes, "L": length}, graphs=graphs)

        def bind(addresses: Mapping[str, int], *, kv_length: int | None = None) -> OrtBound:
            if kv_length is None:
                return whole(addresses)
            self.bound.append(kv_length)
            return of(kv_length).bind(addresses)

        program = of(self._bundle.config.patches)
        whole, program.bind = program.bind, bind  # type: ignore[method-assign]
        return program


def open_flow(path: Any, maker: Callable[[Bundle], OrtMaker] = HostMaker) -> tfr.Flow:
    """A bundle on the host's memory."""
    bundle = open_bundle(path)
    return tfr.Flow(bundle, DeviceEngine(bundle, maker(bundle)))


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Let engine `ort-cuda` run on the host's memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_cuda, "open_ort_cuda", lambda bundle, **_: DeviceEngine(bundle, HostMaker(bundle)))
        yield
