"""`OrtCpuEngine`: ONNX Runtime on the CPU, the default engine.

Sessions are opened when first needed and share one arena. A batch is split into single-threaded runs in threads of this
process rather than over threads inside each operator: the parts then never wait for each other, and the data of a part
stay in the caches of one core.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.reader import PORTABLE, Bundle
from tarflow_runtimes.decode.batches import cut
from tarflow_runtimes.decode.parallel import invert_in_parallel
from tarflow_runtimes.decode.plan import BlockReport, Parallel, Sequential
from tarflow_runtimes.decode.sequential import invert_sequentially
from tarflow_runtimes.decode.turn import Conditions, Floats, Integers, OnTurn, Turn
from tarflow_runtimes.engines.api import Cotangent, vjp_recomputed
from tarflow_runtimes.engines.onnxruntime import import_onnxruntime
from tarflow_runtimes.engines.ort_cpu.caches import CachePool
from tarflow_runtimes.engines.ort_cpu.cpus import cpu_name, usable_cpus
from tarflow_runtimes.engines.ort_cpu.session import Session
from tarflow_runtimes.engines.ort_cpu.steppers import ImageWindows, SequentialStepper, StepInputs, Tables
from tarflow_runtimes.errors import EngineError

ROWS_PER_PART: Final = 16
"""Cache rows of one part. The products with the weights take 28, 23, 23, 23 us per row and core at 8, 12, 16, 32 rows
of the MNIST shape. A step of 128 rows on two cores took 2030, 1905, 1963 us in parts of 8, 16, 32 rows."""

LEAST_ROWS_PER_PART: Final = 6
"""With fewer, a second thread does not pay: 8 rows of the MNIST shape took 246 us whole, 261 us in two parts;
12 rows 345 and 267 us."""

PART_CACHE_BYTES: Final = 16 << 20
"""Attention caches of one part at most, as far as LEAST_ROWS_PER_PART allows: what all parts read per step should stay
in the last-level cache. At 1.6 MB a row, 64 rows took 3314, 3700, 3894 us in parts of 8, 16, 32 rows."""

OPERATOR_THREADS_BYTES: Final = 16 << 20
"""Weights of a block from which a batch is not split, and threads work inside the operators: each part would read all
weights from memory again. At 50 MB and 16 rows a step took 5.4 ms so, and 6.9 ms cut in two; at 13 MB 1.8 and 1.7."""

ALONE_THREADS_BYTES: Final = 4 << 20
"""Weights of a block from which a part that runs alone has its operators threaded. At 7 MB a step of one image took
123 us with two threads and 197 with one, at 3 MB 117 and 116. The score of one image took 82 and 116 ms at 7 MB, where
threads that have nothing to do sleep; where they spin they take the next block's cores, and it took 253 ms."""

CACHE_BYTES: Final = 1 << 30
"""Attention caches of one part at most."""

ACTIVATION_BYTES: Final = 128 << 20
"""Activations of one run of a forward or gradient graph; larger batches are run in pieces."""

SPINNING: Final = ("step", "window")
"""Prefixes of the kinds of graphs whose threads spin while they wait, because the next run follows immediately."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bytes that an engine may keep: activations for the backward passes of all blocks, and open sessions.

    Models of which one image needs more activations recompute instead. Each session holds a copy of its block's
    weights, laid out for its operators.
    """

    activations: int = 256 << 20
    sessions: int = 3 << 30


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some images of a batch that run together: what their graph's name ends with, and which they are, in order."""

    form: str
    images: slice | npt.NDArray[np.intp]

    @property
    def branches(self) -> int:
        """G, the number of branches."""
        return 2 if self.form else 1


class OrtCpuEngine:
    """ONNX Runtime on the CPU, on the run-ready graphs of provider `ort-cpu`.

    Raises:
        EngineError: when ONNX Runtime is missing, too old or installed twice, or the bundle has no graphs for it.
    """

    name = provider = "ort-cpu"
    to_device = None

    def __init__(self, bundle: Bundle, limits: Limits = Limits()) -> None:
        self._version: str = import_onnxruntime().__version__
        bundle.graph(self.provider, "step", 0)
        self.bundle, self._limits = bundle, limits
        self.precision: str = bundle.precision
        self._lock = threading.RLock()
        self._closed = False
        self._sessions: dict[tuple[int, str, int], Session] = {}
        self._graphs: dict[Path, bytes] = {}
        self._tables: dict[int, Tables] = {}
        self._caches = CachePool()
        self._wide = bundle.block_bytes >= OPERATOR_THREADS_BYTES
        self._threads = usable_cpus()
        self._workers = 1 if self._wide else self._threads
        self._operator_threads = self._threads if self._wide else 1

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
            is_reversed = self.bundle.blocks[turn.block].is_reversed
            ordered = x[:, ::-1] if is_reversed else x
            if isinstance(turn.strategy, Sequential):
                ordered, report = self._sequential(turn, ordered, conditions, on_done)
            else:
                ordered, report = self._parallel(turn, turn.strategy, ordered, conditions, on_done)
            x = np.ascontiguousarray(ordered[:, ::-1] if is_reversed else ordered)
            reports.append(report)
        return x, tuple(reports)

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> (z [B, N, D], log|det| [B], nats) of one block."""
        z, log_det = self._run(block, "forward", {"z": patches.shape, "log_det": patches.shape[:1]}, patches, labels)
        return z, log_det

    def vjp(
        self, blocks: Sequence[int], patches: Floats, labels: Integers | None, cotangent: Cotangent
    ) -> tuple[Floats, Floats]:
        """Patches -> (z after these blocks, d/d patches of (c . z + sum of log|det|)) with c = `cotangent`(z).

        The batch is cut into pieces whose activations can be kept, which run side by side.
        """
        size = self._vjp_images(len(blocks))
        if not size:
            return vjp_recomputed(self.forward, self._gradient, blocks, patches, labels, cotangent)
        pieces = cut(len(patches), size, parts=self._workers)
        threads = self._threads_of(alone=len(pieces) == 1)

        def run(piece: slice) -> tuple[Floats, Floats]:
            x, y, ways_back = patches[piece], None if labels is None else labels[piece], []
            for block in blocks:
                x, way_back = self._half(block, x, y, threads)
                ways_back.append(way_back)
            g = cotangent(x, piece)
            while ways_back:
                g = ways_back.pop()(g)
            return x, g

        if len(pieces) == 1:
            return run(pieces[0])
        with ThreadPoolExecutor(min(self._workers, len(pieces)), thread_name_prefix="tarflow") as pool:
            z, gradient = zip(*pool.map(run, pieces), strict=True)
        return np.concatenate(z), np.concatenate(gradient)

    def require_vjp(self) -> None:
        """What it needs is there: the package and the bundle's graphs are looked for when the engine is opened."""

    def report(self) -> Mapping[str, Any]:
        """The version of ONNX Runtime, threads and device."""
        return {
            "engine": self.name,
            "onnxruntime": self._version,
            "threads": self._threads,
            "weights": self.precision,
            "device": f"{cpu_name()}, {self._threads} CPUs",
        }

    def close(self) -> None:
        """Free the sessions; running calls finish normally."""
        with self._lock:
            self._closed = True
            self._sessions.clear()
            self._tables.clear()
            self._caches.clear()

    def _sequential(
        self, turn: Turn, noise: Floats, conditions: Conditions, on_step: Callable[[int], object] | None
    ) -> tuple[Floats, BlockReport]:
        """One patch after the other, in block order."""
        last = noise.shape[1] - 1
        steps = last if turn.steps is None else min(turn.steps, last)
        parts = self._parts(conditions)

        def start(number: int) -> SequentialStepper:
            part = parts[number]
            session, inputs = self._open_step(turn.block, "step", part, noise, conditions, alone=len(parts) == 1)
            return SequentialStepper(session, inputs, self._caches)

        made = invert_sequentially(start, parts=len(parts), steps=steps, workers=self._workers, on_step=on_step)
        report = BlockReport(block=turn.block, strategy=turn.strategy, calls=(steps,) * len(noise))
        if len(parts) == 1:
            return made[0], report
        x = np.empty_like(noise)
        for part, patches in zip(parts, made, strict=True):
            x[part.images] = patches
        return x, report

    def _parallel(
        self,
        turn: Turn,
        strategy: Parallel,
        noise: Floats,
        conditions: Conditions,
        on_step: Callable[[int], object] | None,
    ) -> tuple[Floats, BlockReport]:
        """Windows of patches, each image by itself, in block order."""
        is_reversed = self.bundle.blocks[turn.block].is_reversed
        if turn.start is not None and is_reversed:
            turn = dataclasses.replace(turn, start=turn.start[:, ::-1])
        forms = _forms(conditions)

        def start(image: int) -> ImageWindows:
            part = _Part(str(forms[image]), slice(image, image + 1))
            session, inputs = self._open_step(turn.block, "window", part, noise, conditions, alone=len(noise) == 1)
            return ImageWindows(session, inputs)

        return invert_in_parallel(start, noise, turn, strategy, workers=self._workers, on_step=on_step)

    def _parts(self, conditions: Conditions) -> list[_Part]:
        """How a batch is cut: images of one form together, in equal parts.

        At most about ROWS_PER_PART rows each where parts run side by side, else what memory allows.
        """
        forms = _forms(conditions)
        kinds = sorted(set(forms.tolist()))
        if len(kinds) == 1:
            cuts = self._cuts(len(forms), 2 if kinds[0] else 1)
            return [_Part(kinds[0], piece) for piece in cuts]
        parts = []
        for form in kinds:
            images = np.flatnonzero(forms == form)
            parts += [_Part(form, images[piece]) for piece in self._cuts(len(images), 2 if form else 1)]
        return parts

    def _cuts(self, images: int, branches: int) -> list[slice]:
        config, rows = self.bundle.config, images * branches
        row_bytes = 8 * config.layers * config.patches * config.width
        parts = 1
        if not self._wide:
            rows_per_part = min(ROWS_PER_PART, max(LEAST_ROWS_PER_PART, PART_CACHE_BYTES // row_bytes))
            rounds = math.ceil(rows / (rows_per_part * self._workers))
            parts = min(rounds * self._workers, rows // LEAST_ROWS_PER_PART)
        return cut(images, max(1, CACHE_BYTES // (branches * row_bytes)), parts=parts)

    def _open_step(
        self, block: int, kind: str, part: _Part, noise: Floats, conditions: Conditions, *, alone: bool
    ) -> tuple[Session, StepInputs]:
        """The session of the graph that takes these images, and what it starts from; noise is in block order."""
        session = self._open(block, self.provider, kind + part.form, self._threads_of(alone))
        with self._lock:
            tables = self._tables.get(block)
            if tables is None:
                tables = self._tables[block] = Tables.of(self.bundle, block)
        given = conditions.of(part.images, part.branches)
        return session, StepInputs(bundle=self.bundle, tables=tables, noise=noise[part.images], conditions=given)

    def _vjp_images(self, blocks: int) -> int:
        """Images of one piece whose activations of so many blocks can be kept; 0 where one image's do not."""
        config = self.bundle.config
        layer_bytes = 4 * config.patches * (config.heads * config.patches + 9 * config.width)
        return self._limits.activations // (self._workers * blocks * config.layers * layer_bytes)

    def _half(
        self, block: int, patches: Floats, labels: Integers | None, threads: int
    ) -> tuple[Floats, Callable[[Floats], Floats]]:
        """Z of a block and its backward pass, to be called once; the saved activations are not copied."""
        ahead = self._open(block, self.provider, "vjp_forward", threads)
        backward = self._open(block, self.provider, "vjp_backward", threads)
        kept = ahead.run_values({}, ahead.outputs, _given(patches=patches, labels=labels))
        del kept["log_det"]
        z = ahead.checked("z", kept.pop("z").numpy(), patches.shape)

        def way_back(cotangent: Floats) -> Floats:
            made = backward.run_values(kept, ["gradient"], _given(cotangent=cotangent))
            kept.clear()
            return backward.checked("gradient", made["gradient"].numpy(), patches.shape)

        return z, way_back

    def _gradient(self, block: int, patches: Floats, cotangent: Floats, labels: Integers | None) -> Floats:
        """Derivative of (cotangent . z + log|det|) of one block with respect to its `patches`, [B, N, D]."""
        return self._run(block, "gradient", {"gradient": patches.shape}, patches, labels, cotangent=cotangent)[0]

    def _threads_of(self, alone: bool) -> int:
        """The threads inside operators, for a part that runs alone or alongside others."""
        return self._threads if alone and self.bundle.block_bytes >= ALONE_THREADS_BYTES else self._operator_threads

    def _run(
        self,
        block: int,
        kind: str,
        outputs: Mapping[str, tuple[int, ...]],
        patches: Floats,
        labels: Integers | None,
        **arrays: Floats,
    ) -> list[Floats]:
        """Run a portable graph on a whole batch: a few images at a time, side by side where that is faster.

        The activations of all runs together stay within ACTIVATION_BYTES, or are those of one image each.
        """
        config = self.bundle.config
        given = _given(patches=patches, labels=labels, **arrays)
        image_bytes = 4 * config.patches * (4 * config.heads * config.patches + 20 * config.width)
        cuts = cut(len(patches), max(1, ACTIVATION_BYTES // (image_bytes * self._workers)), parts=self._workers)
        pieces = [{name: array[images] for name, array in given.items()} for images in cuts]
        session = self._open(block, PORTABLE, kind, self._threads_of(alone=len(pieces) == 1))
        if len(pieces) == 1 or self._workers == 1:
            results = [session.run(piece, list(outputs)) for piece in pieces]
        else:
            with ThreadPoolExecutor(min(self._workers, len(pieces)), thread_name_prefix="tarflow") as pool:
                results = list(pool.map(lambda piece: session.run(piece, list(outputs)), pieces))
        made = [np.concatenate(parts) for parts in zip(*results, strict=True)]
        return [session.checked(name, array, outputs[name]) for name, array in zip(outputs, made, strict=True)]

    def _open(self, block: int, provider: str, kind: str, threads: int) -> Session:
        """The session of a graph of a block; the least recently used one is closed when many are open."""
        key = (block, f"{provider}/{kind}", threads)
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed", hint="load the bundle again")
            session = self._sessions.pop(key, None)
            if session is None:
                path = self.bundle.graph(provider, kind, block)
                if path not in self._graphs:  # a run-ready graph serves every block
                    self._graphs[path] = self.bundle.read(path)
                session = Session(
                    self._graphs[path],
                    name=self.bundle.name(path),
                    folder=self.bundle.blocks[block].weights.parent,
                    threads=threads,
                    spinning=kind.startswith(SPINNING),
                )
            self._sessions[key] = session
            while len(self._sessions) > max(1, self._limits.sessions // self.bundle.block_bytes):
                del self._sessions[next(iter(self._sessions))]
            return session


def _forms(conditions: Conditions) -> npt.NDArray[np.str_]:
    """The name suffix of the graph for each image, [B]."""
    guided = conditions.guidance.any(axis=(1, 2)) & (conditions.branches == 2)
    tempered = (conditions.inverse_temperature != 1.0).any(axis=0)
    return np.where(guided, np.where(tempered, "_tempered", "_guided"), "")


def _given(**arrays: npt.NDArray[Any] | None) -> dict[str, npt.NDArray[Any]]:
    """Inputs by name, contiguous, without those that are None."""
    return {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
