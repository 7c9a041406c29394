"""The `Stepper`s of ONNX Runtime on CPU: for the portable step graph, and for its rewrite for one patch at a time."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._engine import Floats, Integers
from tarflow_runtimes._engines._cache_pool import CachePool
from tarflow_runtimes._engines._session import BoundRun, Session, aligned_zeros


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """What an inverse of one block starts from: noise [B, N, D] in image order, labels [G, B], guidance [2, N]."""

    noise: Floats
    labels: Integers | None
    guidance: Floats
    inverse_temperature: Floats
    is_reversed: bool
    cache_dtype: str

    @property
    def branches(self) -> int:
        """G."""
        return len(self.inverse_temperature)

    @property
    def rows(self) -> int:
        """R = G * B."""
        return self.branches * len(self.noise)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SequentialTables:
    """Rows that the rewritten graph is given per step, float32: pos_embed [N, W] in block order, class_embed [., W]."""

    pos_embed: Floats
    class_embed: Floats | None


class _PatchLog:
    """Noise and finished patches in block order, [N, B, D]: a step reads and writes one contiguous slab."""

    def __init__(self, inputs: StepInputs) -> None:
        self.is_reversed = inputs.is_reversed
        ordered = inputs.noise[:, ::-1] if self.is_reversed else inputs.noise
        self.noise: Floats = np.ascontiguousarray(ordered.transpose(1, 0, 2))
        self.finished = self.noise.copy()

    def result(self) -> Floats:
        patches = self.finished.transpose(1, 0, 2)
        return np.ascontiguousarray(patches[:, ::-1] if self.is_reversed else patches)


def _bind_caches(
    config: ModelConfig,
    inputs: StepInputs,
    make: Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[Any]] = aligned_zeros,
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
    """Caches by input name, and the same arrays by output name: the graph updates them in place.

    Zeroed for masked attention, which multiplies unwritten entries by zero, and zero times stray NaN is NaN.
    """
    shape = (inputs.rows, config.heads, config.patches, config.head_dim)
    names = [f"{kind}_{layer}" for layer in range(config.layers) for kind in ("key", "value")]
    caches = {name: make(shape, inputs.cache_dtype) for name in names}
    return caches, {f"next_{name}": cache for name, cache in caches.items()}


class PortableStepper:
    """Runs the bundle's step graph as it is, S = 1, all images at one position."""

    def __init__(self, session: Session, config: ModelConfig, inputs: StepInputs) -> None:
        self._log = _PatchLog(inputs)
        self._step = 0
        self._position = np.zeros(len(inputs.noise), np.int64)
        self._patch = aligned_zeros((len(inputs.noise), 1, config.patch_values), np.float32)
        self._patch[:, 0] = self._log.noise[0]
        caches, next_caches = _bind_caches(config, inputs)
        arrays: dict[str, npt.NDArray[Any]] = {
            "patches": self._patch,
            "noise": np.ascontiguousarray(inputs.noise),
            "guidance": np.ascontiguousarray(inputs.guidance),
            "position": self._position,
            "inverse_temperature": np.ascontiguousarray(inputs.inverse_temperature),
            **caches,
        }
        if inputs.labels is not None:
            arrays["labels"] = np.ascontiguousarray(inputs.labels)
        # `next` may lie where `patches` does: it is written last, from values that needed all of `patches`.
        self._run = BoundRun(session, arrays, {"next": self._patch, **next_caches})

    def advance(self) -> None:
        """Finish the next patch."""
        self._run()
        self._step += 1
        self._log.finished[self._step] = self._patch[:, 0]
        self._position += 1

    def result(self) -> Floats:
        """The patches in image order."""
        return self._log.result()


class SequentialStepper:
    """Runs the rewritten step graph, whose rows of embeddings, noise and guidance are looked up here.

    Its attention reads the written entries of the caches alone, so that they may come from a pool as they are.
    """

    def __init__(
        self,
        session: Session,
        config: ModelConfig,
        inputs: StepInputs,
        tables: SequentialTables,
        pool: CachePool | None = None,
    ) -> None:
        batch, branches, rows = len(inputs.noise), inputs.branches, inputs.rows
        self._log = _PatchLog(inputs)
        self._step = 0
        self._pos_embed = tables.pos_embed
        self._class_rows: Floats | float = 0.0
        if tables.class_embed is not None and inputs.labels is not None:
            self._class_rows = tables.class_embed[inputs.labels.ravel()]
        values = [
            inputs.guidance[:, :, None].repeat(config.patch_values, axis=2)[i] for i in ((0, 1) if config.nvp else (1,))
        ]
        self._weights = np.concatenate(values, axis=1)  # (N, 2D), or (N, D) without nvp

        self._rows = aligned_zeros((rows, config.patch_values), np.float32)
        self._branch_rows = self._rows.reshape(branches, batch, config.patch_values)
        self._branch_rows[:] = self._log.noise[0]
        self._embedding = aligned_zeros((rows, config.width), np.float32)
        self._z = aligned_zeros((batch, config.patch_values), np.float32)
        self._g = aligned_zeros((1, self._weights.shape[1]), np.float32)
        self._lengths = aligned_zeros((rows,), np.int32)
        self._total = aligned_zeros((1,), np.int32)
        self._next = self._rows[:batch]  # written last, from values that needed all of the rows
        caches, next_caches = _bind_caches(config, inputs, aligned_zeros if pool is None else pool.take)
        if pool is not None:
            weakref.finalize(self, pool.give, tuple(caches.values())).atexit = False
        arrays: dict[str, npt.NDArray[Any]] = {
            "rows": self._rows,
            "embedding": self._embedding,
            "z": self._z,
            "g": self._g,
            "lengths": self._lengths,
            "total": self._total,
            **caches,
        }
        if "query_factor" in session.inputs:
            factor = aligned_zeros((rows, 3 * config.width), inputs.cache_dtype)
            factor[:] = 1.0
            factor[:, : config.width] = inputs.inverse_temperature.repeat(batch)[:, None]
            arrays["query_factor"] = factor
        self._run = BoundRun(session, arrays, {"next": self._next, **next_caches})

    def advance(self) -> None:
        """Finish the next patch."""
        step = self._step
        np.add(self._class_rows, self._pos_embed[step], out=self._embedding)
        self._lengths.fill(step)
        self._total.fill(step + 1)
        self._z[:] = self._log.noise[step + 1]
        self._g[0] = self._weights[step]
        self._run()
        self._step = step + 1
        self._log.finished[step + 1] = self._next
        if len(self._branch_rows) > 1:
            self._branch_rows[1] = self._next

    def result(self) -> Floats:
        """The patches in image order."""
        return self._log.result()
