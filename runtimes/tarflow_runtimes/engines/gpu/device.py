"""What a device is: `Device` holds memory, `Program` is a graph built for it. The loop knows these two and no more.

Work is asynchronous and runs in the order in which it was asked for (CUDA: on one stream). An address is a number; a
`Buffer` owns what lies there. One thread at a time asks: whoever uses a device holds its `lock` meanwhile.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

ALIGNMENT: Final = 256
"""Bytes; where buffers, and the parts of one, start is a multiple."""


class Buffer(Protocol):
    """Memory of a device, zeroed when it was allocated; freed when the last reference to the object goes."""

    @property
    def address(self) -> int:
        """Where it starts, in the device's address space."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


@dataclasses.dataclass(slots=True)
class Transfers:
    """Copies between host and device that were made through a `Device`, and their bytes."""

    uploads: int = 0
    downloads: int = 0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0


class Replay(Protocol):
    """Recorded launches."""

    def replay(self) -> None:
        """Launch them again, on the addresses of their recording; asynchronous."""


class Device(Protocol):
    """Memory of a processor, and the order of what is done with it.

    Raises:
        EngineError: from any method, with the name of the status, when the device refuses.
    """

    name: str
    """As the device calls itself."""
    kind: str
    """`cpu` or `cuda`."""
    ordinal: int
    """Its number among those of its kind."""
    lock: threading.RLock
    transfers: Transfers

    def allocate(self, nbytes: int) -> Buffer:
        """Zeroed memory that starts at a multiple of ALIGNMENT."""

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array to the device; the caller may change it afterwards. Counted."""

    def download(self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Wait for all work before, and copy an array to the host. Counted."""

    def copy(
        self, target: int, source: int, nbytes: int, *, rows: int = 1, target_step: int = 0, source_step: int = 0
    ) -> None:
        """Copy `rows` times `nbytes` within the device; from one row to the next the addresses grow by the steps."""

    def zero(self, address: int, nbytes: int) -> None:
        """Set memory to zero."""

    def capture(self, launch: Callable[[], None]) -> Replay:
        """Record what `launch` asks the device for, without running it."""

    def synchronize(self, *, everything: bool = False) -> None:
        """Wait for all work asked for so far; with `everything`, also for that of others in this process."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of an input or output; `kv_length`, whose length is free, is given its longest."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class Bound(Protocol):
    """A program with every input and output at an address, which the caller keeps alive."""

    def launch(self) -> None:
        """Run the graph once on what lies there; asynchronous."""


class Program(Protocol):
    """One graph of one block, built for a device and for fixed shapes.

    Raises:
        EngineError: from any method or launch, when the runtime refuses.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """By name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """By name."""

    def bind(self, addresses: Mapping[str, int], *, kv_length: int | None = None) -> Bound:
        """Give every input and output an address; an output that is an input updated in place has the input's.

        `kv_length` is the length of the input of that name in this binding, where there is one.
        """

    def record(self, launches: Sequence[Bound]) -> Replay:
        """Make a graph of some launches of this program, to be replayed as one where its runtime can."""


class ProgramMaker(Protocol):
    """Builds the programs of a bundle for its device: all in which one device engine differs from another.

    Methods may take long at first (a build) and are called by one thread at a time.

    Raises:
        EngineError: from any method, when a graph cannot be built.
    """

    name: str
    """The engine's name."""
    provider: str
    """The provider whose run-ready graphs it builds, as in the bundle."""
    precision: str
    """What linear layers and caches are computed in: the bundle's precision, or tf32."""
    device: Device

    def program(self, block: int, kind: str, *, images: int, branches: int = 1, window: int = 1) -> Program:
        """A graph of a block for B images: `step`, or `window` with S patches at once; `forward` or `gradient`.

        G branches are of the first two. What graphs take and yield is in docs/BUNDLE.md.
        """

    def report(self) -> Mapping[str, Any]:
        """What builds and runs the graphs: versions, libraries and files. JSON values."""
