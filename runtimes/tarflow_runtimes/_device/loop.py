"""`DeviceDecoder`: the sampler's loop for an engine with memory of its own. Nothing crosses between the steps.

A graph's outputs are its inputs' next values (`_rewrites/advance.py`), so that the host only launches: the state of the
images, positions among it, alternates between two places, and everything large is updated where it is. Latents go to
the device once and images come back once. Sequential blocks need no look at the device; parallel ones look at the
positions after every LOOK launches.

Attention reads the first `reach` cache entries; the host knows a bound of the positions and raises it in eighths of N.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._device.array import DeviceArray, to_device, to_host
from tarflow_runtimes._device.device import Device, Program, ProgramMaker
from tarflow_runtimes._device.workspace import Workspace
from tarflow_runtimes._engine import Floats, Integers, OnTurn, Turn
from tarflow_runtimes._errors import EngineError
from tarflow_runtimes._plan import BlockReport, Parallel, Sequential

GROUP: Final = 16
"""Sequential steps that are recorded together; progress and cancellation come between groups."""

LOOK: Final = 4
"""Launches of a parallel block between two looks at the positions."""

REACHES: Final = 8
"""Lengths of cache that attention may read: multiples of N / 8. Each has its own recordings."""

SHAPES: Final = 2
"""Shapes (images, branches) whose programs and memory are kept."""


@dataclasses.dataclass(slots=True)
class _Shape:
    """What is kept for runs of one shape: programs by block and window, and workspaces that nobody uses now."""

    programs: dict[tuple[int, int], Program] = dataclasses.field(default_factory=dict)
    idle: list[Workspace] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One run: its shape and workspace, and what it is told of progress."""

    shape: _Shape
    workspace: Workspace
    images: int
    branches: int


class DeviceDecoder:
    """Inverts blocks on the device of `maker`. Any number of threads may use it; their groups of steps take turns."""

    def __init__(self, bundle: Bundle, maker: ProgramMaker) -> None:
        self._bundle, self._config, self._maker = bundle, bundle.config, maker
        self._device: Device = maker.device
        self._lock = threading.Lock()
        self._shapes: OrderedDict[tuple[int, int], _Shape] = OrderedDict()
        self._closed = False

    def decode(
        self,
        turns: Sequence[Turn],
        *,
        noise: Floats,
        labels: Integers | None,
        guidance: Floats,
        inverse_temperature: Floats,
        on_step: OnTurn | None = None,
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """Invert some blocks, each from what the one before yields: noise [B, N, D], labels [G, B] -> x [B, N, D].

        `on_step(turn, done)` hears how many steps of a turn are done; an error that it raises ends the run.

        Raises:
            EngineError: when the device or a program fails; the decoder stays usable.
        """
        with self._job(len(noise), len(inverse_temperature)) as job:
            self._begin(job, noise, labels, guidance, inverse_temperature)
            reports = []
            for number, turn in enumerate(turns):

                def on_done(done: int, number: int = number) -> None:
                    if on_step is not None:
                        with self._device.lock:
                            self._device.synchronize()  # else it would hear of steps that are only asked for
                        on_step(number, done)

                reports.append(self._invert(job, turn, on_done))
            with self._device.lock:
                shape = noise.shape
                x = self._device.download(job.workspace.address("finished", noise.nbytes), shape, np.float32)
        return x, tuple(reports)

    def window(self, block: int, patches: Floats, noise: Floats, labels: Integers | None) -> Floats:
        """One evaluation of finished patches [B, N, D] at once -> patches 1 .. N-1 in block order, [B, N-1, D].

        With tolerance 0 a launch keeps a patch only where the evaluation yields the same.
        """
        count, size = len(patches), self._config.patches - 1
        with self._job(count, 1) as job, self._device.lock:
            branch_labels = None if labels is None else labels[None]
            guidance = np.zeros((2, self._config.patches), np.float32)
            self._begin(job, noise, branch_labels, guidance, np.ones(1, np.float32))
            workspace, program = job.workspace, self._program(job, block, size)
            self._tell(workspace, "tolerance", np.zeros(1, np.float32))
            ordered = patches[:, ::-1] if self._is_reversed(block) else patches
            self._start(job, block, Parallel())
            bound = workspace.bound(program, block, size, self._config.patches, 0)
            self._device.upload(workspace.address(f"window_{size}_0", patches.nbytes), ordered)
            bound.launch()
            address = workspace.address(f"window_{size}_1", patches.nbytes)
            return self._device.download(address, patches.shape, np.float32)[:, 1:]

    @property
    def to_device(self) -> Callable[[npt.NDArray[Any]], DeviceArray]:
        """Copies an array to the device, for others to take; it holds the device and nothing of this."""
        return functools.partial(to_device, self._device)

    def to_host(self, given: object) -> object:
        """A copy on the host of an array in the device's memory, whoever's; anything else comes back as it is."""
        return to_host(self._device, given)

    def close(self) -> None:
        """Let programs and memory go; runs under way end as they would have."""
        with self._lock:
            self._closed = True
            self._shapes.clear()

    @contextmanager
    def _job(self, images: int, branches: int) -> Iterator[_Job]:
        """A workspace for one run, given back when the run ends, however it ends."""
        key = (images, branches)
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed", hint="load the bundle again")
            shape = self._shapes.setdefault(key, _Shape())
            self._shapes.move_to_end(key)
            while len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
            workspace = shape.idle.pop() if shape.idle else None
        try:
            if workspace is None:
                workspace = self._workspace(images)
            yield _Job(shape, workspace, images, branches)
        finally:
            with self._lock:
                if workspace is not None:
                    shape.idle.append(workspace)

    def _workspace(self, images: int) -> Workspace:
        """A new one, with what is the same in every run."""
        workspace = Workspace(self._device, images)
        with self._device.lock:
            self._tell(workspace, "reach", np.arange(self._config.patches))
        return workspace

    def _begin(
        self, job: _Job, noise: Floats, labels: Integers | None, guidance: Floats, inverse_temperature: Floats
    ) -> None:
        """Bring what a run starts from to the device: three or four uploads."""
        workspace = job.workspace
        with self._device.lock:
            workspace.clear_caches()
            self._tell(workspace, "finished", noise.astype(np.float32, copy=False))
            self._tell(workspace, "guidance", guidance)
            self._tell(workspace, "inverse_temperature", inverse_temperature)
            if labels is not None:
                self._tell(workspace, "labels", labels)

    def _tell(self, workspace: Workspace, name: str, array: Floats | Integers) -> None:
        self._device.upload(workspace.address(name, array.nbytes), array)

    def _invert(self, job: _Job, turn: Turn, on_done: Callable[[int], None]) -> BlockReport:
        """Invert one block; `finished` holds its noise, and then its result."""
        last = self._config.patches - 1
        if isinstance(turn.strategy, Sequential):
            steps = last if turn.steps is None else min(turn.steps, last)
            self._sequential(job, turn.block, steps, on_done)
            return BlockReport(block=turn.block, strategy=turn.strategy, calls=(steps,) * job.images)
        reached = 0

        def on_more(done: int) -> None:
            nonlocal reached
            reached = max(reached, done)
            on_done(reached)

        calls, residual, failed = self._parallel(job, turn.block, turn.strategy, on_more)
        if failed:
            workspace, nbytes = job.workspace, self._patch_bytes(job) * self._config.patches
            with self._device.lock:
                workspace.clear_caches()
                self._device.copy(workspace.address("finished", nbytes), workspace.address("noise", nbytes), nbytes)
            self._sequential(job, turn.block, last, on_more)
            calls, residual = calls + last, 0.0
        else:
            on_more(last)
        return BlockReport(
            block=turn.block,
            strategy=turn.strategy,
            calls=tuple(map(int, calls)),
            residual=residual,
            sequential_images=failed,
        )

    def _sequential(self, job: _Job, block: int, steps: int, on_done: Callable[[int], None]) -> None:
        """The first `steps` of a block: groups of an even number, recorded, and a last one by itself if it is odd."""
        with self._device.lock:
            program = self._program(job, block, 1)
            self._start(job, block, None)
        done = 0
        while done < steps:
            count = min(GROUP, steps - done)
            count -= count % 2 if count > 1 else 0
            self._launch(job, program, block, size=1, position=done, count=count)
            done += count
            on_done(done)

    def _parallel(
        self, job: _Job, block: int, strategy: Parallel, on_done: Callable[[int], None]
    ) -> tuple[Integers, float, tuple[int, ...]]:
        """Iterate a block until every image is finished: calls [B], the residual, and images that were not finite."""
        last = self._config.patches - 1
        size = min(strategy.window or last, last)
        with self._device.lock:
            program = self._program(job, block, size)
            self._tell(job.workspace, "tolerance", np.array([strategy.tolerance], np.float32))
            self._start(job, block, strategy)
        farthest = 0
        for _ in range(-(-last // LOOK)):  # every launch settles a patch of every image that is not finished
            self._launch(job, program, block, size=size, position=farthest, count=LOOK)
            with self._device.lock:
                position, calls, residual = job.workspace.look(0)
            failed = tuple(map(int, np.flatnonzero(~np.isfinite(residual))))
            if failed or position.min() >= last:
                return calls, 0.0 if failed else float(residual.max()), failed
            farthest = int(position.max())
            on_done(int(position.mean()))
        raise EngineError(
            f"block {block} is not settled after {last} evaluations on {self._device.name}: it computes wrongly",
            hint="tarflow verify says where; use another engine",
        )

    def _launch(self, job: _Job, program: Program, block: int, *, size: int, position: int, count: int) -> None:
        """Launch a group from `position` or before it; all entries that it reads are before position + size * count."""
        reach = patches = self._config.patches
        if "reach" in program.inputs:
            stride = -(-patches // REACHES)
            farthest = min(position + size * count, patches - 1)
            reach = min(-(-farthest // stride) * stride, patches)
        with self._device.lock:
            if count % 2:
                job.workspace.bound(program, block, size, reach, 0).launch()
            else:
                job.workspace.recorded(program, block, size, reach, count).replay()

    def _start(self, job: _Job, block: int, strategy: Parallel | None) -> None:
        """Make the block's noise of what `finished` holds, and the state at position 0 of it."""
        config, workspace, device = self._config, job.workspace, self._device
        last = config.patches - 1
        size = 1 if strategy is None else min(strategy.window or last, last)
        patch = self._patch_bytes(job) // job.images
        image = config.patches * patch
        finished = workspace.address("finished", job.images * image)
        noise = workspace.address("noise", job.images * image)
        device.copy(noise, finished, job.images * image)
        device.zero(*workspace.status(0))
        window = workspace.address(f"window_{size}_0", job.images * (size + 1) * patch)
        strides = {"rows": job.images, "target_step": (size + 1) * patch, "source_step": image}
        first = last * patch if self._is_reversed(block) else 0
        if strategy is not None and strategy.init == "zeros":
            device.zero(finished, job.images * image)
            device.zero(window, job.images * (size + 1) * patch)
            device.copy(finished + first, noise + first, patch, rows=job.images, target_step=image, source_step=image)
            device.copy(window, noise + first, patch, **strides)
        elif self._is_reversed(block):
            for slot in range(size + 1):
                device.copy(window + slot * patch, noise + (last - slot) * patch, patch, **strides)
        else:
            device.copy(window, noise, (size + 1) * patch, **strides)

    def _program(self, job: _Job, block: int, size: int) -> Program:
        """The advance graph of a block for this job's shape, built when first needed."""
        key = (block, size)
        if key not in job.shape.programs:
            job.shape.programs[key] = self._maker.advance(block, images=job.images, branches=job.branches, window=size)
        return job.shape.programs[key]

    def _patch_bytes(self, job: _Job) -> int:
        """Bytes of one patch of all images."""
        return 4 * job.images * self._config.patch_values

    def _is_reversed(self, block: int) -> bool:
        return self._bundle.blocks[block].order == "reversed"
