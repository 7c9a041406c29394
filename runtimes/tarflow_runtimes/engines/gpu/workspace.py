"""`Workspace`: everything on the device that belongs to one run of B images: state, caches, bindings, recordings.

The blocks of a model take turns in the same memory. A workspace goes from one run to the next of its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.engines.gpu.device import ALIGNMENT, Bound, Buffer, Device, Program, Replay
from tarflow_runtimes.errors import EngineError

STATE = ("window", "position", "calls", "residual")
"""What a launch reads in one place and writes in another: the bindings alternate between two."""

IN_PLACE = ("finished", "key_", "value_")
"""How the names of the inputs begin that a launch updates where they are."""

RUN_TO_RUN: Final = 4.0
"""Times that a recording may differ from launches as much as these differ from themselves, which for most kernels is
not at all. Only those that add in no fixed order do."""


class Workspace:
    """Buffers of one run by name, made when first asked for.

    `noise` and `finished` [B, N, D], `guidance`, `labels`, `inverse_temperature`, `tolerance`, `kv_positions`, the
    caches, and two copies of the state: `window_S` [B, S + 1, D] for each S, and `status`: position, calls [B] int64,
    residual [B].
    """

    def __init__(self, device: Device, images: int) -> None:
        self.device = device
        self.images = images
        self._buffers: dict[str, Buffer] = {}
        self._bound: dict[tuple[int, int, int, int], Bound] = {}
        self._recorded: dict[tuple[int, int, int, int], Replay] = {}
        self._checked: set[tuple[int, int]] = set()
        self._span = -(-8 * images // ALIGNMENT) * ALIGNMENT

    def address(self, name: str, nbytes: int) -> int:
        """Where that buffer starts; it must always be asked for with the same size."""
        if name not in self._buffers:
            self._buffers[name] = self.device.allocate(nbytes)
        return self._buffers[name].address

    def clear_caches(self) -> None:
        """Zero the attention caches: what is masked is multiplied by zero, and zero times a stray NaN is NaN."""
        for name, buffer in self._buffers.items():
            if name.startswith(("key_", "value_")):
                self.device.zero(buffer.address, buffer.nbytes)

    def status(self, parity: int) -> tuple[int, int]:
        """Address and bytes of position, calls and residual of one copy of the state."""
        return self.address(f"status_{parity}", 3 * self._span), 3 * self._span

    def look(self, parity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position [B], calls [B] and residual [B] of one copy of the state: one download, after all work before."""
        address, nbytes = self.status(parity)
        position, calls, residual = self.device.download(address, (nbytes,), np.uint8).reshape(3, -1)
        end = 8 * self.images
        return position[:end].view(np.int64), calls[:end].view(np.int64), residual[: end // 2].view(np.float32)

    def bound(self, program: Program, block: int, size: int, kv_length: int, parity: int) -> Bound:
        """The program of that block for windows of `size`, from state `parity` to the other."""
        key = (block, size, kv_length, parity)
        if key not in self._bound:
            addresses = {name: self._place(name, spec.nbytes, size, parity) for name, spec in program.inputs.items()}
            for name, spec in program.outputs.items():
                addresses[name] = self._place(name.removeprefix("next_"), spec.nbytes, size, 1 - parity)
            self._bound[key] = program.bind(
                addresses, kv_length=kv_length if "kv_positions" in program.inputs else None
            )
        return self._bound[key]

    def recorded(self, program: Program, block: int, size: int, kv_length: int, steps: int) -> Replay:
        """`steps` launches from state 0 to state 0, recorded when first asked for, and then compared with launches."""
        key = (block, size, kv_length, steps)
        if key not in self._recorded:
            launches = [self.bound(program, block, size, kv_length, step % 2) for step in range(steps)]
            restore = self._keep(size)
            for launch in launches[:2]:  # what a runtime sets up at the first run of a binding must not be recorded
                launch.launch()
            restore()
            replay = program.record(launches)
            if (block, size) not in self._checked:
                self._check(launches, replay, block, size)
                self._checked.add((block, size))
            self._recorded[key] = replay
        return self._recorded[key]

    def _place(self, name: str, nbytes: int, size: int, parity: int) -> int:
        """The address of an input; of an output, that of the input which it is next time."""
        if name == "window":
            return self.address(f"window_{size}_{parity}", nbytes)
        if name in STATE:
            return self.status(parity)[0] + (STATE.index(name) - 1) * self._span
        return self.address(name, nbytes)

    def _keep(self, size: int) -> Callable[[], None]:
        """Copy aside what launches from state 0 change; the function that is returned puts it back.

        The caches are left: what a launch writes there is written again before it is read.
        """
        changed = [self._buffers[name] for name in (f"window_{size}_0", "status_0", "finished")]
        kept = [self.device.allocate(buffer.nbytes) for buffer in changed]
        for buffer, copy in zip(changed, kept, strict=True):
            self.device.copy(copy.address, buffer.address, buffer.nbytes)

        def restore() -> None:
            for buffer, copy in zip(changed, kept, strict=True):
                self.device.copy(buffer.address, copy.address, buffer.nbytes)

        return restore

    def _check(self, launches: list[Bound], replay: Replay, block: int, size: int) -> None:
        """Compare a recording with the launches that it is of; the state is left as it was.

        That is the start of a block, where no cache entry is needed yet. They are cleared in between, because what an
        image that overflows leaves there would not be masked.

        Raises:
            EngineError: when they differ.
        """
        restore = self._keep(size)

        def outcome(run: Callable[[], None]) -> npt.NDArray[np.float64]:
            run()
            buffers = [self._buffers[name] for name in (f"window_{size}_0", "finished")]
            patches = [self.device.download(one.address, (one.nbytes // 4,), np.float32) for one in buffers]
            found = np.concatenate([*self.look(0), *patches], dtype=np.float64)
            restore()
            self.clear_caches()
            return found

        def launch_all() -> None:
            for launch in launches:
                launch.launch()

        eager, again, recorded = outcome(launch_all), outcome(launch_all), outcome(replay.replay)
        if _distance(eager, recorded) > RUN_TO_RUN * _distance(eager, again):
            raise EngineError(
                f"{len(launches)} recorded steps of block {block} give other values than the same steps one by one"
                f" on {self.device.name}",
                hint="update the driver and the engine's package; until then use another engine",
            )


def _distance(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """The largest difference; infinite where one is finite and the other is not, 0 where both are the same."""
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(one - other))
    return float(np.where(np.isnan(difference), np.inf, difference).max())
