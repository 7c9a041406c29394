"""`WeightsFile`: the tensors of a rewritten graph in a file beside it, written one after the other.

A graph may hold more than the 2 GB that a protocol buffer can, and one tensor at a time is all that need be in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy.typing as npt

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._errors import EngineError

FILE: Final = "weights.bin"
"""The name of the file, in the folder that a rewrite was given."""

ALIGNMENT: Final = 64
"""Bytes; where a tensor starts is a multiple."""


class WeightsFile:
    """The file while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def put(self, name: str, array: npt.NDArray[Any], data_type: int) -> Any:
        """Write an array, C-contiguous, to the end of the file; returns the initializer that lies there."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        place = {"location": FILE, "offset": str(self._file.tell()), "length": str(array.nbytes)}
        self._file.write(array.data)
        tensor = proto.messages()["TensorProto"](name=name, dims=array.shape, data_type=data_type)
        tensor.data_location = proto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        return tensor


@contextlib.contextmanager
def weights_file(folder: Path) -> Iterator[WeightsFile]:
    """Write the file FILE in `folder`.

    Raises:
        EngineError: when it cannot be written.
    """
    try:
        with (folder / FILE).open("wb") as file:
            yield WeightsFile(file)
    except OSError as error:
        raise EngineError(f"cannot write {folder / FILE}: {error.strerror}") from error
