"""`DeviceArray`: an array in a device's memory that PyTorch, CuPy, JAX or NumPy can use without a copy.

Source: DLPack 0.8, `dlpack.h` and its Python specification; the CUDA array interface, version 3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.engines.gpu.device import Buffer, Device
from tarflow_runtimes.errors import InputError

DEVICE_TYPES: Final = {"cpu": 1, "cuda": 2}
"""DLDeviceType by kind of device."""
KINDS: Final = {"i": 0, "u": 1, "f": 2}
"""DLDataTypeCode by NumPy's kind of dtype."""
CAPSULE: Final = b"dltensor"
"""The name of an unconsumed capsule; the consumer renames it, and calls the deleter."""


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


# Separate prototypes, because the functions of ctypes.pythonapi are shared by the whole process.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_DLManagedTensor._fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_given: dict[int, tuple[object, ...]] = {}
"""The objects that must live until the deleter of a managed tensor is called, by the tensor's address."""


def _delete(managed: Any) -> None:
    """Called by the consumer of a capsule when it is done."""
    _given.pop(ctypes.addressof(managed.contents), None)


def _destroy(capsule: int) -> None:
    """Called when a capsule is destroyed; frees its contents if it was never consumed."""
    if _is_valid(capsule, CAPSULE):
        _given.pop(_get_pointer(capsule, CAPSULE), None)


_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_deleter, _destructor = _Deleter(_delete), _Destructor(_destroy)  # as C calls them; they live as long as the module


class DeviceArray:
    """An array [...] in row-major order. Its memory lives as long as this object or any array made from it.

    >>> torch.from_dlpack(sample.images_device)  # doctest: +SKIP
    """

    def __init__(self, device: Device, buffer: Buffer, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._device, self._buffer = device, buffer

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {list(self.shape)} on {self._device.name}>"

    def numpy(self) -> npt.NDArray[Any]:
        """Copy the array to the host."""
        with self._device.lock:
            return self._device.download(self._buffer.address, self.shape, self.dtype)

    def __getattr__(self, name: str) -> Any:
        """Provide `__cuda_array_interface__` for arrays on a GPU only."""
        if name != "__cuda_array_interface__" or self._device.kind != "cuda":
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        with self._device.lock:
            self._device.synchronize()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._buffer.address, False),
            "strides": None,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Kind and number of the device."""
        return DEVICE_TYPES[self._device.kind], self._device.ordinal

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """A DLPack capsule over this memory; all work on it is complete, so that any stream may use it.

        Raises:
            BufferError: when a copy or another device is requested.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("this array is given where it lies, without a copy")
        with self._device.lock:
            self._device.synchronize()
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        managed = _DLManagedTensor()
        managed.tensor = _DLTensor(
            data=self._buffer.address,
            device_type=DEVICE_TYPES[self._device.kind],
            device_id=self._device.ordinal,
            ndim=len(self.shape),
            code=KINDS[self.dtype.kind],
            bits=8 * self.dtype.itemsize,
            lanes=1,
            shape=shape,
        )
        managed.deleter = _deleter
        address = ctypes.addressof(managed)
        _given[address] = (managed, shape, self._buffer)
        return _new_capsule(address, CAPSULE, _destructor)


class OnGpu(Protocol):
    """An array on a GPU: a PyTorch tensor, a CuPy array, a `DeviceArray`."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        """The CUDA array interface, version 3."""


def to_host(device: Device, given: object) -> object:
    """Copy an array in the device's memory, from any library, to the host; return anything else unchanged.

    Raises:
        InputError: for an array whose elements do not lie in row-major order.
    """
    if isinstance(given, DeviceArray):
        return given.numpy()
    if device.kind != "cuda" or not hasattr(given, "__cuda_array_interface__"):
        return given
    interface = given.__cuda_array_interface__
    shape, dtype, strides = tuple(interface["shape"]), np.dtype(interface["typestr"]), interface.get("strides")
    if strides is not None and tuple(strides) != np.empty(shape, dtype).strides:
        raise InputError(f"an array on the GPU must be contiguous, got strides {tuple(strides)}", hint=".contiguous()")
    with device.lock:
        device.synchronize(everything=True)  # it may have been made on another library's stream
        return device.download(interface["data"][0], shape, dtype)


def to_device(device: Device, array: npt.NDArray[Any]) -> DeviceArray:
    """Copy an array to the device."""
    with device.lock:
        buffer = device.allocate(array.nbytes)
        device.upload(buffer.address, array)
    return DeviceArray(device, buffer, array.shape, array.dtype)
