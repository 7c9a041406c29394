"""`DeviceDecoder`: the decode loop for an engine with its own memory, without transfers between steps.

The outputs of a graph are the next values of its inputs (docs/BUNDLE.md, the decode loop), so that the host only
launches. The small state of the images, such as positions, is double-buffered, and everything large is updated in
place. Latents are uploaded once and images downloaded once. Sequential blocks download nothing else; parallel ones
download the positions after every LOOK launches.

Attention reads the first `kv_length` cache entries: the host knows an upper bound of the positions, which it raises in
eighths of N.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.decode.plan import BlockReport, Init, Parallel, Sequential
from tarflow_runtimes.decode.turn import Conditions, Floats, Integers, OnTurn, Turn
from tarflow_runtimes.engines.gpu.device import Device, Program, ProgramMaker
from tarflow_runtimes.engines.gpu.workspace import Workspace
from tarflow_runtimes.errors import EngineError

GROUP: Final = 16
"""Sequential steps that are recorded together; progress and cancellation come between groups."""

LOOK: Final = 4
"""Launches of a parallel block between two downloads of the positions."""

KV_LENGTHS: Final = 8
"""Cache lengths that attention may read are multiples of N / 8. Each has its own recordings."""

SHAPES: Final = 2
"""Shapes (images, branches) whose programs and memory are kept."""


@dataclasses.dataclass(slots=True)
class _Shape:
    """Kept for runs of one shape: programs by block and window, and unused workspaces."""

    programs: dict[tuple[int, int], Program] = dataclasses.field(default_factory=dict)
    idle: list[Workspace] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One run: its shape and workspace, and its progress callback."""

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

    def invert(
        self, turns: Sequence[Turn], noise: Floats, conditions: Conditions, on_step: OnTurn | None = None
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """See `Engine.invert`; after an error the decoder stays usable."""
        with self._job(len(noise), conditions.branches) as job:
            self._begin(job, noise, conditions)
            reports = []
            for number, turn in enumerate(turns):

                def on_done(done: int, number: int = number) -> None:
                    if on_step is not None:
                        with self._device.lock:
                            self._device.synchronize()  # otherwise it would report steps that are only submitted
                        on_step(number, done)

                reports.append(self._invert(job, turn, on_done))
            with self._device.lock:
                shape = noise.shape
                x = self._device.download(job.workspace.address("finished", noise.nbytes), shape, np.float32)
        return x, tuple(reports)

    def close(self) -> None:
        """Free programs and memory; running calls finish normally."""
        with self._lock:
            self._closed = True
            self._shapes.clear()

    @contextmanager
    def _job(self, images: int, branches: int) -> Iterator[_Job]:
        """A workspace for one run, returned when the run ends, also after errors."""
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
        """A new workspace, with the contents that are the same in every run."""
        workspace = Workspace(self._device, images)
        with self._device.lock:
            self._upload(workspace, "kv_positions", np.arange(self._config.patches))
        return workspace

    def _begin(self, job: _Job, noise: Floats, conditions: Conditions) -> None:
        """Upload the inputs of a run to the device: three or four transfers."""
        workspace = job.workspace
        with self._device.lock:
            workspace.clear_caches()
            self._upload(workspace, "finished", noise)
            self._upload(workspace, "guidance", conditions.guidance)
            self._upload(workspace, "inverse_temperature", conditions.inverse_temperature)
            if conditions.labels is not None:
                self._upload(workspace, "labels", conditions.labels)

    def _upload(self, workspace: Workspace, name: str, array: npt.NDArray[Any]) -> None:
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

        calls, residual, failed = self._parallel(job, turn, turn.strategy, on_more)
        if failed:
            workspace, nbytes = job.workspace, self._patch_bytes(job) * self._config.patches
            with self._device.lock:
                workspace.clear_caches()
                self._device.copy(workspace.address("finished", nbytes), workspace.address("noise", nbytes), nbytes)
            self._sequential(job, turn.block, last, on_more)
            calls, residual = calls + last, 0.0
        elif turn.steps is None:
            on_more(last)
        return BlockReport(
            block=turn.block,
            strategy=turn.strategy,
            calls=tuple(map(int, calls)),
            residual=residual,
            sequential_images=failed,
        )

    def _sequential(self, job: _Job, block: int, steps: int, on_done: Callable[[int], None]) -> None:
        """Run the first `steps` steps of a block."""
        with self._device.lock:
            program = self._program(job, block, 1)
            self._start(job, block, size=1)
        for done, count in _groups(steps, GROUP):
            self._launch(job, program, block, size=1, position=done, count=count)
            on_done(done + count)

    def _parallel(
        self, job: _Job, turn: Turn, strategy: Parallel, on_done: Callable[[int], None]
    ) -> tuple[Integers, float, tuple[int, ...]]:
        """Iterate a block until every image is finished; returns calls [B], the residual, and non-finite images."""
        block, last = turn.block, self._config.patches - 1
        size = min(strategy.window or last, last)
        with self._device.lock:
            program = self._program(job, block, size)
            self._upload(job.workspace, "tolerance", np.array([strategy.tolerance], np.float32))
            self._start(job, block, size=size, init=strategy.init if turn.start is None else turn.start)
        # Every launch settles at least one patch of every unfinished image; finished images do not change.
        enough = -(-last // LOOK) * LOOK
        farthest, calls, residual = 0, np.zeros(job.images, np.int64), np.zeros(job.images, np.float32)
        for _, count in _groups(enough if turn.steps is None else min(turn.steps, last), LOOK):
            self._launch(job, program, block, size=size, position=farthest, count=count)
            with self._device.lock:
                position, calls, residual = job.workspace.look(count % 2)
            failed = tuple(map(int, np.flatnonzero(~np.isfinite(residual))))
            if failed or position.min() >= last:
                return calls, 0.0 if failed else float(residual.max()), failed
            farthest = int(position.max())
            on_done(int(position.mean()))
        if turn.steps is not None:
            return calls, float(residual.max()), ()
        raise EngineError(
            f"block {block} is not settled after {last} evaluations on {self._device.name}: it computes wrongly",
            hint="tarflow verify says where; use another engine",
        )

    def _launch(self, job: _Job, program: Program, block: int, *, size: int, position: int, count: int) -> None:
        """Launch a group from `position` or before it; all entries that it reads are before position + size * count."""
        kv_length = patches = self._config.patches
        if "kv_positions" in program.inputs:
            stride = -(-patches // KV_LENGTHS)
            farthest = min(position + size * count, patches - 1)
            kv_length = min(-(-farthest // stride) * stride, patches)
        with self._device.lock:
            if count % 2:
                job.workspace.bound(program, block, size, kv_length, 0).launch()
            else:
                job.workspace.recorded(program, block, size, kv_length, count).replay()

    def _start(self, job: _Job, block: int, *, size: int, init: Init | Floats = "noise") -> None:
        """Make the block's noise from `finished`, and its initial state: patches as `init` says, position 0."""
        config, workspace, device = self._config, job.workspace, self._device
        is_reversed, last = self._bundle.blocks[block].is_reversed, config.patches - 1
        patch = self._patch_bytes(job) // job.images
        image = config.patches * patch
        finished = workspace.address("finished", job.images * image)
        noise = workspace.address("noise", job.images * image)
        device.copy(noise, finished, job.images * image)
        device.zero(*workspace.status(0))
        if not isinstance(init, str):
            device.upload(finished, init)
        elif init == "zeros":
            device.zero(finished, job.images * image)
        first = last * patch if is_reversed else 0
        device.copy(finished + first, noise + first, patch, rows=job.images, target_step=image, source_step=image)
        window = workspace.address(f"window_{size}_0", job.images * (size + 1) * patch)
        strides = {"rows": job.images, "target_step": (size + 1) * patch, "source_step": image}
        if is_reversed:
            for slot in range(size + 1):
                device.copy(window + slot * patch, finished + (last - slot) * patch, patch, **strides)
        else:
            device.copy(window, finished, (size + 1) * patch, **strides)

    def _program(self, job: _Job, block: int, size: int) -> Program:
        """The decode loop of a block for this job's shape, built when first needed."""
        key = (block, size)
        if key not in job.shape.programs:
            job.shape.programs[key] = self._maker.program(
                block, "step" if size == 1 else "window", images=job.images, branches=job.branches, window=size
            )
        return job.shape.programs[key]

    def _patch_bytes(self, job: _Job) -> int:
        """Size in bytes of one patch of all images."""
        return 4 * job.images * self._config.patch_values


def _groups(launches: int, most: int) -> Iterator[tuple[int, int]]:
    """How many are done before each group, and its number: even ones of at most `most`, at the end perhaps a single."""
    done = 0
    while done < launches:
        count = min(most, launches - done)
        count -= count % 2 if count > 1 else 0
        yield done, count
        done += count
