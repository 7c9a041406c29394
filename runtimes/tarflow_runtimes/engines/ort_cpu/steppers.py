"""Steps and windows of ONNX Runtime on the CPU, using the run-ready graphs `step` and `window` of provider `ort-cpu`.

Embeddings, noise and guidance of a step are looked up here. Attention reads only the written entries of the caches, so
that caches from a pool need not be cleared.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.decode.turn import Conditions, Floats
from tarflow_runtimes.engines.ort_cpu.caches import CachePool
from tarflow_runtimes.engines.ort_cpu.session import BoundRun, Session, aligned_zeros

Arrays = dict[str, npt.NDArray[Any]]

CACHES: Final = ("key_", "value_")
"""The prefixes of the names of caches."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Embeddings as inputs of the graphs, float32: pos_embed [N, W] in block order, class_embed [classes + 1, W]."""

    pos_embed: Floats
    class_embed: Floats | None

    @classmethod
    def of(cls, bundle: Bundle, block: int) -> Tables:
        """The embeddings of a block."""
        pos_embed = bundle.tensor(block, "pos_embed")
        if bundle.blocks[block].is_reversed:
            pos_embed = np.ascontiguousarray(pos_embed[::-1])
        class_embed = bundle.tensor(block, "class_embed") if bundle.config.classes else None
        return cls(pos_embed=pos_embed, class_embed=class_embed)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepInputs:
    """The inputs of the inverse of one block: noise [B, N, D] in block order, and the conditions of these images."""

    bundle: Bundle
    tables: Tables
    noise: Floats
    conditions: Conditions

    def weights(self) -> Floats:
        """The guidance of each step, [N, B, 2D]: g_a D times, then g_b D times; [N, B, D] without nvp."""
        config = self.bundle.config
        by_step = self.conditions.guidance.transpose(2, 0, 1)  # (N, B, 2)
        return np.repeat(by_step if config.nvp else by_step[:, :, 1:], config.patch_values, axis=2)

    def class_rows(self) -> Floats | float:
        """The embeddings of the labels, [R, W]; 0 for models without classes."""
        if self.tables.class_embed is None or self.conditions.labels is None:
            return 0.0
        rows: Floats = self.tables.class_embed[self.conditions.labels.ravel()]
        return rows

    def query_factor(self, repeat: int = 1) -> npt.NDArray[Any]:
        """[R * repeat, 3W]: 1/tau in the first W columns, 1 in the others."""
        temperatures = self.conditions.inverse_temperature.ravel().repeat(repeat)
        width = self.bundle.config.width
        factor = aligned_zeros((len(temperatures), 3 * width), self.bundle.cache_dtype)
        factor[:] = 1.0
        factor[:, :width] = temperatures[:, None]
        return factor


class SequentialStepper:
    """The inverse of one block for B images at the same position: a `decode.sequential.Stepper`."""

    def __init__(self, session: Session, inputs: StepInputs, pool: CachePool) -> None:
        config = inputs.bundle.config
        batch, branches = len(inputs.noise), inputs.conditions.branches
        rows = branches * batch
        self._step = 0
        # Patch by patch, [N, B, D]: a step reads and writes one contiguous slab.
        self._noise: Floats = np.ascontiguousarray(inputs.noise.transpose(1, 0, 2))
        self._finished = self._noise.copy()
        self._pos_embed, self._class_rows, self._weights = (
            inputs.tables.pos_embed,
            inputs.class_rows(),
            inputs.weights(),
        )
        self._rows = aligned_zeros((rows, config.patch_values), np.float32)
        self._branch_rows = self._rows.reshape(branches, batch, config.patch_values)
        self._branch_rows[:] = self._noise[0]
        self._embedding = aligned_zeros((rows, config.width), np.float32)
        self._z = aligned_zeros((batch, config.patch_values), np.float32)
        self._g = aligned_zeros(self._weights.shape[1:], np.float32)
        self._lengths = aligned_zeros((rows,), np.int32)
        self._total = aligned_zeros((1,), np.int32)
        self._next = self._rows[:batch]  # written last, from values that needed all of the rows
        shape = (rows, config.heads, config.patches, config.head_dim)
        caches = {
            name: pool.take(shape, inputs.bundle.cache_dtype) for name in session.inputs if name.startswith(CACHES)
        }
        weakref.finalize(self, pool.give, tuple(caches.values())).atexit = False
        arrays: Arrays = {
            "rows": self._rows,
            "embedding": self._embedding,
            "z": self._z,
            "g": self._g,
            "lengths": self._lengths,
            "total": self._total,
            **caches,
        }
        if "query_factor" in session.inputs:
            arrays["query_factor"] = inputs.query_factor()
        self._run = BoundRun(session, arrays, {"next": self._next, **_updated(caches)})

    def advance(self) -> None:
        """Compute the next patch of all images."""
        step = self._step
        np.add(self._class_rows, self._pos_embed[step], out=self._embedding)
        self._lengths.fill(step)
        self._total.fill(step + 1)
        self._z[:] = self._noise[step + 1]
        self._g[:] = self._weights[step]
        self._run()
        self._step = step + 1
        self._finished[step + 1] = self._next
        if len(self._branch_rows) > 1:
            self._branch_rows[1] = self._next

    def result(self) -> Floats:
        """The patches [B, N, D] in block order; unfinished patches still hold their noise."""
        return self._finished.transpose(1, 0, 2)


class ImageWindows:
    """The inverse of one block for one image, evaluated on windows of patches: a `decode.parallel.Windows`.

    Row g * S + j of every input is patch j of branch g. The arrays for a length S are bound when first needed.
    """

    def __init__(self, session: Session, inputs: StepInputs) -> None:
        config, tables = inputs.bundle.config, inputs.tables
        self._session, self._inputs, self._noise = session, inputs, inputs.noise[0]
        shape = (1, config.heads, config.patches, config.head_dim)
        names = [name for name in session.inputs if name.startswith(CACHES)]
        self._caches: Arrays = {name: aligned_zeros(shape, inputs.bundle.cache_dtype) for name in names}
        self._branches = inputs.conditions.branches
        rows = np.reshape(inputs.class_rows(), (-1, 1, config.width if tables.class_embed is not None else 1))
        self._embedding = np.broadcast_to(tables.pos_embed + rows, (self._branches, config.patches, config.width))
        self._weights = inputs.weights()[:, 0]
        self._runs: dict[int, tuple[Arrays, Floats, BoundRun]] = {}

    def evaluate(self, first: int, patches: Floats) -> Floats:
        """Patches first .. first + S - 1 in block order, [S, D] -> the patches one position further, [S, D]."""
        length = len(patches)
        here, further = slice(first, first + length), slice(first + 1, first + length + 1)
        arrays, output, run = self._bound(length)
        arrays["rows"].reshape(self._branches, length, -1)[:] = patches
        arrays["embedding"].reshape(self._branches, length, -1)[:] = self._embedding[:, here]
        arrays["z"][:] = self._noise[further]
        arrays["g"][:] = self._weights[here]
        arrays["lengths"].fill(first + length - 1)
        arrays["total"].fill(first + length)
        run()
        return output.copy()

    def _bound(self, length: int) -> tuple[Arrays, Floats, BoundRun]:
        """The inputs to fill, the output to read and the run for windows of `length` patches."""
        if length not in self._runs:
            config, rows = self._inputs.bundle.config, self._branches * length
            arrays: Arrays = {
                "rows": aligned_zeros((rows, config.patch_values), np.float32),
                "embedding": aligned_zeros((rows, config.width), np.float32),
                "z": aligned_zeros((length, config.patch_values), np.float32),
                "g": aligned_zeros((length, self._weights.shape[1]), np.float32),
                "lengths": aligned_zeros((1,), np.int32),
                "total": aligned_zeros((1,), np.int32),
            }
            if "query_factor" in self._session.inputs:
                arrays["query_factor"] = self._inputs.query_factor(repeat=length)
            output = aligned_zeros((length, config.patch_values), np.float32)
            run = BoundRun(self._session, arrays | self._caches, {"next": output, **_updated(self._caches)})
            self._runs[length] = arrays, output, run
        return self._runs[length]


def _updated(caches: Arrays) -> Arrays:
    """The caches by output name: the graph updates them in place."""
    return {f"next_{name}": cache for name, cache in caches.items()}
