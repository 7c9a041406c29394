"""`OrtCpuEngine`: ONNX Runtime on the CPU, the default engine.

Sessions are opened when first needed and share one arena. A batch is cut over single-threaded runs in threads of this
process rather than over threads inside each operator: the parts then never wait for each other, and what a part keeps
in its caches stays near one core.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engine import Floats, Integers, Stepper, Windows
from tarflow_runtimes._engines._cache_pool import CachePool
from tarflow_runtimes._engines._cpus import cpu_name, usable_cpus
from tarflow_runtimes._engines._ort_import import import_onnxruntime
from tarflow_runtimes._engines._session import Session
from tarflow_runtimes._engines._split import SplitBlock
from tarflow_runtimes._engines._steppers import PortableStepper, SequentialStepper, SequentialTables, StepInputs
from tarflow_runtimes._engines._windows import PortableWindows, RewrittenWindows
from tarflow_runtimes._errors import EngineError
from tarflow_runtimes._rewrites import int8_weights, sequential_graph
from tarflow_runtimes._rewrites._graph import PatternMismatch
from tarflow_runtimes._rewrites.split_gradient import SplitGradient, split_gradient

ROWS_PER_PART: Final = 16
"""Cache rows of one part. The products with the weights take 28, 23, 23, 23 us per row and core at 8, 12, 16, 32 rows
of the MNIST shape. A step of 128 rows on two cores took 2030, 1905, 1963 us in parts of 8, 16, 32 rows."""

LEAST_ROWS_PER_PART: Final = 6
"""Below, a second thread brings less than it costs: 8 rows of the MNIST shape took 246 us whole and 261 us cut in two,
12 rows 345 and 267."""

PART_CACHE_BYTES: Final = 16 << 20
"""Attention caches of one part at most, as far as LEAST_ROWS_PER_PART allows: what all parts read per step should stay
in the last-level cache. At 1.6 MB a row, 64 rows took 3314, 3700, 3894 us in parts of 8, 16, 32 rows."""

OPERATOR_THREADS_BYTES: Final = 16 << 20
"""Weights of a block from which a batch is not cut, and the threads work inside the operators: each part would read all
weights from memory again. At 50 MB and 16 rows a step took 5.4 ms so, and 6.9 ms cut in two; at 13 MB 1.8 and 1.7."""

ALONE_THREADS_BYTES: Final = 4 << 20
"""Weights of a block from which a part that runs alone has its operators threaded. At 7 MB a step of one image took
123 us with two threads and 197 with one, at 3 MB 117 and 116. The score of one image took 82 and 116 ms at 7 MB, where
threads that have nothing to do sleep; where they spin they take the next block's cores, and it took 253 ms."""

CACHE_BYTES: Final = 1 << 30
"""Attention caches of one part at most."""

ACTIVATION_BYTES: Final = 128 << 20
"""Activations of one run of a forward or gradient graph; larger batches are run in pieces."""


VJP_BYTES: Final = 256 << 20
"""What the ways back of all blocks may keep together; models of which one image needs more recompute instead."""

SESSIONS_BYTES: Final = 3 << 30
"""Weights of the open sessions together: each holds a copy of its block's, laid out for its operators."""


class OrtCpuEngine:
    """ONNX Runtime on the CPU, float32 or float16 bundles.

    With weights "int8" the inverse runs on the rewrite of `int8_weights`; forward and gradient as they are stored.

    Raises:
        EngineError: when ONNX Runtime is missing, too old or installed twice.
    """

    name = "ort-cpu"
    decoder = None

    def __init__(self, bundle: Bundle, weights: str = "stored") -> None:
        self._version: str = import_onnxruntime().__version__
        self.bundle = bundle
        self._int8 = weights == "int8"
        self._lock = threading.RLock()
        self._closed = False
        self._sessions: dict[tuple[object, ...], Session] = {}
        self._tables: dict[int, SequentialTables] = {}
        self._caches = CachePool()
        self._declined: dict[tuple[object, ...], str] = {}
        self._block_bytes = max(1, *(block.weights.stat().st_size for block in bundle.blocks))
        self._wide = self._block_bytes >= OPERATOR_THREADS_BYTES
        self._threads = usable_cpus()
        self.workers = 1 if self._wide else self._threads
        self._operator_threads = self._threads if self._wide else 1

    def parts(self, images: int, branches: int) -> Sequence[slice]:
        """Equal parts: at most about ROWS_PER_PART rows each where parts run side by side, else what memory allows."""
        config, rows = self.bundle.config, images * branches
        row_bytes = 8 * config.layers * config.patches * config.width
        count = math.ceil(images / max(1, CACHE_BYTES // (branches * row_bytes)))
        if not self._wide:
            rows_per_part = min(ROWS_PER_PART, max(LEAST_ROWS_PER_PART, PART_CACHE_BYTES // row_bytes))
            rounds = math.ceil(rows / (rows_per_part * self.workers))
            count = max(count, min(rounds * self.workers, rows // LEAST_ROWS_PER_PART, images))
        edges = [images * i // count for i in range(count + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> (z [B, N, D], log|det| [B], nats) of one block."""
        z, log_det = self._run(block, "forward", ("z", "log_det"), patches=patches, labels=labels)
        return z, log_det

    def gradient(self, block: int, patches: Floats, cotangent: Floats, labels: Integers | None) -> Floats:
        """Derivative of (cotangent . z + log|det|) of one block with respect to its `patches`, [B, N, D]."""
        arrays = {"patches": patches, "cotangent": cotangent, "labels": labels}
        return self._run(block, "gradient", ("gradient",), **arrays)[0]

    def vjp_images(self) -> int:
        """Images of one part whose activations of all blocks fit into VJP_BYTES; 0 where one image's do not."""
        config = self.bundle.config
        if self.bundle.dtype != "float32" or not config.nvp:
            return 0  # the cut needs one dtype throughout, and the scale
        layer_bytes = 4 * config.patches * (config.heads * config.patches + 9 * config.width)
        return VJP_BYTES // (self.workers * config.blocks * config.layers * layer_bytes)

    def vjp(
        self, block: int, patches: Floats, labels: Integers | None, *, alone: bool
    ) -> tuple[Floats, Callable[[Floats], Floats]]:
        """Patches [B, N, D] -> z [B, N, D] and the way back: cotangent -> `gradient` of these patches, once."""
        split = self._open_vjp(block, self._threads_of(alone))
        if split is not None:
            return split.run(patches, labels)
        z, _ = self.forward(block, patches, labels)
        return z, lambda cotangent: self.gradient(block, patches, cotangent, labels)

    def window(self, block: int, patches: Floats, noise: Floats, labels: Integers | None) -> Floats:
        """The step graph on N - 1 patches at once: finished patches [B, N, D] -> patches 1 .. N-1, block order."""
        config, batch = self.bundle.config, len(patches)
        ordered = patches[:, ::-1] if self._is_reversed(block) else patches
        cache = np.zeros((batch, config.heads, config.patches, config.head_dim), self.bundle.cache_dtype)
        feeds: dict[str, Any] = {
            f"{kind}_{layer}": cache for layer in range(config.layers) for kind in ("key", "value")
        }
        feeds |= {
            "patches": np.ascontiguousarray(ordered[:, :-1]),
            "noise": np.ascontiguousarray(noise),
            "guidance": np.zeros((2, config.patches), np.float32),
            "position": np.zeros(batch, np.int64),
            "inverse_temperature": np.ones(1, np.float32),
        }
        if labels is not None:
            feeds["labels"] = labels[None]
        return np.asarray(self._open(block, "step", self._operator_threads).run(feeds, ("next",))[0])

    def stepper(
        self,
        block: int,
        *,
        noise: Floats,
        labels: Integers | None,
        guidance: Floats,
        inverse_temperature: Floats,
        alone: bool,
    ) -> Stepper:
        """Start an inverse: noise [B, N, D], labels [G, B], guidance [2, N], inverse_temperature [G]."""
        inputs = StepInputs(
            noise=noise,
            labels=labels,
            guidance=guidance,
            inverse_temperature=inverse_temperature,
            is_reversed=self._is_reversed(block),
            cache_dtype=self.bundle.cache_dtype,
        )
        opened = self._open_rewritten(block, inputs, windows=False, threads=self._threads_of(alone))
        if opened is None:
            return PortableStepper(self._open(block, "step", self._operator_threads), self.bundle.config, inputs)
        session, tables = opened
        return SequentialStepper(session, self.bundle.config, inputs, tables, self._caches)

    def windows(
        self,
        block: int,
        *,
        noise: Floats,
        labels: Integers | None,
        guidance: Floats,
        inverse_temperature: Floats,
        alone: bool,
    ) -> Windows:
        """Start an inverse by windows of one image: noise [N, D] in block order, labels [G], the others as above."""
        inputs = StepInputs(
            noise=noise[None],
            labels=None if labels is None else labels[:, None],
            guidance=guidance,
            inverse_temperature=inverse_temperature,
            is_reversed=self._is_reversed(block),
            cache_dtype=self.bundle.cache_dtype,
        )
        opened = self._open_rewritten(block, inputs, windows=True, threads=self._threads_of(alone))
        if opened is None:
            return PortableWindows(self._open(block, "step", self._operator_threads), self.bundle.config, inputs)
        session, tables = opened
        return RewrittenWindows(session, self.bundle.config, inputs, tables)

    def report(self) -> Mapping[str, Any]:
        """Versions, threads, and why a step graph runs without its rewrites, if one does."""
        return {
            "engine": self.name,
            "onnxruntime": self._version,
            "threads": self._threads,
            "weights": "int8" if self._int8 else self.bundle.dtype,
            "device": f"{cpu_name()}, {self._threads} CPUs",
            "step_graph": "portable" if any(key[1] != "vjp" for key in self._declined) else "rewritten",
            "declined": sorted({f"block {key[0]}: {reason}" for key, reason in self._declined.items()}),
        }

    def close(self) -> None:
        """Free the sessions; calls that are running end as they would have."""
        with self._lock:
            self._closed = True
            self._sessions.clear()
            self._tables.clear()
            self._caches.clear()

    def _threads_of(self, alone: bool) -> int:
        """Threads inside the operators of a part that runs alone or beside others."""
        return self._threads if alone and self._block_bytes >= ALONE_THREADS_BYTES else self._operator_threads

    def _is_reversed(self, block: int) -> bool:
        return self.bundle.blocks[block].order == "reversed"

    def _run(self, block: int, kind: str, outputs: tuple[str, ...], **arrays: Any) -> list[npt.NDArray[Any]]:
        """Run a forward or gradient graph on a whole batch: a few images at a time, side by side where that is faster.

        The activations of all runs together stay within ACTIVATION_BYTES, or are those of one image each.
        """
        config, batch = self.bundle.config, len(arrays["patches"])
        given = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
        image_bytes = 4 * config.patches * (4 * config.heads * config.patches + 20 * config.width)
        size = max(1, min(ACTIVATION_BYTES // (image_bytes * self.workers), math.ceil(batch / self.workers)))
        pieces = [{name: array[i : i + size] for name, array in given.items()} for i in range(0, batch, size)]
        session = self._open(block, kind, self._threads_of(alone=len(pieces) == 1))
        if len(pieces) == 1 or self.workers == 1:
            results = [session.run(piece, outputs) for piece in pieces]
        else:
            with ThreadPoolExecutor(min(self.workers, len(pieces)), thread_name_prefix="tarflow") as pool:
                results = list(pool.map(lambda piece: session.run(piece, outputs), pieces))
        return [np.concatenate(arrays) for arrays in zip(*results, strict=True)]

    def _open(self, block: int, kind: str, threads: int) -> Session:
        """The session of a graph as the bundle has it, with `threads` inside its operators."""

        def make() -> Session:
            path: Path = getattr(self.bundle.blocks[block], kind)
            self._parse(block, path)
            return Session(path, folder=path.parent, threads=threads, spinning=kind == "step")

        with self._lock:
            return self._cached(block, (kind, threads), make)

    def _open_vjp(self, block: int, threads: int) -> SplitBlock | None:
        """The sessions of both halves of the gradient graph; None where it is not of the form that can be cut."""
        path = self.bundle.blocks[block].gradient

        def opener(half: str) -> Callable[[], Session]:
            return lambda: Session(getattr(halves(), half), folder=path.parent, threads=threads, spinning=False)

        @functools.cache
        def halves() -> SplitGradient:
            return split_gradient(self._parse(block, path))

        with self._lock:
            if (block, "vjp") in self._declined:
                return None
            try:
                kinds = [("vjp", half, threads) for half in ("forward", "backward")]
                return SplitBlock(*(self._cached(block, kind, opener(kind[1])) for kind in kinds))
            except PatternMismatch as error:
                self._declined[(block, "vjp")] = str(error)
                return None

    def _parse(self, block: int, path: Path) -> Any:
        """The graph as a ModelProto, all of its external tensors in the block's weights."""
        model = proto.parse_model(path.read_bytes(), where=str(path))
        proto.check_external_data(model, self.bundle.blocks[block].weights, where=str(path))
        return model

    def _open_rewritten(
        self, block: int, inputs: StepInputs, *, windows: bool, threads: int
    ) -> tuple[Session, SequentialTables] | None:
        """The session of the rewritten step graph and its tables; None where the rewrites or ONNX Runtime declined."""
        temperature = bool(np.any(inputs.inverse_temperature != 1.0))
        kind = (inputs.branches, temperature, windows)

        def make() -> Session:
            model, files = self._rewrite(block, *kind), self.bundle.blocks[block]
            if not self._int8:
                return Session(model, folder=files.step.parent, threads=threads)
            with tempfile.TemporaryDirectory(prefix="tarflow-", ignore_cleanup_errors=True) as name:
                model = int8_weights.rewrite(model, self.bundle.config, files.weights, folder=Path(name))
                return Session(model, folder=Path(name), threads=threads)

        with self._lock:
            if (block, *kind) in self._declined:
                return None
            try:
                return self._cached(block, (*kind, threads), make), self._tables[block]
            except (PatternMismatch, EngineError) as error:
                if self._closed:
                    raise
                if self._int8:
                    raise EngineError(
                        f"block {block} cannot run with int8 weights: {error}", hint="use the weights as stored"
                    ) from error
                self._declined[(block, *kind)] = str(error)
                return None

    def _rewrite(self, block: int, branches: int, temperature: bool, windows: bool) -> bytes:
        """The rewritten step graph of a block; its tables are read on the way."""
        files = self.bundle.blocks[block]
        model = self._parse(block, files.step)
        graph = sequential_graph(model, self.bundle.config, branches=branches, temperature=temperature, windows=windows)
        if block not in self._tables:
            pos_embed = proto.external_array(graph.pos_embed, files.weights)
            class_embed = None if graph.class_embed is None else proto.external_array(graph.class_embed, files.weights)
            ordered = np.ascontiguousarray(pos_embed[::-1]) if self._is_reversed(block) else pos_embed
            self._tables[block] = SequentialTables(pos_embed=ordered, class_embed=class_embed)
        return graph.model

    def _cached(self, block: int, key: tuple[object, ...], make: Callable[[], Session]) -> Session:
        """The session under that key, opened when it is not there; the one used longest ago goes when many are."""
        if self._closed:
            raise EngineError("the engine is closed", hint="load the bundle again")
        session = self._sessions.pop((block, *key), None) or make()
        self._sessions[(block, *key)] = session
        while len(self._sessions) > max(1, SESSIONS_BYTES // self._block_bytes):
            del self._sessions[next(iter(self._sessions))]
        return session
