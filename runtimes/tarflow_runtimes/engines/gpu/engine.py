"""`DeviceEngine`: a bundle on a device, the engine behind `ort-cuda`, `trt` and `trt-rtx`.

Inverses stay on the device (`loop.py`). Density and gradient are transferred to and from the device once per block: per
image, not per step.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.decode.plan import BlockReport
from tarflow_runtimes.decode.turn import Conditions, Floats, Integers, OnTurn, Turn
from tarflow_runtimes.engines.api import Cotangent, vjp_recomputed
from tarflow_runtimes.engines.gpu.array import DeviceArray, to_device, to_host
from tarflow_runtimes.engines.gpu.device import Device, Program, ProgramMaker
from tarflow_runtimes.engines.gpu.loop import DeviceDecoder
from tarflow_runtimes.errors import EngineError

ACTIVATION_BYTES: Final = 2 << 30
"""Activations of one run of a forward or gradient program; larger batches are run in pieces."""

PROGRAM_BYTES: Final = 4 << 30
"""Weights of the forward and gradient programs that are kept together."""


def density_images(config: ModelConfig) -> int:
    """Images whose activations fit into one run of a forward or gradient program; at least 1."""
    image_bytes = 4 * config.patches * (4 * config.heads * config.patches + 20 * config.width)
    return max(1, ACTIVATION_BYTES // image_bytes)


class _Call:
    """A program with its own buffers, called with arrays."""

    def __init__(self, device: Device, program: Program) -> None:
        self._device, self._program = device, program
        specs = {**program.inputs, **program.outputs}
        self._buffers = {name: device.allocate(spec.nbytes) for name, spec in specs.items()}
        self._bound = program.bind({name: buffer.address for name, buffer in self._buffers.items()})

    def __call__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Upload the inputs, launch, download the outputs."""
        for name, spec in self._program.inputs.items():
            self._device.upload(self._buffers[name].address, arrays[name].astype(spec.dtype, copy=False))
        self._bound.launch()
        return {
            name: self._device.download(self._buffers[name].address, spec.shape, spec.dtype)
            for name, spec in self._program.outputs.items()
        }


class DeviceEngine:
    """The programs of `maker` as an `Engine`; everything specific to the device is in the maker."""

    def __init__(self, bundle: Bundle, maker: ProgramMaker) -> None:
        self.name, self.provider, self.precision = maker.name, maker.provider, maker.precision
        self.device, self.maker = maker.device, maker
        self._config = bundle.config
        self._decoder = DeviceDecoder(bundle, maker)
        self._calls: OrderedDict[tuple[int, str, int], _Call] = OrderedDict()
        self._kept = max(2, PROGRAM_BYTES // bundle.block_bytes)
        self._closed = False

    @property
    def to_device(self) -> Callable[[npt.NDArray[Any]], DeviceArray]:
        """Copies an array to the device, for other libraries; it references the device but not this engine."""
        return functools.partial(to_device, self.device)

    def to_host(self, given: object) -> object:
        """Copy an array in the device's memory, from any library, to the host; return anything else unchanged."""
        return to_host(self.device, given)

    def invert(
        self, turns: Sequence[Turn], noise: Floats, conditions: Conditions, on_step: OnTurn | None = None
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """Invert blocks one after another, each from the result of the one before: noise -> patches, and reports."""
        return self._decoder.invert(turns, noise, conditions, on_step)

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> (z [B, N, D], log|det| [B], nats) of one block."""
        made = self._run(block, "forward", {"patches": patches, "labels": labels})
        return made["z"], made["log_det"]

    def vjp(
        self, blocks: Sequence[int], patches: Floats, labels: Integers | None, cotangent: Cotangent
    ) -> tuple[Floats, Floats]:
        """Patches -> (z after these blocks, d/d patches of (c . z + sum of log|det|)) with c = `cotangent`(z)."""
        return vjp_recomputed(self.forward, self._gradient, blocks, patches, labels, cotangent)

    def require_vjp(self) -> None:
        """The device runs it as it runs all the rest."""

    def report(self) -> Mapping[str, Any]:
        """The engine, precision and device, and the report of the maker."""
        return {
            "engine": self.name,
            "weights": self.precision,
            "device": self.device.name,
            **self.maker.report(),
        }

    def close(self) -> None:
        """Free programs and memory; running calls finish normally."""
        with self.device.lock:
            self._closed = True
            self._calls.clear()
        self._decoder.close()
        with self.device.lock, contextlib.suppress(EngineError):  # a failed device frees nothing
            self.device.synchronize()

    def _gradient(self, block: int, patches: Floats, cotangent: Floats, labels: Integers | None) -> Floats:
        """Derivative of (cotangent . z + log|det|) of one block with respect to its `patches`, [B, N, D]."""
        arrays = {"patches": patches, "cotangent": cotangent, "labels": labels}
        return self._run(block, "gradient", arrays)["gradient"]

    def _run(self, block: int, kind: str, arrays: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Run a forward or gradient program on a batch, in pieces of equal size; the last piece is padded."""
        batch = len(arrays["patches"])
        size = min(batch, density_images(self._config))
        given = {name: array for name, array in arrays.items() if array is not None}
        made: list[dict[str, npt.NDArray[Any]]] = []
        for start in range(0, batch, size):
            rows = np.minimum(np.arange(start, start + size), batch - 1)
            with self.device.lock:
                made.append(self._call(block, kind, size)({name: array[rows] for name, array in given.items()}))
        return {name: np.concatenate([one[name] for one in made])[:batch] for name in made[0]}

    def _call(self, block: int, kind: str, images: int) -> _Call:
        """The program of that kind for so many images; the least recently used are freed when many are kept."""
        if self._closed:
            raise EngineError("the engine is closed", hint="load the bundle again")
        key = (block, kind, images)
        if key not in self._calls:
            while len(self._calls) >= self._kept:
                self._calls.popitem(last=False)
            self._calls[key] = _Call(self.device, self.maker.program(block, kind, images=images))
        self._calls.move_to_end(key)
        return self._calls[key]
