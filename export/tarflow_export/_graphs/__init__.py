"""All graphs of a bundle, written by hand with onnx-ir, one file each; the formats are in docs/BUNDLE.md.

All blocks of a model share them, because their weights lie at the same offsets of their own `weights.bin`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

import onnx_ir as ir

from tarflow_export._graphs.builder import IR_VERSION, OPSET, GraphBuilder
from tarflow_export._graphs.decode_loop import build_decode_loop
from tarflow_export._graphs.forward import build_forward
from tarflow_export._graphs.gradient import build_gradient, build_vjp_backward, build_vjp_forward
from tarflow_export._graphs.ort_cpu import FORMS, build_ort_cpu_step
from tarflow_export._graphs.step import build_step
from tarflow_runtimes.bundle.config import Precision

__all__ = ["BUILDERS", "IR_VERSION", "OPSET", "PRECISIONS", "GraphBuilder"]

Build = Callable[[GraphBuilder], ir.Model]

BUILDERS: Final[Mapping[str, Mapping[str, Build]]] = {
    "portable": {"forward": build_forward, "step": build_step, "gradient": build_gradient},
    "ort-cpu": {
        **{form.kind: functools.partial(build_ort_cpu_step, form=form) for form in FORMS},
        "vjp_forward": build_vjp_forward,
        "vjp_backward": build_vjp_backward,
    },
    "ort-cuda": {
        "step": functools.partial(build_decode_loop, single=True, limited=False),
        "window": functools.partial(build_decode_loop, single=False, limited=False),
    },
    "trt": {
        "step": functools.partial(build_decode_loop, single=True, limited=True),
        "window": functools.partial(build_decode_loop, single=False, limited=True),
    },
}
"""Provider -> kind -> the function that makes the graph; the names are those of the bundle."""

PRECISIONS: Final[Mapping[Precision, tuple[str, ...]]] = {
    "float32": ("portable", "ort-cpu", "ort-cuda", "trt"),
    "float16": ("portable", "ort-cpu", "ort-cuda", "trt"),
    "bfloat16": ("portable", "ort-cuda", "trt"),
    "int8": ("portable", "ort-cpu"),
}
"""The providers of the graphs in a bundle, by precision."""
