"""`FakeCuda`: the part of `cuda.bindings.runtime` that we use, over the host's memory, as asynchronous as the real one.

What is put on the stream happens when somebody waits for it, and not before; while the stream is captured, it goes
into the graph instead. Pageable memory is read only then, too: CUDA may read it when a copy is asked for, or later.
"""

# ruff: noqa: N801, N802, N815 - the names are CUDA's
from __future__ import annotations

import contextlib
import ctypes
import enum
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tarflow_runtimes.engines.gpu.cuda_import import import_cuda


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess
Work = Callable[[], object]


class FakeCuda:
    """One GPU. `calls` are the names of all calls; `fails` maps a name to the status that it answers from now on."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(
        self, *, name: str = "Fake 9000", capability: tuple[int, int] = (9, 0), driver: int = 13000, devices: int = 1
    ) -> None:
        self.name, self.capability, self.driver, self.devices = name, capability, driver, devices
        self.calls: list[str] = []
        self.fails: dict[str, cudaError_t] = {}
        self.memory: dict[int, Any] = {}
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None
        self.graphs: dict[int, list[Work]] = {}
        self.streams: list[int] = []

    def __getattribute__(self, name: str) -> Any:
        """Note every call of CUDA, and let it fail where it is to."""
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def call(*given: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.fails:
                self.captured = None  # a capture ends when anything in it fails
                return (self.fails[name], None)
            answer: tuple[Any, ...] = found(*given)
            return answer

        return call

    def enqueue(self, work: Work) -> tuple[cudaError_t]:
        """Put something on the stream."""
        (self.queue if self.captured is None else self.captured).append(work)
        return (OK,)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return OK, 13040

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return OK, self.devices

    def cudaGetErrorString(self, status: cudaError_t) -> tuple[Any, ...]:
        return OK, f"what {status.name} means".encode()

    def cudaSetDevice(self, ordinal: int) -> tuple[Any, ...]:
        return (OK if ordinal == 0 else cudaError_t.cudaErrorInvalidValue,)

    def cudaGetDeviceProperties(self, ordinal: int) -> tuple[Any, ...]:
        major, minor = self.capability
        return OK, SimpleNamespace(name=self.name.encode() + b"\0\0", major=major, minor=minor)

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:
        memory = ctypes.create_string_buffer(b"\xff" * (nbytes + 256), nbytes + 256)
        address = ctypes.addressof(memory)
        address += -address % 256
        self.memory[address] = memory
        return OK, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        if self.captured is not None:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self.cudaStreamSynchronize(None)
        del self.memory[address]
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaStreamNonBlocking
        self.streams.append(77)
        return OK, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams.remove(int(stream))
        return (OK,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        if self.captured is not None:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        while self.queue:
            self.queue.pop(0)()
        return (OK,)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        return self.cudaStreamSynchronize(77)

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: cudaMemcpyKind, stream: int
    ) -> tuple[Any, ...]:
        assert int(stream) == 77
        return self.enqueue(lambda: ctypes.memmove(target, source, nbytes))

    def cudaMemcpy2DAsync(  # noqa: PLR0917
        self, target: int, tstep: int, source: int, sstep: int, width: int, rows: int, kind: Any, stream: int
    ) -> tuple[Any, ...]:
        assert int(stream) == 77
        assert kind == cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if width > tstep or width > sstep:
            return (cudaError_t.cudaErrorInvalidValue,)
        return self.enqueue(
            lambda: [ctypes.memmove(target + i * tstep, source + i * sstep, width) for i in range(rows)]
        )

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        assert int(stream) == 77
        return self.enqueue(lambda: ctypes.memset(address, value, nbytes))

    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        assert (int(stream), mode) == (77, cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        work, self.captured = self.captured, None
        assert work is not None
        return OK, self._keep(work)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        return OK, self._keep(list(self.graphs[int(graph)]))

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        assert int(stream) == 77
        for work in self.graphs[int(graph)]:
            self.enqueue(work)
        return (OK,)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[int(graph)]
        return (OK,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        return self.cudaGraphDestroy(graph)

    def _keep(self, work: list[Work]) -> int:
        handle = 1 + max(self.graphs, default=1000)
        self.graphs[handle] = work
        return handle


@contextlib.contextmanager
def installed(fake: FakeCuda) -> Iterator[FakeCuda]:
    """Let `fake` be what cuda-python finds on this machine."""
    module = ModuleType("cuda.bindings")
    module.runtime = fake  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", module)
        patch.setitem(sys.modules, "cuda.bindings.runtime", fake)
        import_cuda.cache_clear()
        yield fake
    import_cuda.cache_clear()
