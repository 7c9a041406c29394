"""The `Windows` of ONNX Runtime on CPU: for the rewritten step graph and for the portable one, one image each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._engine import Floats
from tarflow_runtimes._engines._session import BoundRun, Session, aligned_zeros
from tarflow_runtimes._engines._steppers import SequentialTables, StepInputs

Arrays = dict[str, npt.NDArray[Any]]


class _BoundWindows:
    """The caches of one image, and for every window length S the bound arrays of a run, made when first needed."""

    def __init__(self, session: Session, caches: Arrays) -> None:
        self._session = session
        self._caches = caches
        self._runs: dict[int, tuple[Arrays, Floats, BoundRun]] = {}

    def _bound(self, length: int) -> tuple[Arrays, Floats, BoundRun]:
        """The inputs to fill, the output to read and the run for windows of `length` patches."""
        if length not in self._runs:
            arrays, output = self._arrays(length)
            outputs = {f"next_{name}": cache for name, cache in self._caches.items()}
            run = BoundRun(self._session, arrays | self._caches, outputs | {"next": output})
            self._runs[length] = arrays, output, run
        return self._runs[length]

    def _arrays(self, length: int) -> tuple[Arrays, Floats]:
        raise NotImplementedError


class RewrittenWindows(_BoundWindows):
    """Runs the rewritten step graph, whose rows of embeddings, noise and guidance are looked up here.

    Row g * S + i of every input is patch i of branch g.
    """

    def __init__(self, session: Session, config: ModelConfig, inputs: StepInputs, tables: SequentialTables) -> None:
        self._config, self._inputs = config, inputs
        self._noise = inputs.noise[0]
        shape = (1, config.heads, config.patches, config.head_dim)
        names = [name for name in session.inputs if name.startswith(("key_", "value_"))]
        super().__init__(session, {name: aligned_zeros(shape, inputs.cache_dtype) for name in names})
        embedding = np.broadcast_to(tables.pos_embed, (inputs.branches, config.patches, config.width))
        if tables.class_embed is not None and inputs.labels is not None:
            embedding = embedding + tables.class_embed[inputs.labels]  # (G, N, W) + (G, 1, W)
        self._embedding = embedding
        kinds = (0, 1) if config.nvp else (1,)
        columns = [np.repeat(inputs.guidance[kind][:, None], config.patch_values, axis=1) for kind in kinds]
        self._weights = np.concatenate(columns, axis=1)  # (N, 2D), or (N, D) without nvp

    def evaluate(self, first: int, patches: Floats) -> Floats:
        """Patches first .. first + S - 1 in block order, [S, D] -> the patches one further, [S, D]."""
        length = len(patches)
        here, further = slice(first, first + length), slice(first + 1, first + length + 1)
        arrays, output, run = self._bound(length)
        arrays["rows"].reshape(self._inputs.branches, length, -1)[:] = patches
        arrays["embedding"].reshape(self._inputs.branches, length, -1)[:] = self._embedding[:, here]
        arrays["z"][:] = self._noise[further]
        arrays["g"][:] = self._weights[here]
        arrays["lengths"].fill(first + length - 1)
        arrays["total"].fill(first + length)
        run()
        return output.copy()

    def _arrays(self, length: int) -> tuple[Arrays, Floats]:
        config, inputs = self._config, self._inputs
        rows, values = inputs.branches * length, config.patch_values
        arrays: Arrays = {
            "rows": aligned_zeros((rows, values), np.float32),
            "embedding": aligned_zeros((rows, config.width), np.float32),
            "z": aligned_zeros((length, values), np.float32),
            "g": aligned_zeros((length, self._weights.shape[1]), np.float32),
            "lengths": aligned_zeros((1,), np.int32),
            "total": aligned_zeros((1,), np.int32),
            "query_factor": aligned_zeros((rows, 3 * config.width), inputs.cache_dtype),
        }
        arrays["query_factor"][:] = 1.0
        arrays["query_factor"][:, : config.width] = inputs.inverse_temperature.repeat(length)[:, None]
        return arrays, aligned_zeros((length, values), np.float32)


class PortableWindows(_BoundWindows):
    """Runs the step graph as the bundle has it."""

    def __init__(self, session: Session, config: ModelConfig, inputs: StepInputs) -> None:
        self._config = config
        shape = (inputs.rows, config.heads, config.patches, config.head_dim)
        names = [f"{kind}_{layer}" for layer in range(config.layers) for kind in ("key", "value")]
        super().__init__(session, {name: aligned_zeros(shape, inputs.cache_dtype) for name in names})
        noise = inputs.noise[:, ::-1] if inputs.is_reversed else inputs.noise
        self._shared: Arrays = {
            "noise": np.ascontiguousarray(noise),
            "guidance": np.ascontiguousarray(inputs.guidance),
            "inverse_temperature": inputs.inverse_temperature,
            "position": np.zeros(1, np.int64),
        }
        if inputs.labels is not None:
            self._shared["labels"] = np.ascontiguousarray(inputs.labels)

    def evaluate(self, first: int, patches: Floats) -> Floats:
        """Patches first .. first + S - 1 in block order, [S, D] -> the patches one further, [S, D]."""
        arrays, output, run = self._bound(len(patches))
        arrays["patches"][0] = patches
        arrays["position"].fill(first)
        run()
        following: Floats = output[0].copy()
        return following

    def _arrays(self, length: int) -> tuple[Arrays, Floats]:
        shape = (1, length, self._config.patch_values)
        return self._shared | {"patches": aligned_zeros(shape, np.float32)}, aligned_zeros(shape, np.float32)
