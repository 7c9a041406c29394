"""ONNX Runtime sessions on the CPU and fixed I/O bindings over NumPy's memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.engines.onnxruntime import import_onnxruntime
from tarflow_runtimes.errors import EngineError

ALIGNMENT: Final = 64
"""Bytes; a cache line, and the width of the widest vector load."""


def aligned_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros whose first element starts a cache line."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count].view(dtype).reshape(shape)


@functools.cache
def share_allocator() -> bool:
    """Register one shared arena for all sessions of the process; False when another library has done so.

    Sessions with separate arenas use three times the memory over the blocks of a model.
    """
    ort = import_onnxruntime()
    try:
        memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(memory, None)
    except Exception:  # noqa: BLE001 - ONNX Runtime's own types; the only reason is an allocator that is there already
        return False
    return True


class Session:
    """One graph, ready to run. `folder` contains its external data; errors call it `name`.

    Raises:
        EngineError: when ONNX Runtime refuses the graph.
    """

    def __init__(self, model: bytes, *, name: str, folder: Path, threads: int, spinning: bool = True) -> None:
        ort = import_onnxruntime()
        share_allocator()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self.name = name
        try:
            self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types
            raise _failure(f"cannot open {name} with {folder}", error) from error
        self.inputs: dict[str, str] = {value.name: value.type for value in self.session.get_inputs()}
        self.outputs: list[str] = [value.name for value in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Run once, with new arrays for `outputs`."""
        try:
            return list(self.session.run(list(outputs), dict(feeds)))
        except Exception as error:
            raise _failure(f"failed in {self.name}", error) from error

    def run_values(
        self, values: Mapping[str, Any], outputs: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> dict[str, Any]:
        """Run once on ONNX Runtime's own values and some arrays; returns such values by name, without copies."""
        made = import_onnxruntime().OrtValue.ortvalue_from_numpy
        feeds = {**values, **{name: made(array) for name, array in (arrays or {}).items()}}
        try:
            results = self.session.run_with_ort_values(list(outputs), feeds)
        except Exception as error:
            raise _failure(f"failed in {self.name}", error) from error
        return dict(zip(outputs, results, strict=True))

    def checked(self, output: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Check that an output of a run is float32 of that shape, and return it.

        Raises:
            EngineError: when the dtype or shape differs.
        """
        if array.dtype != np.float32 or array.shape != shape:
            raise EngineError(
                f"{self.name} returned {output} as {array.dtype} {list(array.shape)}, expected float32 {list(shape)}",
                hint="the graph is not this model's: do not use this bundle; fetch it from its source",
            )
        return array


class BoundRun:
    """A session with every input and output bound once to arrays that the caller writes and reads in place.

    An array may be bound as both input and output, as the caches are. The session keeps the arrays alive.
    """

    def __init__(
        self, session: Session, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        binding = session.session.io_binding()
        for name in session.inputs:
            array = inputs[name]
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name in session.outputs:
            array = outputs[name]
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._kept = (session, binding, inputs, outputs)
        # The public wrapper only forwards; a step of a small model is 100 microseconds, so that its cost shows.
        self._run = session.session._sess.run_with_iobinding
        self._binding = binding._iobinding

    def __call__(self) -> None:
        """Run once on the current contents of the arrays."""
        try:
            self._run(self._binding, None)
        except Exception as error:
            raise _failure("failed in a step", error) from error


def _failure(what: str, error: Exception) -> EngineError:
    return EngineError(
        f"ONNX Runtime {what}: {first_line(error)}",
        hint="the graph is damaged, or this ONNX Runtime cannot run it: tarflow doctor says which is installed",
    )


def first_line(error: Exception) -> str:
    """The first line of an error message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
