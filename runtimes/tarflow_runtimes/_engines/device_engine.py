"""`DeviceEngine`: a bundle on a device, whatever builds its programs: the engine of `ort-cuda`, `trt` and `trt-rtx`.

Inverses stay on the device (`_device/loop.py`). Density and gradient go there and back once per block: per image, not
per step.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._bundle import Bundle, ModelConfig
from tarflow_runtimes._device.device import Device, Program, ProgramMaker
from tarflow_runtimes._device.loop import DeviceDecoder
from tarflow_runtimes._engine import Floats, Integers
from tarflow_runtimes._errors import EngineError, InputError

DTYPES: Final = ("float32", "tf32", "float16", "bfloat16")
"""What linear layers and caches can be computed in on a device; everything else is float32. With tf32 all is stored in
float32, and the GPU may round the factors of products to 11 bits."""

ACTIVATION_BYTES: Final = 2 << 30
"""Activations of one run of a forward or gradient program; larger batches are run in pieces."""

PROGRAM_BYTES: Final = 4 << 30
"""Weights of the forward and gradient programs that are kept together."""


def chosen_dtype(bundle: Bundle, dtype: str | None) -> str:
    """What to compute linear layers in: one of DTYPES, by default what the bundle's are stored in.

    Raises:
        InputError: for another name.
        EngineError: when the bundle's weights have been rounded to something else.
    """
    if dtype is None:
        return bundle.dtype
    if dtype not in DTYPES:
        raise InputError(
            f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", hint="leave it out for the bundle's own"
        )
    if bundle.dtype not in {"float32", dtype}:
        raise EngineError(
            f"bundle {bundle.path.name} is of {bundle.dtype}, it cannot run in {dtype}",
            hint=f"use {bundle.dtype}, or export the checkpoint with --dtype float32",
        )
    return dtype


def density_images(config: ModelConfig) -> int:
    """Images whose activations fit into one run of a forward or gradient program; at least 1."""
    image_bytes = 4 * config.patches * (4 * config.heads * config.patches + 20 * config.width)
    return max(1, ACTIVATION_BYTES // image_bytes)


class _Call:
    """A program with buffers of its own, called with arrays."""

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
    """The programs of `maker` as an `Engine`; `dtype` and everything about the device are the maker's."""

    workers = 1

    def __init__(self, bundle: Bundle, maker: ProgramMaker) -> None:
        self.name = maker.name
        self.device = maker.device
        self.decoder = DeviceDecoder(bundle, maker)
        self._bundle, self.maker = bundle, maker
        self._calls: OrderedDict[tuple[int, str, int], _Call] = OrderedDict()
        self._closed = False
        weights = max(1, *(block.weights.stat().st_size for block in bundle.blocks))
        self._kept = max(2, PROGRAM_BYTES // weights)

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> (z [B, N, D], log|det| [B], nats) of one block."""
        made = self._run(block, "forward", {"patches": patches, "labels": labels})
        return made["z"], made["log_det"]

    def gradient(self, block: int, patches: Floats, cotangent: Floats, labels: Integers | None) -> Floats:
        """Derivative of (cotangent . z + log|det|) of one block with respect to its `patches`, [B, N, D]."""
        arrays = {"patches": patches, "cotangent": cotangent, "labels": labels}
        return self._run(block, "gradient", arrays)["gradient"]

    def vjp_images(self) -> int:
        """0: what the way back needs is not kept."""
        return 0

    def vjp(
        self,
        block: int,
        patches: Floats,
        labels: Integers | None,
        *,
        alone: bool,  # noqa: ARG002 - part of the protocol; calls take turns anyway
    ) -> tuple[Floats, Callable[[Floats], Floats]]:
        """Patches [B, N, D] -> z [B, N, D] and the way back, which computes the forward pass again."""
        z, _ = self.forward(block, patches, labels)
        return z, lambda cotangent: self.gradient(block, patches, cotangent, labels)

    def window(self, block: int, patches: Floats, noise: Floats, labels: Integers | None) -> Floats:
        """One evaluation of finished patches [B, N, D] -> patches 1 .. N-1 in block order, [B, N-1, D]."""
        return self.decoder.window(block, patches, noise, labels)

    def report(self) -> Mapping[str, Any]:
        """Engine, dtype, device and what the maker says of itself."""
        return {
            "engine": self.name,
            "dtype": self.maker.dtype,
            "weights": self.maker.dtype,
            "device": self.device.name,
            **self.maker.report(),
        }

    def close(self) -> None:
        """Let programs and memory go; calls under way end as they would have."""
        with self.device.lock:
            self._closed = True
            self._calls.clear()
        self.decoder.close()
        with self.device.lock, contextlib.suppress(EngineError):  # a device that has failed gives nothing back
            self.device.synchronize()

    def _run(self, block: int, kind: str, arrays: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Run a forward or gradient program on a batch, in pieces of one size; the last piece is filled up."""
        batch = len(arrays["patches"])
        size = min(batch, density_images(self._bundle.config))
        given = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        made: list[dict[str, npt.NDArray[Any]]] = []
        for start in range(0, batch, size):
            rows = np.minimum(np.arange(start, start + size), batch - 1)
            with self.device.lock:
                made.append(self._call(block, kind, size)({name: array[rows] for name, array in given.items()}))
        return {name: np.concatenate([one[name] for one in made])[:batch] for name in made[0]}

    def _call(self, block: int, kind: str, images: int) -> _Call:
        """The program of that kind for so many images; those used longest ago go when many are kept."""
        if self._closed:
            raise EngineError("the engine is closed", hint="load the bundle again")
        key = (block, kind, images)
        if key not in self._calls:
            while len(self._calls) >= self._kept:
                self._calls.popitem(last=False)
            make = self.maker.forward if kind == "forward" else self.maker.gradient
            self._calls[key] = _Call(self.device, make(block, images=images))
        self._calls.move_to_end(key)
        return self._calls[key]
