"""`NativeEngine`: sequential decoding and encoding in the native kernel, one call per block.

The kernel takes all steps of all images of a block in one call, outside the interpreter. Its bits depend on the
weights, the input and the conditions of an image alone: not on the batch, the threads or the processor. Gradients and
windows are ONNX Runtime's, which is asked for when one is.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.decode.plan import BlockReport, Sequential
from tarflow_runtimes.decode.turn import Conditions, Doubles, Floats, Integers, OnTurn, Turn
from tarflow_runtimes.doctor.requirements import NATIVE_PRECISIONS
from tarflow_runtimes.engines.api import Cotangent
from tarflow_runtimes.engines.native.library import CANCELLED, Block, NativeError, Watch, open_library
from tarflow_runtimes.engines.ort_cpu.cpus import cpu_name, usable_cpus
from tarflow_runtimes.engines.ort_cpu.engine import OrtCpuEngine
from tarflow_runtimes.errors import EngineError

PACKED_BYTES: Final = 4 << 30
"""Limit of packed blocks that are kept; larger models pack each block again whenever it is used."""

LOOK: Final = 0.02
"""Seconds between two checks of the progress of a call."""

MOMENT: Final = 0.03
"""Seconds of a call that need not be watched: an interrupt may wait for so long."""

Made = TypeVar("Made")


class NativeEngine:
    """The native kernel on the CPU; ONNX Runtime runs `vjp` and windows.

    Raises:
        EngineError: when the library is not there, or the bundle is of a precision that the kernel does not read.
    """

    name = provider = "native"
    to_device = None

    def __init__(self, bundle: Bundle) -> None:
        self._library = open_library()
        if bundle.precision not in NATIVE_PRECISIONS:
            raise EngineError(
                f"engine native does not read {bundle.precision}, the precision of bundle {bundle.path.name}",
                hint="use engine ort-cpu",
            )
        self.bundle = bundle
        self.precision: str = bundle.precision
        self._threads = usable_cpus()
        self._lock = threading.Lock()
        self._closed = False
        self._blocks: dict[int, Block] = {}
        self._seconds: dict[tuple[str, int, int], float] = {}  # of the last call, by kind, steps and rows
        self._rest: OrtCpuEngine | None = None

    def to_host(self, given: object) -> object:
        """Return the argument: all arrays are on the host."""
        return given

    def invert(
        self, turns: Sequence[Turn], noise: Floats, conditions: Conditions, on_step: OnTurn | None = None
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """Invert blocks one after another, each from the result of the one before."""
        x, reports = noise, []
        for number, turn in enumerate(turns):
            on_done = None if on_step is None else functools.partial(on_step, number)
            if isinstance(turn.strategy, Sequential):
                x, report = self._sequential(turn, x, conditions, on_done)
            else:
                heard = None if on_done is None else (lambda _, done, tell=on_done: tell(done))
                x, (report,) = self._ort_cpu().invert([turn], x, conditions, heard)
            reports.append(report)
        return x, tuple(reports)

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Doubles]:
        """Patches [B, N, D], labels [B] -> (z [B, N, D], log|det| [B], nats) of one block."""
        packed, is_reversed = self._block(block), self.bundle.blocks[block].is_reversed
        ordered = patches[:, ::-1] if is_reversed else patches
        run = functools.partial(self._library.forward, packed, ordered, labels=labels, threads=self._threads)
        z, log_det = self._run(run, "forward", steps=patches.shape[1], rows=len(patches), images=len(patches))
        return np.ascontiguousarray(z[:, ::-1]) if is_reversed else z, log_det

    def vjp(
        self, blocks: Sequence[int], patches: Floats, labels: Integers | None, cotangent: Cotangent
    ) -> tuple[Floats, Floats]:
        """Patches -> (z after these blocks, d/d patches of (c . z + sum of log|det|)) with c = `cotangent`(z)."""
        return self._ort_cpu().vjp(blocks, patches, labels, cotangent)

    def require_vjp(self) -> None:
        """Open ONNX Runtime."""
        self._ort_cpu()

    def report(self) -> Mapping[str, Any]:
        """The kernel, threads and device."""
        return {
            "engine": self.name,
            "kernel": self._library.kernels[0],
            "threads": self._threads,
            "weights": self.precision,
            "device": f"{cpu_name()}, {self._threads} CPUs",
        }

    def close(self) -> None:
        """Free the packed blocks and the sessions; running calls finish normally."""
        with self._lock:
            self._closed = True
            self._blocks.clear()
            if self._rest is not None:
                self._rest.close()

    def _sequential(
        self, turn: Turn, noise: Floats, conditions: Conditions, on_done: Callable[[int], object] | None
    ) -> tuple[Floats, BlockReport]:
        """One patch after the other; images without guidance run with one branch, apart from the others."""
        last = noise.shape[1] - 1
        steps = last if turn.steps is None else min(turn.steps, last)
        block, is_reversed = self._block(turn.block), self.bundle.blocks[turn.block].is_reversed
        ordered = np.array(noise[:, ::-1] if is_reversed else noise, np.float32, order="C")  # the result, in time
        guided = conditions.guidance.any(axis=(1, 2)) & (conditions.branches == 2)
        groups = [np.flatnonzero(guided == has_guidance) for has_guidance in (False, True)]
        done = 0
        for branches, images in enumerate(groups, start=1):
            if not len(images):
                continue
            given = conditions.of(images, branches)
            run = functools.partial(
                self._library.invert,
                block,
                ordered[images],
                labels=given.labels,
                guidance=given.guidance if branches == 2 else None,
                inverse_temperature=given.inverse_temperature,
                branches=branches,
                steps=steps,
                threads=self._threads,
            )
            share, before = len(images) / len(noise), done

            def tell(of_group: int, share: float = share, before: int = before) -> None:
                if on_done is not None:
                    on_done(before + int(of_group * share))

            ordered[images] = self._run(
                run, "invert", steps=steps, rows=branches * len(images), images=len(images), on_done=tell
            )
            done += int(steps * share)
        if on_done is not None and done < steps:
            on_done(steps)
        x = np.ascontiguousarray(ordered[:, ::-1]) if is_reversed else ordered
        return x, BlockReport(block=turn.block, strategy=turn.strategy, calls=(steps,) * len(noise))

    def _run(
        self,
        run: Callable[..., Made],
        kind: str,
        *,
        steps: int,
        rows: int,
        images: int,
        on_done: Callable[[int], object] = lambda _: None,
    ) -> Made:
        """Run a call of the kernel: in this thread if the last call of that size took a moment, else watched.

        In a thread of its own the kernel starts its other threads while this one falls asleep, and often on the same
        processor: one digit then takes 7 ms instead of 4.
        """
        size, started = (kind, steps, rows), time.perf_counter()
        watched = self._seconds.get(size, MOMENT) >= MOMENT
        made = _watched(run, images, on_done) if watched else run()
        self._seconds[size] = time.perf_counter() - started
        if not watched:
            on_done(steps)
        return made

    def _block(self, number: int) -> Block:
        """A packed block; the least recently used are dropped when many are kept."""
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed", hint="load the bundle again")
            block = self._blocks.pop(number, None) or self._library.pack(self.bundle, number)
            self._blocks[number] = block
            while len(self._blocks) > max(1, PACKED_BYTES // block.packed.nbytes):
                del self._blocks[next(iter(self._blocks))]
            return block

    def _ort_cpu(self) -> OrtCpuEngine:
        """The ONNX Runtime engine for everything else, opened when first needed.

        Raises:
            EngineError: when the engine is closed, ONNX Runtime is missing, or the bundle has no graphs for it.
        """
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed", hint="load the bundle again")
            if self._rest is None:
                try:
                    self._rest = OrtCpuEngine(self.bundle)
                except EngineError as error:
                    why = f"engine native leaves gradients (denoise) and windows to ort-cpu: {error}"
                    raise EngineError(why, hint=error.hint) from error
            return self._rest


def _watched(run: Callable[..., Made], images: int, on_done: Callable[[int], object]) -> Made:
    """Run a call of the kernel in a thread; report its steps from this thread, and cancel it on an interrupt."""
    watch, made, failed = Watch(), [], []

    def call() -> None:
        try:
            made.append(run(watch=watch))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            failed.append(error)

    thread, told, runs = threading.Thread(target=call, name="tarflow-native", daemon=True), 0, True
    try:
        thread.start()
        while runs:
            thread.join(LOOK)
            runs = thread.is_alive()  # read before the progress, so that the last steps are reported
            done = int(watch.progress[0]) // images
            if done > told:
                told = done
                on_done(done)
    except BaseException:  # Ctrl-C, or an exception of on_done: no kernel may continue after the call has ended
        watch.cancel[0] = 1
        if thread.is_alive():
            thread.join()
        raise
    if failed:
        error = failed[0]
        if isinstance(error, NativeError) and error.status == CANCELLED:
            raise EngineError("the native kernel stopped without a request to cancel", hint="report this") from error
        raise error
    return made[0]
