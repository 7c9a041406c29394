"""`step` and `window` of `trt` and `ort-cuda`: a graph whose outputs are its inputs' next values.

To decode, launch it repeatedly. For each image, in block order, with f the step (`step.py`) and p = `position`, the
last settled patch:

    base = min(p, N-1-S);  new_i = f(window[:S])_i for the patches i = base+1 .. base+S
    c = the first i > p with |new_i - x_i| > tolerance (maximum norm), or base+S where none moved that far
    x_i <- new_i for i = c .. base+S, the others stay;  p <- c

`step` is the case S = 1, where c = p + 1 and nothing is compared. An image with p = N-1 is finished and does not
change.

docs/BUNDLE.md describes the state, and what is updated in place. Patches are read from the output of the scatter, never
from its input: nothing depends on when the in-place write happens. `order`, which maps block order to the order of the
data, is its own inverse and monotone: S adjacent patches are also adjacent in the order of the data, forwards or
backwards.

The graphs of `trt` read the first L cache entries. Those of `ort-cuda` read all N, because ONNX Runtime would copy a
part of a cache before it reads it: three times the bytes, and half of them on average.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np
import onnx_ir as ir

from tarflow_export._graphs.builder import DTYPES, GraphBuilder, Operand
from tarflow_export._graphs.layers import label_input
from tarflow_export._graphs.step import Fed, cache_inputs, next_patches

LARGEST: Final = float(np.finfo(np.float32).max)
"""`|x| < LARGEST` says that x is finite: it does not hold for NaN."""


def build_decode_loop(op: GraphBuilder, *, single: bool, limited: bool) -> ir.Model:
    """The graph of one block; `single`: of one patch at a time, `limited`: attention reads L entries."""
    patches, values = op.config.patches, op.config.patch_values
    state = _State(op, single=single)
    tolerance = None if single else op.input("tolerance", "float32", [1])
    fed = Fed(
        patches=state.fed,
        position=state.base,
        noise=op.input("noise", "float32", ["B", patches, values]),
        guidance=op.input("guidance", "float32", ["B", 2, patches]),
        labels=label_input(op, ["G", "B"]),
        inverse_temperature=op.input("inverse_temperature", "float32", ["G", "B"]),
        caches=cache_inputs(op),
        kv_positions=op.input("kv_positions", "int64", ["L"]) if limited else None,
    )
    new = next_patches(op, fed, single=single)
    settled = _take(op, state, new) if tolerance is None else _settle(op, state, new, tolerance)
    finished = _write(op, state, settled.patches)
    window = _next_window(op, state, settled.position, finished)
    op.output(window, "next_window", "float32", state.window_shape)
    op.output(settled.position, "next_position", "int64", ["B"])
    op.output(settled.residual, "next_residual", "float32", ["B"])
    op.output(state.next_calls, "next_calls", "int64", ["B"])
    op.output(finished, "next_finished", "float32", state.finished_shape)
    return op.model()


class _State:
    """The state of the images, and the inputs that an evaluation takes from it."""

    def __init__(self, op: GraphBuilder, *, single: bool) -> None:
        patches, values = op.config.patches, op.config.patch_values
        self.single, self.last = single, patches - 1
        self.window_shape: list[int | str] = ["B", 2 if single else "S + 1", values]
        self.finished_shape: list[int | str] = ["B", 1, patches, values]
        self.window = op.input("window", "float32", self.window_shape)
        self.position = op.input("position", "int64", ["B"])
        self.residual = op.input("residual", "float32", ["B"])
        self.calls = op.input("calls", "int64", ["B"])
        self.finished = op.input("finished", "float32", self.finished_shape)
        with op.scope("state"):
            self.fed = op.Slice(self.window, [0], [-1], [1])  # (B, S, D): patches base .. base+S-1
            self.old = op.Slice(self.window, [1], [patches], [1])  # (B, S, D): base+1 .. base+S
            self.steps: Operand = [1] if single else op.Shape(self.fed, start=1, end=2)  # (S)
            self.base = self.base_of(op, self.position)
            self.unfinished = op.Less(self.position, self.last)  # (B)
            self.next_calls = op.Add(self.calls, op.Cast(self.unfinished, to=DTYPES["int64"]))

    def base_of(self, op: GraphBuilder, position: ir.Value) -> ir.Value:
        """min(position, N-1-S), [B]."""
        furthest = [self.last - 1] if self.single else op.Sub(self.last, self.steps)
        return op.Min(position, furthest)

    def places(self, op: GraphBuilder, base: ir.Value, *, start: int, extra: int = 0) -> ir.Value:
        """The indices of the S + `extra` patches from base + `start`, in the order of the data, [B, S + extra]."""
        if self.single:
            numbers: Operand = list(range(start, start + 1 + extra))
        else:
            numbers = op.Range(start, op.Add(op.Squeeze(self.steps, [0]), start + extra), 1)
        return op.Gather(op.order, op.Add(op.Unsqueeze(base, [1]), numbers), axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Settled:
    """The patches base+1 .. base+S [B, S, D], and the next position and residual [B]."""

    patches: ir.Value
    position: ir.Value
    residual: ir.Value


def _take(op: GraphBuilder, state: _State, new: ir.Value) -> _Settled:
    """The new patch of each image that is not finished."""
    with op.scope("take"):
        patches = op.Where(op.Unsqueeze(state.unfinished, [1, 2]), new, state.old)
        # The base of a finished image is one less than its position, so that it comes to N-1 again.
        position = op.Add(state.base, 1)
        residual = op.Max(state.residual, _overflow(op, patches))
    return _Settled(patches=patches, position=position, residual=residual)


def _settle(op: GraphBuilder, state: _State, new: ir.Value, tolerance: ir.Value) -> _Settled:
    """Old patches up to the first that moved, new ones from there on.

    Patches at or before p, in the window of an image that is nearly finished, keep their settled value.
    """
    steps, old = state.steps, state.old
    with op.scope("settle"):
        index = op.Range(0, op.Squeeze(steps, [0]), 1)  # (S): of patch base + 1 + index
        before = op.Less(index, op.Unsqueeze(op.Sub(state.position, state.base), [1]))  # (B, S): settled before

        distance = op.Abs(op.Sub(new, old))
        distance = op.Where(_is_finite(op, new), distance, math.inf)  # a maximum may leave NaN out
        moved = op.ReduceMax(distance, [2], keepdims=0)  # (B, S)
        # The last patch of the window has no key yet, so that it always takes its new value.
        limit = op.Where(op.Equal(index, op.Sub(steps, 1)), -1.0, tolerance)  # (S)
        stays = op.Or(before, op.LessOrEqual(moved, limit))
        first = op.ReduceMin(op.Where(stays, steps, index), [1], keepdims=1)  # (B, 1): of patch c
        kept = op.Less(index, first)  # (B, S)
        patches = op.Where(op.Unsqueeze(kept, [2]), old, new)

        gained = op.Min(op.Add(first, 1), steps)  # (B, 1)
        position = op.Add(state.base, op.Squeeze(gained, [1]))
        accepted = op.Where(op.Xor(kept, before), moved, 0.0)  # (B, S): of patches settled as they stood
        residual = op.Max(state.residual, op.ReduceMax(accepted, [1], keepdims=0), _overflow(op, patches))
    return _Settled(patches=patches, position=position, residual=residual)


def _is_finite(op: GraphBuilder, x: ir.Value) -> ir.Value:
    return op.Less(op.Abs(x), LARGEST)


def _overflow(op: GraphBuilder, patches: ir.Value) -> ir.Value:
    """[B]: 0 for images whose patches [B, S, D] are all finite, else inf."""
    return op.ReduceMax(op.Where(_is_finite(op, patches), 0.0, math.inf), [1, 2], keepdims=0)


def _write(op: GraphBuilder, state: _State, patches: ir.Value) -> ir.Value:
    """Write the patches base+1 .. base+S to their places in the order of the data: finished [B, 1, N, D]."""
    with op.scope("write"):
        places = state.places(op, state.base, start=1)  # (B, S)
        if state.single:
            start = op.Squeeze(places, [1])  # (B)
        else:
            start = op.ReduceMin(places, [1], keepdims=0)
            # Where in the update each patch goes is, forwards and backwards, also where each slot has its patch from.
            patches = _rows(op, patches, op.Sub(places, op.Unsqueeze(start, [1])))
        return op.TensorScatter(state.finished, op.Unsqueeze(patches, [1]), start, axis=-2, mode="linear")


def _next_window(op: GraphBuilder, state: _State, position: ir.Value, finished: ir.Value) -> ir.Value:
    """The patches that start at the next base."""
    with op.scope("next_window"):
        places = state.places(op, state.base_of(op, position), start=0, extra=1)
        return _rows(op, op.Squeeze(finished, [1]), places)


def _rows(op: GraphBuilder, patches: ir.Value, indices: ir.Value) -> ir.Value:
    """patches[b, indices[b]] for patches [B, ., D] and indices [B, .]."""
    return op.GatherND(patches, op.Unsqueeze(indices, [2]), batch_dims=1)
