"""`PortableEngine`: the graphs of a bundle exactly as they are, through ONNX Runtime, for the verification.

It applies no rewrites and keeps one session at a time, so that its memory is that of one block. Slow and simple.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import onnxruntime

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engine import Floats
from tarflow_runtimes._verify import Labels

Arrays = dict[str, np.ndarray[Any, Any]]


class PortableEngine:
    """Runs `forward`, `gradient` and `step` of the blocks of `bundle` on the CPU; a context manager.

    `threads` of each operator is ONNX Runtime's choice unless given.
    """

    name = "ort-cpu-portable"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._bundle = bundle
        self._threads = threads
        self._open: tuple[tuple[int, str], onnxruntime.InferenceSession] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open = None

    def forward(self, block: int, patches: Floats, labels: Labels) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> z [B, N, D], log|det| [B]."""
        results = self._run(block, "forward", {"patches": patches}, labels)
        return results["z"].copy(), results["log_det"].copy()

    def gradient(self, block: int, patches: Floats, cotangent: Floats, labels: Labels) -> Floats:
        """Derivative of (cotangent . z + log|det|) with respect to the patches, [B, N, D]."""
        return self._run(block, "gradient", {"patches": patches, "cotangent": cotangent}, labels)["gradient"].copy()

    def inverse(
        self, block: int, z: Floats, labels: Labels, *, guidance: Floats, inverse_temperature: Floats, steps: int
    ) -> Floats:
        """x_0 = z_0, x_{i+1} = z_{i+1} * exp(a_i) + b_i for the first `steps` patches; the others stay zero."""
        config, order = self._bundle.config, self._order(block)
        state = self._caches(len(z) * len(inverse_temperature))
        fixed: Arrays = {"noise": z, "guidance": guidance, "inverse_temperature": inverse_temperature}
        x = np.zeros_like(z)
        x[:, order[0]] = z[:, order[0]]
        for i in range(min(steps, config.patches - 1)):
            position = np.full(len(z), i, np.int64)
            feeds: Arrays = {"patches": x[:, order[i], None], "position": position, **fixed, **state}
            results = self._run(block, "step", feeds, labels)
            x[:, order[i + 1]] = results.pop("next")[:, 0]
            state = {name.removeprefix("next_"): cache for name, cache in results.items()}
        return x

    def window(self, block: int, patches: Floats, noise: Floats, labels: Labels) -> Floats:
        """Patches 1 .. N-1 in block order, [B, N-1, D], in one unguided step over the finished patches before them."""
        config = self._bundle.config
        feeds: Arrays = {
            "patches": patches[:, self._order(block)[:-1]],
            "noise": noise,
            "guidance": np.zeros((2, config.patches), np.float32),
            "inverse_temperature": np.ones(1, np.float32),
            "position": np.zeros(len(patches), np.int64),
            **self._caches(len(patches)),
        }
        return self._run(block, "step", feeds, None if labels is None else labels[None])["next"].copy()

    def _order(self, block: int) -> np.ndarray[Any, Any]:
        order = np.arange(self._bundle.config.patches)
        return order if self._bundle.blocks[block].order == "identity" else order[::-1]

    def _caches(self, rows: int) -> Arrays:
        """Caches filled with ones: what a cache held before must not matter."""
        config = self._bundle.config
        shape = (rows, config.heads, config.patches, config.head_dim)
        names = [f"{kind}_{layer}" for layer in range(config.layers) for kind in ("key", "value")]
        return {name: np.ones(shape, self._bundle.cache_dtype) for name in names}

    def _run(self, block: int, kind: str, feeds: Arrays, labels: Labels) -> Arrays:
        """The outputs by name; whoever keeps one copies it: as it is, it keeps all memory of its session alive."""
        session = self._session(block, kind)
        names = [output.name for output in session.get_outputs()]
        given = feeds if labels is None else {**feeds, "labels": labels}
        results = session.run(names, {name: np.ascontiguousarray(array) for name, array in given.items()})
        return dict(zip(names, results, strict=True))

    def _session(self, block: int, kind: str) -> onnxruntime.InferenceSession:
        if self._open is None or self._open[0] != (block, kind):
            self._open = None  # frees the last one before the next one is loaded
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # without bound caches it warns at every step that they are copied
            options.intra_op_num_threads = self._threads or 0
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # slow beside other work
            path = str(getattr(self._bundle.blocks[block], kind))
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self._open = ((block, kind), session)
        return self._open[1]
