"""`SplitBlock`: z of a block and the way back, on the two halves of its gradient graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tarflow_runtimes._engine import Floats, Integers
from tarflow_runtimes._engines._ort_import import import_onnxruntime
from tarflow_runtimes._engines._session import Session


@dataclasses.dataclass(frozen=True, slots=True)
class SplitBlock:
    """Sessions of `split_gradient`'s graphs; what passes between them stays ONNX Runtime's and is never copied."""

    forward: Session
    backward: Session

    def run(self, patches: Floats, labels: Integers | None) -> tuple[Floats, Callable[[Floats], Floats]]:
        """Patches [B, N, D], labels [B] -> (z [B, N, D], cotangent -> gradient), the latter to be called once."""
        value = import_onnxruntime().OrtValue.ortvalue_from_numpy
        given = {"patches": patches} if labels is None else {"patches": patches, "labels": labels}
        feeds = {name: value(np.ascontiguousarray(array)) for name, array in given.items()}
        names = self.forward.outputs
        saved = dict(zip(names, self.forward.run_values(feeds, names), strict=True))
        z: Floats = saved.pop("z").numpy()

        def way_back(cotangent: Floats) -> Floats:
            saved["cotangent"] = value(np.ascontiguousarray(cotangent))
            (gradient,) = self.backward.run_values(saved, ["gradient"])
            saved.clear()
            result: Floats = gradient.numpy()
            return result

        return z, way_back
