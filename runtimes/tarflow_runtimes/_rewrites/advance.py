"""The step graph -> the advance graph, whose outputs are its inputs' next values: decoding is launching it again.

Formula, image by image, in block order, with f the step graph and p = `position`, the last settled patch:
    base = min(p, N-1-S);  new_i = f(window[:S])_i for the patches i = base+1 .. base+S
    c = the first i > p with |new_i - x_i| > tolerance (maximum norm), or base+S where none moved that far
    x_i <- new_i for i = c .. base+S, the others stay;  p <- c
which is `_parallel.settle`, and `_sampler.inverse_block` where S = 1. An image with p = N-1 is finished and stays.

State, each as `name` and `next_name`; (a) is updated in place, input and output at one address:
    window f32 [B, S+1, D]          patches base .. base+S
    position i64 [B]                p, 0 at first
    residual f32 [B]                largest |new_i - x_i| of patches settled as they stood; inf once one was not finite
    calls i64 [B]                   evaluations while the image was not finished
    finished f32 [B, 1, N, D] (a)   patches in image order; at first what they are iterated from, x_0 = z_0 among them
    key_l, value_l [R, H, N, E] (a) caches; what is in them at first must be finite, and does not matter
Other inputs: `noise`, `guidance`, `labels`, `inverse_temperature` as in the step graph; `tolerance` f32 [1], absent
where S is frozen to 1; `reach` i64 [L], absent where L is frozen: 0, 1, ..., L-1, the entries of the caches that
attention reads, with L >= base + S for every image that is not finished.

Patches are read from what the scatter made, never from its input: nothing depends on when the write in place happens.
`order`, which leads from block order to image order, is its own inverse and monotone, so that the S patches lie side
by side in image order, too, forwards or backwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._rewrites._graph import Graph, PatternMismatch

LARGEST: Final = float(np.finfo(np.float32).max)
"""`|x| < LARGEST` says that x is finite: it does not hold for NaN."""

SWAPPED: Final = [0, 2, 1, 3]
"""The permutation between [R, S, H, E] and [R, H, S, E]."""

MEASURED: Final = {"G": ("inverse_temperature", 0), "B": ("patches", 0), "S": ("patches", 1)}
"""Axis -> the input and the axis of it from which the step graph takes its size."""


def advance_graph(
    model: Any,
    config: ModelConfig,
    *,
    images: int | None = None,
    branches: int | None = None,
    window: int | None = None,
    reach: int | None = None,
) -> bytes:
    """Rewrite the portable step graph (a ModelProto), with B, G, S and L frozen to the numbers that are given.

    `reach` = N attends to the whole caches, as the step graph does. With all four the graph has no Shape node.

    Raises:
        PatternMismatch: when the graph is not of the form that the rewrite knows.
    """
    sizes = {
        axis: size for axis, size in {"B": images, "G": branches, "S": window, "L": reach}.items() if size is not None
    }
    rewrite = _Rewrite(Graph(model), config, sizes)
    rewrite.limit_attention()
    if window == 1:
        rewrite.drop_transpositions()
    rewrite.close_loop()
    return rewrite.graph.serialized()


class _Rewrite:
    """The graph while it is rewritten; most methods add nodes and return the name of the value that these make."""

    def __init__(self, graph: Graph, config: ModelConfig, sizes: Mapping[str, int]) -> None:
        self.graph, self.config, self.sizes = graph, config, sizes
        self.last = config.patches - 1
        self.steps = self._freeze()  # [S]

    def _freeze(self) -> str:
        """Put the known sizes where the graph measures them; returns the value that holds S."""
        graph = self.graph
        shapes = [node for node in graph.nodes if node.op_type == "Shape"]
        measured = {(node.input[0], proto.attribute(node, "start", 0)): node.output[0] for node in shapes}
        if len(shapes) != len(MEASURED) or set(measured) != set(MEASURED.values()):
            raise PatternMismatch(f"found shapes of {sorted(measured)}, expected {sorted(MEASURED.values())}")
        values = {axis: measured[place] for axis, place in MEASURED.items()}
        for axis, value in values.items():
            if axis in self.sizes:
                values[axis] = self.integers(self.sizes[axis])
                graph.replace(value, values[axis])
        return str(values["S"])

    def op(self, op_type: str, name: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output, called `name` where the graph has such an output, else advance/`name`."""
        output = name if name in self.graph.outputs else f"advance/{name}"
        return self.graph.add(op_type, list(inputs), [output], **attributes)

    def integers(self, *numbers: int) -> str:
        """An int64 vector."""
        return self.graph.shape(*numbers)

    def number(self, value: float) -> str:
        """A scalar: int64 where it is an int, else float32."""
        dtype = np.int64 if isinstance(value, int) else np.float32
        return self.graph.constant(f"scalar_{value}", np.array(value, dtype))

    def count(self, name: str, *, start: int = 0, extra: int = 0) -> str:
        """The S + `extra` numbers from `start` on."""
        if "S" in self.sizes:
            return self.integers(*range(start, start + self.sizes["S"] + extra))
        steps = self.op("Squeeze", f"{name}/steps", self.steps)
        stop = self.op("Add", f"{name}/stop", steps, self.number(start + extra))
        return self.op("Range", name, self.number(start), stop, self.number(1))

    def limit_attention(self) -> None:
        """Let attention read the first L entries of the caches."""
        graph, reach = self.graph, self.sizes.get("L")
        if reach == self.config.patches:
            return
        columns = self._columns()
        if reach is None:
            graph.replace(columns, graph.declare_input("reach", proto.INT64, ("L",)))
            length = self.op("Shape", "length", "reach")
        else:
            graph.replace(columns, self.integers(*range(reach)))
            length = self.integers(reach)
        for layer in range(self.config.layers):
            for cache in (f"next_key_{layer}", f"next_value_{layer}"):
                graph.producer(cache, "TensorScatter")
                graph.replace(cache, f"advance/reached_{cache}")
                self.op("Slice", f"reached_{cache}", cache, self.integers(0), length, self.integers(2))

    def drop_transpositions(self) -> None:
        """Reshape instead: with S = 1, [R, S, H, E] and [R, H, S, E] are the same numbers in the same order."""
        graph, heads, width = self.graph, self.config.heads, self.config.head_dim
        nodes = [
            node for node in graph.nodes if node.op_type == "Transpose" and proto.attribute(node, "perm") == SWAPPED
        ]
        graph.remove(nodes)
        for node in nodes:
            to_heads = graph.producer(node.input[0]).op_type == "Reshape"
            shape = (-1, heads, 1, width) if to_heads else (-1, 1, heads, width)
            graph.add("Reshape", [node.input[0], self.integers(*shape)], list(node.output))

    def _columns(self) -> str:
        """What the mask compares with the positions of the rows: 0, 1, ..., N-1."""
        graph, found = self.graph, set()
        for node in graph.nodes:
            if node.op_type == "LessOrEqual":
                columns = graph.producer(node.input[0], "Range")
                if [graph.number(name) for name in columns.input] == [0, self.config.patches, 1]:
                    found.add(str(columns.output[0]))
        if len(found) != 1:
            raise PatternMismatch(f"found {len(found)} masks over the caches, expected one")
        return found.pop()

    def close_loop(self) -> None:
        """Feed the step graph from the state, and make the next state of what it yields."""
        graph, config = self.graph, self.config
        for name, elem_type, shape in (
            ("window", proto.FLOAT, ("B", "S + 1", config.patch_values)),
            ("position", proto.INT64, ("B",)),
            ("residual", proto.FLOAT, ("B",)),
            ("calls", proto.INT64, ("B",)),
            ("finished", proto.FLOAT, ("B", 1, config.patches, config.patch_values)),
        ):
            graph.declare_input(name, elem_type, shape)
            graph.outputs[f"next_{name}"] = proto.value_info(f"next_{name}", elem_type, shape)
        del graph.outputs["next"]
        graph.replace("position", "advance/base")
        graph.replace("patches", "advance/fed")
        base = self._base("base", "position")
        self.op("Slice", "fed", "window", self.integers(0), self.integers(-1), self.integers(1))
        old = self.op("Slice", "old", "window", self.integers(1), self.integers(config.patches), self.integers(1))

        unfinished = self.op("Less", "unfinished", "position", self.number(self.last))  # (B)
        self.op("Add", "next_calls", "calls", self.op("Cast", "call", unfinished, to=proto.INT64))
        if self.sizes.get("S") == 1:
            values = self._take(old, unfinished)
            # The base of a finished image is one less than its position, so that it comes to N-1 again.
            self.op("Add", "next_position", base, self.integers(1))
            self.op("Max", "next_residual", "residual", self._overflow(values))
        else:
            values = self._settle(old, base)
        self._write(values, base)
        self._next_window()
        self._declare_sizes()

    def _base(self, name: str, position: str) -> str:
        """min(position, N-1-S), [B]."""
        if "S" in self.sizes:
            furthest = self.integers(self.last - self.sizes["S"])
        else:
            furthest = self.op("Sub", f"{name}/furthest", self.number(self.last), self.steps)
        return self.op("Min", name, position, furthest)

    def _take(self, old: str, unfinished: str) -> str:
        """The new value of each image that is not finished, [B, 1, D]."""
        taken = self.op("Unsqueeze", "taken", unfinished, self.integers(1, 2))
        return self.op("Where", "values", taken, "next", old)

    def _settle(self, old: str, base: str) -> str:
        """The patches base+1 .. base+S from `next` and `old`, [B, S, D]; also makes the next position and residual.

        Patches at or before p, in the window of an image that is nearly finished, keep the value they were settled at.
        """
        self.graph.declare_input("tolerance", proto.FLOAT, (1,))
        index = self.count("index")  # (S): patch base + 1 + index
        offset = self.op("Unsqueeze", "offset", self.op("Sub", "overlap", "position", base), self.integers(1))
        settled = self.op("Less", "settled", index, offset)  # (B, S)

        distance = self.op("Abs", "distance", self.op("Sub", "difference", "next", old))
        finite = self._is_finite("next_is_finite", "next")  # a maximum may leave NaN out
        distance = self.op("Where", "known_distance", finite, distance, self.number(math.inf))
        moved = self.op("ReduceMax", "moved", distance, self.integers(2), keepdims=0)  # (B, S)
        # The last patch of the window has no key yet, so that it takes its value however little it moved.
        final = self.op("Equal", "is_final", index, self.op("Sub", "final", self.steps, self.integers(1)))
        limit = self.op("Where", "limit", final, self.number(-1.0), "tolerance")  # (S)
        stays = self.op("Or", "stays", settled, self.op("LessOrEqual", "is_still", moved, limit))
        moving = self.op("Where", "moving", stays, self.steps, index)
        first = self.op("ReduceMin", "first", moving, self.integers(1), keepdims=1)  # (B, 1): of patch c
        kept = self.op("Less", "kept", index, first)  # (B, S)
        values = self.op("Where", "values", self.op("Unsqueeze", "kept_each", kept, self.integers(2)), old, "next")

        gained = self.op("Min", "gained", self.op("Add", "count", first, self.integers(1)), self.steps)  # (B, 1)
        self.op("Add", "next_position", base, self.op("Squeeze", "gained_each", gained, self.integers(1)))
        accepted = self.op("Where", "accepted", self.op("Xor", "just_kept", kept, settled), moved, self.number(0.0))
        largest = self.op("ReduceMax", "largest_accepted", accepted, self.integers(1), keepdims=0)  # (B)
        self.op("Max", "next_residual", "residual", largest, self._overflow(values))
        return values

    def _is_finite(self, name: str, value: str) -> str:
        return self.op("Less", name, self.op("Abs", f"{name}/magnitude", value), self.number(LARGEST))

    def _overflow(self, values: str) -> str:
        """0 for images whose patches are all finite, else inf, [B]."""
        finite = self._is_finite("is_finite", values)
        excess = self.op("Where", "excess", finite, self.number(0.0), self.number(math.inf))
        return self.op("ReduceMax", "overflow", excess, self.integers(1, 2), keepdims=0)

    def _write(self, values: str, base: str) -> None:
        """Write `values` [B, S, D], the patches base+1 .. base+S, to where they lie in image order."""
        places = self._places("places", base, start=1)  # (B, S)
        if self.sizes.get("S") == 1:
            start = self.op("Squeeze", "start", places, self.integers(1))  # (B)
        else:
            start = self.op("ReduceMin", "start", places, self.integers(1), keepdims=0)  # (B)
            # Where in the update each patch goes is, forwards and backwards, also where each slot has its patch from.
            within = self.op("Sub", "within", places, self.op("Unsqueeze", "start_each", start, self.integers(1)))
            values = self._rows("update", values, within)
        update = self.op("Unsqueeze", "update_heads", values, self.integers(1))  # (B, 1, S, D)
        self.op("TensorScatter", "next_finished", "finished", update, start, axis=-2, mode=b"linear")

    def _next_window(self) -> None:
        places = self._places("next_places", self._base("next_base", "next_position"), start=0, extra=1)
        patches = self.op("Squeeze", "patches", "next_finished", self.integers(1))  # (B, N, D)
        self._rows("next_window", patches, places)

    def _places(self, name: str, base: str, *, start: int, extra: int = 0) -> str:
        """Where in image order the S + `extra` patches from base + `start` on lie, [B, S + extra]."""
        numbers = self.count(f"{name}/numbers", start=start, extra=extra)
        each = self.op("Unsqueeze", f"{name}/base", base, self.integers(1))
        return self.op("Gather", name, "order", self.op("Add", f"{name}/block_order", each, numbers))

    def _rows(self, name: str, patches: str, indices: str) -> str:
        """patches[b, indices[b]] for patches [B, ., D] and indices [B, .]."""
        indices = self.op("Unsqueeze", f"{name}/indices", indices, self.integers(2))
        return self.op("GatherND", name, patches, indices, batch_dims=1)

    def _declare_sizes(self) -> None:
        """Make the frozen axes numbers in all inputs and outputs."""
        sizes = dict(self.sizes)
        if "S" in sizes:
            sizes["S + 1"] = sizes["S"] + 1
        if {"B", "G"} <= set(sizes):
            sizes["R"] = sizes["B"] * sizes["G"]
        for value in (*self.graph.inputs.values(), *self.graph.outputs.values()):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in sizes:
                    dim.dim_value = sizes[dim.dim_param]
                    dim.ClearField("dim_param")
