"""`CudaDevice`: an NVIDIA GPU through cuda-python's runtime API: memory, one stream, graphs captured from it.

Every status is checked. No custom kernels and no other CUDA packages are used.

Source: CUDA Runtime API, memory management, stream management, graph management.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.engines.gpu.cuda_import import checked, import_cuda
from tarflow_runtimes.engines.gpu.device import Transfers

LOCK: Final = threading.RLock()
"""The `lock` of all devices: ONNX Runtime records in CUDA's global mode, in which no other thread may allocate."""

_unused: Final[deque[tuple[Callable[[Any], object], Any]]] = deque()
"""Handles without an owner, and how to free them. Owners may be destroyed in any thread at any time, even while a graph
is recorded, when freeing would invalidate it: `_free_unused` frees the handles later."""


def _free_unused() -> None:
    """Free handles without an owner; the caller has the lock and is not recording."""
    while _unused:
        free, handle = _unused.popleft()
        free(handle)


def _free_with(owner: object, free: Callable[[Any], object], handle: Any) -> None:
    """Free `handle` after `owner` is destroyed; at exit the driver frees everything itself."""
    weakref.finalize(owner, _unused.append, (free, handle)).atexit = False


class CudaBuffer:
    """Memory of the GPU from cudaMalloc, which aligns to at least 256 bytes."""

    def __init__(self, runtime: Any, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(checked(runtime, runtime.cudaMalloc(nbytes)))
        _free_with(self, runtime.cudaFree, self.address)


class CudaReplay:
    """An executable graph; it is launched on the stream that it was captured from."""

    def __init__(self, runtime: Any, graph: Any, stream: Any) -> None:
        self._runtime, self._stream = runtime, stream
        try:
            self._graph = checked(runtime, runtime.cudaGraphInstantiate(graph, 0))
        finally:
            runtime.cudaGraphDestroy(graph)
        _free_with(self, runtime.cudaGraphExecDestroy, self._graph)

    def replay(self) -> None:
        """Launch the graph on its stream."""
        checked(self._runtime, self._runtime.cudaGraphLaunch(self._graph, self._stream))


class CudaDevice:
    """GPU number `ordinal` of those visible to this process.

    Raises:
        EngineError: when cuda-python, the driver or the GPU is missing.
    """

    kind = "cuda"

    def __init__(self, ordinal: int = 0) -> None:
        self._runtime = import_cuda()
        self.ordinal = ordinal
        self.lock = LOCK
        self.transfers = Transfers()
        self._read: list[npt.NDArray[Any]] = []
        self._use()
        properties = self._checked(self._runtime.cudaGetDeviceProperties(ordinal))
        name = properties.name
        self.name = (name.decode() if isinstance(name, bytes) else str(name)).strip("\0 ")
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        self._stream = self._checked(self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking))
        _free_with(self, self._runtime.cudaStreamDestroy, self._stream)

    @property
    def stream(self) -> int:
        """The handle of the stream, for libraries that accept one."""
        return int(self._stream)

    def allocate(self, nbytes: int) -> CudaBuffer:
        """Allocate memory, set to zero."""
        self._use()
        _free_unused()
        buffer = CudaBuffer(self._runtime, nbytes)
        self.zero(buffer.address, nbytes)
        return buffer

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array to the GPU; a copy on the host is kept until the stream has read it."""
        array = np.array(array, order="C")
        self._read.append(array)
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        self.transfers.uploads += 1
        self.transfers.uploaded_bytes += array.nbytes

    def download(self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Copy an array to the host, after all earlier work."""
        array = np.empty(shape, dtype)
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")
        self.synchronize()
        self.transfers.downloads += 1
        self.transfers.downloaded_bytes += array.nbytes
        return array

    def copy(
        self, target: int, source: int, nbytes: int, *, rows: int = 1, target_step: int = 0, source_step: int = 0
    ) -> None:
        """Copy `rows` times `nbytes` within the GPU's memory."""
        if rows == 1:
            self._copy(target, source, nbytes, "cudaMemcpyDeviceToDevice")
            return
        self._use()
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._checked(
            self._runtime.cudaMemcpy2DAsync(target, target_step, source, source_step, nbytes, rows, kind, self._stream)
        )

    def zero(self, address: int, nbytes: int) -> None:
        """Set a range of memory to zero."""
        self._use()
        self._checked(self._runtime.cudaMemsetAsync(address, 0, nbytes, self._stream))

    def capture(self, launch: Callable[[], None]) -> CudaReplay:
        """Record the work that `launch` puts on the stream.

        Other threads may use CUDA meanwhile, but not this device's stream: hold `lock`.
        """
        self._use()
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        collects = gc.isenabled()
        gc.disable()  # a library that frees memory in this thread would end the capture
        try:
            self._checked(runtime.cudaStreamBeginCapture(self._stream, mode))
            try:
                launch()
            except BaseException:
                _, graph = runtime.cudaStreamEndCapture(self._stream)  # its status is a consequence of the error
                if graph is not None and int(graph):
                    runtime.cudaGraphDestroy(graph)
                raise
            graph = self._checked(runtime.cudaStreamEndCapture(self._stream))
        finally:
            if collects:
                gc.enable()
        return CudaReplay(runtime, graph, self._stream)

    def synchronize(self, *, everything: bool = False) -> None:
        """Wait for the stream; with `everything`, for all streams of the process."""
        self._use()
        runtime = self._runtime
        self._checked(runtime.cudaDeviceSynchronize() if everything else runtime.cudaStreamSynchronize(self._stream))
        self._read.clear()
        _free_unused()

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        self._use()
        direction = getattr(self._runtime.cudaMemcpyKind, kind)
        self._checked(self._runtime.cudaMemcpyAsync(target, source, nbytes, direction, self._stream))

    def _use(self) -> None:
        """Make this GPU the calling thread's."""
        self._checked(self._runtime.cudaSetDevice(self.ordinal))

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        return checked(self._runtime, answer)
