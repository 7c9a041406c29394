"""`Device` holds memory, `Program` is a graph built for a device. The decode loop uses only these two interfaces.

Work is asynchronous and runs in the order in which it was submitted (CUDA: on one stream). An address is a number; a
`Buffer` owns the memory there. One thread at a time uses a device, and holds its `lock` meanwhile.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

ALIGNMENT: Final = 256
"""Buffers, and the parts of a buffer, start at multiples of this many bytes."""


class Buffer(Protocol):
    """Memory of a device, initialised to zero; freed when the last reference to the object is gone."""

    @property
    def address(self) -> int:
        """The start address in the device's address space."""

    @property
    def nbytes(self) -> int:
        """The size in bytes."""


@dataclasses.dataclass(slots=True)
class Transfers:
    """The number of copies between host and device made through a `Device`, and their bytes."""

    uploads: int = 0
    downloads: int = 0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0


class Replay(Protocol):
    """A recording of several launches."""

    def replay(self) -> None:
        """Replay the launches on the recorded addresses; asynchronous."""


class Device(Protocol):
    """The memory of a processor, and an ordered queue of work.

    Raises:
        EngineError: from any method, with the name of the status, when the device refuses.
    """

    name: str
    """The name reported by the device."""
    kind: str
    """`cpu` or `cuda`."""
    ordinal: int
    """The number of the device among those of its kind."""
    lock: threading.RLock
    transfers: Transfers

    def allocate(self, nbytes: int) -> Buffer:
        """Allocate memory at a multiple of ALIGNMENT, set to zero."""

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array to the device; the caller may change it afterwards. Counted."""

    def download(self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Wait for all earlier work, and copy an array to the host. Counted."""

    def copy(
        self, target: int, source: int, nbytes: int, *, rows: int = 1, target_step: int = 0, source_step: int = 0
    ) -> None:
        """Copy `rows` times `nbytes` within the device; from one row to the next the addresses grow by the steps."""

    def zero(self, address: int, nbytes: int) -> None:
        """Set a range of memory to zero."""

    def capture(self, launch: Callable[[], None]) -> Replay:
        """Record the work that `launch` submits, without running it."""

    def synchronize(self, *, everything: bool = False) -> None:
        """Wait for all work submitted so far; with `everything`, also for that of other libraries in this process."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of an input or output; for `kv_length`, whose length varies, the longest."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Bound(Protocol):
    """A program with an address for every input and output; the caller keeps the memory alive."""

    def launch(self) -> None:
        """Run the graph once on the bound memory; asynchronous."""


class Program(Protocol):
    """One graph of one block, built for a device and for fixed shapes.

    Raises:
        EngineError: from any method or launch, when the runtime refuses.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The inputs by name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The outputs by name."""

    def bind(self, addresses: Mapping[str, int], *, kv_length: int | None = None) -> Bound:
        """Bind every input and output to an address; an output that updates an input in place has the input's address.

        `kv_length` is the length of the input of that name in this binding, where there is one.
        """

    def record(self, launches: Sequence[Bound]) -> Replay:
        """Record several launches of this program, to be replayed as one graph if the runtime supports it."""


class ProgramMaker(Protocol):
    """Builds the programs of a bundle for its device; it contains everything in which device engines differ.

    Methods may take long at first (a build) and are called by one thread at a time.

    Raises:
        EngineError: from any method, when a graph cannot be built.
    """

    name: str
    """The engine's name."""
    provider: str
    """The provider whose run-ready graphs it builds, as in the bundle."""
    precision: str
    """The precision of linear layers and caches: that of the bundle, or tf32."""
    device: Device

    def program(self, block: int, kind: str, *, images: int, branches: int = 1, window: int = 1) -> Program:
        """A graph of a block for B images: `step`, or `window` with S patches at once; `forward` or `gradient`.

        G branches are of the first two. What graphs take and yield is in docs/BUNDLE.md.
        """

    def report(self) -> Mapping[str, Any]:
        """Versions, libraries and files of the software that builds and runs the graphs, as JSON values."""
