"""`PortableRunner` and `DecodeLoopRunner`: simple runners on the CPU, with which the verification runs graphs.

They keep one session at a time, so that they use the memory of one block. Each implements the `Passes` of an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tarflow_runtimes.bundle.reader import PORTABLE, Bundle
from tarflow_runtimes.decode.plan import BlockReport, Parallel
from tarflow_runtimes.decode.turn import Conditions, Floats, Integers, OnTurn, Turn
from tarflow_runtimes.engines.api import Cotangent
from tarflow_runtimes.engines.ort_cpu.session import Session

Arrays = dict[str, np.ndarray[Any, Any]]


class _Runner:
    """Graphs of one provider through ONNX Runtime; `threads` of each operator is its own choice unless given."""

    def __init__(self, bundle: Bundle, provider: str, threads: int | None) -> None:
        self.name, self.provider, self.precision = f"{provider} on the CPU", provider, bundle.precision
        self.bundle, self.config = bundle, bundle.config
        self._threads = threads
        self._open: tuple[tuple[str, int], Session] | None = None

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> z [B, N, D], log|det| [B]."""
        results = self.run("forward", block, {"patches": patches}, labels)
        return results["z"], results["log_det"]

    def vjp(
        self, blocks: Sequence[int], patches: Floats, labels: Integers | None, cotangent: Cotangent
    ) -> tuple[Floats, Floats]:
        """The gradient of one block; z is not computed, and the cotangent must not depend on it."""
        (block,) = blocks
        given: Arrays = {"patches": patches, "cotangent": cotangent(patches, slice(0, len(patches)))}
        return patches, self.run("gradient", block, given, labels)["gradient"]

    def run(self, kind: str, block: int, feeds: Arrays, labels: Integers | None) -> Arrays:
        """Run once and return copies of the outputs by name; the originals keep all memory of the session alive."""
        session = self._session(kind, block)
        given = feeds if labels is None else {**feeds, "labels": labels}
        results = session.run({name: np.ascontiguousarray(array) for name, array in given.items()}, session.outputs)
        return {name: result.copy() for name, result in zip(session.outputs, results, strict=True)}

    def ordered(self, block: int, patches: Floats) -> Floats:
        """Convert between the order of the data and that of a block."""
        return patches[:, ::-1] if self.bundle.blocks[block].is_reversed else patches

    def caches(self, rows: int) -> Arrays:
        """Caches filled with ones: the earlier contents of a cache must not matter."""
        config = self.config
        shape = (rows, config.heads, config.patches, config.head_dim)
        names = [f"{kind}_{layer}" for layer in range(config.layers) for kind in ("key", "value")]
        return {name: np.ones(shape, self.bundle.cache_dtype) for name in names}

    def _session(self, kind: str, block: int) -> Session:
        key = (kind, block)
        if self._open is None or self._open[0] != key:
            self._open = None  # frees the last one before the next one is loaded
            path = self.bundle.graph(self.provider, kind, block)
            session = Session(
                self.bundle.read(path),
                name=self.bundle.name(path),
                folder=self.bundle.blocks[block].weights.parent,
                threads=self._threads or 0,
                spinning=False,  # slow beside other work
            )
            self._open = (key, session)
        return self._open[1]


class PortableRunner(_Runner):
    """Runs the portable graphs."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        super().__init__(bundle, PORTABLE, threads)

    def invert(
        self, turns: Sequence[Turn], noise: Floats, conditions: Conditions, _: OnTurn | None = None
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """Invert a block: x_0 = z_0, x_{i+1} = z_{i+1} * exp(a_i) + b_i for some steps, or one window of its start."""
        (turn,) = turns
        fixed: Arrays = {
            "noise": noise,
            "guidance": conditions.guidance,
            "inverse_temperature": conditions.inverse_temperature,
        }
        state = self.caches(conditions.branches * len(noise))
        x = self.ordered(turn.block, noise if turn.start is None else turn.start).copy()
        stride = turn.strategy.window if isinstance(turn.strategy, Parallel) else 1
        for i in range(turn.steps or self.config.patches - 1):
            position = np.full(len(noise), i, np.int64)
            feeds: Arrays = {"patches": x[:, i : i + stride], "position": position, **fixed, **state}
            results = self.run("step", turn.block, feeds, conditions.labels)
            x[:, i + 1 : i + 1 + stride] = results.pop("next")
            state = _next(results)
        return np.ascontiguousarray(self.ordered(turn.block, x)), ()


class DecodeLoopRunner(_Runner):
    """Runs the decode-loop graphs of a provider as a device does: outputs become the next inputs."""

    def __init__(self, bundle: Bundle, provider: str, *, threads: int | None = None) -> None:
        super().__init__(bundle, provider, threads)

    def invert(
        self, turns: Sequence[Turn], noise: Floats, conditions: Conditions, _: OnTurn | None = None
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """One turn, for its first steps or evaluations."""
        (turn,) = turns
        batch, patches = len(noise), self.config.patches
        size = turn.strategy.window if isinstance(turn.strategy, Parallel) else 1
        start = noise if turn.start is None else turn.start
        fixed: Arrays = {
            "noise": noise,
            "guidance": conditions.guidance,
            "inverse_temperature": conditions.inverse_temperature,
            "kv_positions": np.arange(patches),
            "tolerance": np.zeros(1, np.float32),
        }
        state: Arrays = {
            "window": self.ordered(turn.block, start)[:, : size + 1],
            "position": np.zeros(batch, np.int64),
            "residual": np.zeros(batch, np.float32),
            "calls": np.zeros(batch, np.int64),
            "finished": start[:, None],
            **self.caches(conditions.branches * batch),
        }
        kind = "window" if isinstance(turn.strategy, Parallel) else "step"
        names = self._session(kind, turn.block).inputs
        fixed = {name: array for name, array in fixed.items() if name in names}
        for _launch in range(turn.steps or patches - 1):
            state = _next(self.run(kind, turn.block, {**fixed, **state}, conditions.labels))
        return state["finished"][:, 0], ()


def _next(results: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """Rename outputs to the inputs of the next launch."""
    return {name.removeprefix("next_"): array for name, array in results.items()}
