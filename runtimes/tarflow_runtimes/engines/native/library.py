"""`Library`: the C ABI of the native kernel, `tarflow_native.h`, through ctypes and NumPy."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.decode.turn import Doubles, Floats, Integers
from tarflow_runtimes.doctor.requirements import NATIVE_BUILD, native_library
from tarflow_runtimes.errors import EngineError

ABI: Final = 3
"""TARFLOW_NATIVE_ABI of the header that the structures here follow."""

ALIGNMENT: Final = 64
"""Packed weights and workspaces begin at multiples of this many bytes."""

CANCELLED: Final = 1
"""The status of a call that was cancelled by its `cancel` flag."""


class NativeError(EngineError):
    """A call that returned a status other than 0; `culprit` names the tensor at fault."""

    def __init__(self, status: int, message: str, culprit: str | None = None) -> None:
        super().__init__(f"the native kernel: {message}{f': {culprit}' if culprit else ''}")
        self.status, self.culprit = status, culprit


class Shape(ctypes.Structure):
    """The C struct `tarflow_native_shape`."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("patches", "values", "width", "layers", "head_dim", "classes", "nvp")
    ]


class Tensor(ctypes.Structure):
    """The C struct `tarflow_native_tensor`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int64),
        ("offset", ctypes.c_int64),
    ]


class Run(ctypes.Structure):
    """The C struct `tarflow_native_run`."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("packed", ctypes.c_void_p),
        ("packed_bytes", ctypes.c_size_t),
        ("batch", ctypes.c_int64),
        ("branches", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("kernel", ctypes.c_char_p),
        ("noise", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("guidance", ctypes.c_void_p),
        ("inverse_temperature", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("cancel", ctypes.c_void_p),
        ("progress", ctypes.c_void_p),
    ]


class Pass(ctypes.Structure):
    """`tarflow_native_pass`: the fields of one forward pass."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("packed", ctypes.c_void_p),
        ("packed_bytes", ctypes.c_size_t),
        ("batch", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("kernel", ctypes.c_char_p),
        ("x", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("log_det", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("cancel", ctypes.c_void_p),
        ("progress", ctypes.c_void_p),
    ]


def aligned_bytes(count: int) -> npt.NDArray[np.uint8]:
    """Memory that begins at a multiple of ALIGNMENT."""
    room = np.empty(count + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + count]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """The packed weights of a block."""

    shape: Shape
    packed: npt.NDArray[np.uint8]


@dataclasses.dataclass(eq=False)
class Watch:
    """State shared with other threads during a call."""

    cancel: npt.NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.zeros(1, np.int32))
    progress: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(1, np.int64))


def shape_of(config: ModelConfig) -> Shape:
    """The shape of a block of a model with this configuration."""
    return Shape(
        config.patches, config.patch_values, config.width, config.layers, config.head_dim, config.classes, config.nvp
    )


class Library:
    """The functions of tarflow_native.h.

    Raises:
        OSError: when the file is no library, or another machine's.
        EngineError: when it was built from other sources.
    """

    def __init__(self, path: Path) -> None:
        self._library = library = ctypes.CDLL(str(path))
        self.abi: int = library.tarflow_native_abi()
        if self.abi != ABI:
            raise EngineError(f"{path} has ABI {self.abi}, this package needs {ABI}", hint=NATIVE_BUILD)
        library.tarflow_native_kernel.restype = library.tarflow_native_message.restype = ctypes.c_char_p
        library.tarflow_native_kernel.argtypes = [ctypes.c_int64]
        library.tarflow_native_packed_bytes.restype = library.tarflow_native_workspace_bytes.restype = ctypes.c_size_t
        library.tarflow_native_forward_bytes.restype = ctypes.c_size_t
        library.tarflow_native_workspace_bytes.argtypes = [ctypes.POINTER(Shape), *[ctypes.c_int64] * 3]
        library.tarflow_native_forward_bytes.argtypes = [ctypes.POINTER(Shape), *[ctypes.c_int64] * 2]
        self._rooms: list[npt.NDArray[np.uint8]] = []  # workspaces of earlier calls; append and pop are atomic

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that run on this machine, fastest first."""
        names: list[str] = []
        while (name := self._library.tarflow_native_kernel(len(names))) is not None:
            names.append(name.decode())
        return tuple(names)

    def packed_bytes(self, shape: Shape, precision: str) -> int:
        """Size in bytes of a packed block; 0 if it cannot be packed."""
        return int(self._library.tarflow_native_packed_bytes(ctypes.byref(shape), precision.encode()))

    def workspace_bytes(self, shape: Shape, batch: int, branches: int, threads: int) -> int:
        """Size in bytes of the workspace; 0 if an argument is out of range."""
        return int(self._library.tarflow_native_workspace_bytes(ctypes.byref(shape), batch, branches, threads))

    def forward_bytes(self, shape: Shape, batch: int, threads: int) -> int:
        """The workspace of the forward pass; 0 for what is out of range."""
        return int(self._library.tarflow_native_forward_bytes(ctypes.byref(shape), batch, threads))

    def pack(self, bundle: Bundle, block: int) -> Block:
        """Pack a block of an opened bundle."""
        table = {name: (tensor.dtype, tensor.shape, tensor.offset) for name, tensor in bundle.tensors.items()}
        weights = np.memmap(bundle.blocks[block].weights, np.uint8, "r")
        return self.pack_tensors(shape_of(bundle.config), bundle.precision, table, weights)

    def pack_tensors(
        self,
        shape: Shape,
        precision: str,
        table: Mapping[str, tuple[str, Sequence[int], int]],
        weights: npt.NDArray[np.uint8],
        room: npt.NDArray[np.uint8] | None = None,
    ) -> Block:
        """Name -> (dtype, shape, offset) of the tensors in `weights`."""
        axes = [(ctypes.c_int64 * len(entry[1]))(*entry[1]) for entry in table.values()]
        tensors = (Tensor * len(table))(
            *(
                Tensor(name.encode(), dtype.encode(), own, len(own), offset)
                for own, (name, (dtype, _, offset)) in zip(axes, table.items(), strict=True)
            )
        )
        packed = aligned_bytes(self.packed_bytes(shape, precision)) if room is None else room
        culprit = ctypes.c_char_p()
        status = self._library.tarflow_native_pack(
            ctypes.byref(shape),
            precision.encode(),
            tensors,
            ctypes.c_int64(len(table)),
            ctypes.c_void_p(weights.ctypes.data),
            ctypes.c_size_t(weights.nbytes),
            ctypes.c_void_p(packed.ctypes.data),
            ctypes.c_size_t(packed.nbytes),
            ctypes.byref(culprit),
        )
        self._check(status, culprit.value.decode() if culprit.value else None)
        return Block(shape, packed)

    def invert(
        self,
        block: Block,
        noise: Floats,
        *,
        labels: Integers | None = None,
        guidance: Floats | None = None,
        inverse_temperature: Floats | None = None,
        branches: int = 1,
        steps: int | None = None,
        threads: int = 1,
        kernel: str | None = None,
        watch: Watch | None = None,
        out: Floats | None = None,
        planted: Mapping[str, Any] | None = None,
    ) -> Floats:
        """Noise [B, N, D] -> patches, in block order; `planted` are fields of `Run` that a test makes wrong."""
        noise = np.ascontiguousarray(noise, np.float32)
        x = np.empty_like(noise) if out is None else out
        batch, patches, _ = noise.shape
        room = self._room(self.workspace_bytes(block.shape, batch, branches, threads))
        kept = [  # alive during the call
            None if array is None else np.ascontiguousarray(array, dtype)
            for array, dtype in ((labels, np.int64), (guidance, np.float32), (inverse_temperature, np.float32))
        ]
        run = Run(
            struct_size=ctypes.sizeof(Run),
            packed=block.packed.ctypes.data,
            packed_bytes=block.packed.nbytes,
            batch=batch,
            branches=branches,
            steps=patches - 1 if steps is None else steps,
            threads=threads,
            kernel=None if kernel is None else kernel.encode(),
            noise=noise.ctypes.data,
            x=x.ctypes.data,
            labels=None if kept[0] is None else kept[0].ctypes.data,
            guidance=None if kept[1] is None else kept[1].ctypes.data,
            inverse_temperature=None if kept[2] is None else kept[2].ctypes.data,
            workspace=room.ctypes.data,
            workspace_bytes=room.nbytes,
            cancel=None if watch is None else watch.cancel.ctypes.data,
            progress=None if watch is None else watch.progress.ctypes.data,
        )
        for name, value in (planted or {}).items():
            setattr(run, name, value)
        status = self._library.tarflow_native_invert(ctypes.byref(run))
        self._rooms.append(room)
        self._check(status)
        return x

    def forward(
        self,
        block: Block,
        patches: Floats,
        *,
        labels: Integers | None = None,
        threads: int = 1,
        kernel: str | None = None,
        watch: Watch | None = None,
        planted: Mapping[str, Any] | None = None,
    ) -> tuple[Floats, Doubles]:
        """Patches [B, N, D], labels [B] -> (z [B, N, D], log|det| [B], nats), in block order; `planted` as above."""
        x = np.ascontiguousarray(patches, np.float32)
        z, log_det = np.empty_like(x), np.empty(len(x))
        own_labels = None if labels is None else np.ascontiguousarray(labels, np.int64)
        room = self._room(self.forward_bytes(block.shape, len(x), threads))
        given = Pass(
            struct_size=ctypes.sizeof(Pass),
            packed=block.packed.ctypes.data,
            packed_bytes=block.packed.nbytes,
            batch=len(x),
            threads=threads,
            kernel=None if kernel is None else kernel.encode(),
            x=x.ctypes.data,
            z=z.ctypes.data,
            log_det=log_det.ctypes.data,
            labels=None if own_labels is None else own_labels.ctypes.data,
            workspace=room.ctypes.data,
            workspace_bytes=room.nbytes,
            cancel=None if watch is None else watch.cancel.ctypes.data,
            progress=None if watch is None else watch.progress.ctypes.data,
        )
        for name, value in (planted or {}).items():
            setattr(given, name, value)
        status = self._library.tarflow_native_forward(ctypes.byref(given))
        self._rooms.append(room)
        self._check(status)
        return z, log_det

    def _room(self, needed: int) -> npt.NDArray[np.uint8]:
        """A workspace: an earlier call's where it is large enough."""
        try:
            room = self._rooms.pop()
        except IndexError:
            return aligned_bytes(needed)
        return room if room.nbytes >= needed else aligned_bytes(needed)

    def _check(self, status: int, culprit: str | None = None) -> None:
        if status:
            raise NativeError(status, self._library.tarflow_native_message(status).decode(), culprit)


@functools.cache
def open_library() -> Library:
    """The library built into the package, or the one given by TARFLOW_NATIVE_LIBRARY.

    Raises:
        EngineError: when there is none, it does not load, or it was built from other sources.
    """
    path = native_library()
    if path is None:
        raise EngineError("engine native needs its library, which was not built", hint=NATIVE_BUILD)
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        raise EngineError(f"the native kernel does not load from {path}: {error}", hint=NATIVE_BUILD) from error
