"""A float32 graph -> the same in half precision with float32 islands, where a float16 bundle has them.

In half precision: linear layers and their activations, the products of attention, the caches. In float32: layer norm,
softmax, the residual stream, embeddings, the affine map, and all inputs and outputs but the caches.
Pattern, in any graph of a bundle and in those made from one:
    Gemm, MatMul and TensorScatter into a cache are halves. So are, between halves, operators that move values (Split,
    Reshape, Transpose, Concat, Slice), Gelu, and Mul with a factor that is the same for all patches.
Rewrite: a half reads float32 values through a Cast and constants converted; other nodes read a half through a Cast.
A transposition that only halves read is one itself, whatever it reads: it then moves half the bytes.

float16 has 5 bits of exponent and 10 of mantissa, bfloat16 8 and 7. Weights are rounded to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._errors import EngineError
from tarflow_runtimes._rewrites._graph import Graph, PatternMismatch
from tarflow_runtimes._rewrites._weights_file import weights_file

DTYPES: Final = {"float16": proto.FLOAT16, "bfloat16": proto.BFLOAT16}
"""TensorProto.DataType of what a graph can be rewritten to."""

EXPONENT: Final = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits that are all set in what is not finite."""

CACHES: Final = ("key_", "value_")
"""How the names of the caches begin."""

PRODUCTS: Final = ("Gemm", "MatMul")
MOVES: Final = ("Split", "Reshape", "Transpose", "Slice")
"""Operators whose first operand is moved; the others are shapes and places."""
CARRIERS: Final = (*MOVES, "Gelu", "Concat", "Mul")
"""Operators that are halves between halves."""


def rewrite(model: bytes, dtype: str, weights: Path, *, folder: Path) -> bytes:
    """Rewrite a graph whose tensors lie in `weights` to one of DTYPES; the new graph's are put into `folder`.

    Raises:
        PatternMismatch: when an output would be in half precision that is no cache.
        EngineError: when the graph is of a float16 bundle, a weight is beyond the range of `dtype`, or the file of the
            new weights cannot be written.
    """
    graph = Graph(proto.parse_model(model, where="the float32 graph"))
    if any(tensor.data_type == proto.FLOAT16 for tensor in graph.initializers.values()):
        raise EngineError(
            f"a graph with float16 weights cannot be made {dtype}", hint="export the checkpoint with --dtype float32"
        )
    twins = _Rewrite(graph, dtype).run()
    read = {name for node in graph.needed() for name in node.input}
    with weights_file(folder) as file:
        for name, tensor in list(graph.initializers.items()):
            array = proto.array(tensor)
            stored = array is None
            if array is None:
                array = proto.external_array(tensor, weights)
            if name in twins:
                twin, bits = twins[name], _in_range(name, array, dtype)
                made = file.put(twin, bits, DTYPES[dtype]) if stored else _inline(twin, bits, DTYPES[dtype])
                graph.initializers[twin] = made
            if stored and name in read:
                graph.initializers[name] = file.put(name, array, tensor.data_type)
    return graph.serialized()


def rounded(array: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint16]:
    """The bits of finite numbers in one of DTYPES, rounded to nearest, ties to even."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).view(np.uint16)
    bits = array.view(np.uint32)
    # Half a unit of the last place that stays, and one bit less where that place is even, so that ties leave it.
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def _in_range(name: str, array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.uint16]:
    bits = rounded(array, dtype)
    if not np.isfinite(array).all() or (bits & EXPONENT[dtype] == EXPONENT[dtype]).any():
        raise EngineError(f"tensor {name} holds values beyond the range of {dtype}", hint="use float32")
    return bits


def _inline(name: str, bits: npt.NDArray[np.uint16], data_type: int) -> Any:
    return proto.messages()["TensorProto"](name=name, dims=bits.shape, data_type=data_type, raw_data=bits.tobytes())


class _Rewrite:
    """The nodes that become halves, and the Casts and constants on the border between them and the others."""

    def __init__(self, graph: Graph, dtype: str) -> None:
        self.graph, self.dtype = graph, dtype
        self.nodes = list(graph.nodes)
        self.caches = {name for name in graph.inputs if name.startswith(CACHES)}
        self.halves = self._find()
        self.twins: dict[str, str] = {}
        self.casts: dict[str, str] = {}

    def _find(self) -> set[int]:
        """Ids of the halves: of all carriers those that are left when no other is out of place."""
        sure = {id(node) for node in self.nodes if node.op_type in PRODUCTS or self._writes_cache(node)}
        self.halves = sure | {id(node) for node in self.nodes if node.op_type in CARRIERS}
        while out := {id(node) for node in self.nodes if id(node) in self.halves - sure and not self._fits(node)}:
            self.halves -= out
        return self.halves

    def _writes_cache(self, node: Any) -> bool:
        return node.op_type == "TensorScatter" and node.input[0] in self.caches

    def _fits(self, node: Any) -> bool:
        """Whether a carrier has halves on both sides."""
        if not all(self._is_read_by_halves(name) for name in node.output):
            return False
        if node.op_type == "Transpose":
            return True
        operands = [node.input[i] for i in _operands(node)]
        if node.op_type == "Mul":
            operands = [name for name in operands if not self._is_factor(name)]
            return len(operands) == 1 and self._is_half(operands[0])
        return all(self._is_half(name) for name in operands)

    def _is_factor(self, value: str) -> bool:
        return self.graph.dependencies(value) <= {"inverse_temperature"}

    def _is_half(self, value: str) -> bool:
        if value in self.graph.inputs or value in self.graph.initializers:
            return value in self.caches
        return id(self.graph.producer(value)) in self.halves

    def _is_read_by_halves(self, value: str) -> bool:
        readers = self.graph.consumers(value)
        return bool(readers) and value not in self.graph.outputs and all(id(node) in self.halves for node in readers)

    def run(self) -> dict[str, str]:
        """Rewrite; returns the constants that are to be converted, by the names of what is to be made of them."""
        for node in self.nodes:
            if id(node) in self.halves:
                for i in _operands(node):
                    node.input[i] = self._halved(node.input[i])
            else:
                for i, name in enumerate(node.input):
                    if name and self._is_half(name):
                        node.input[i] = self._cast(name, "float32", proto.FLOAT)
        for name, value in self.graph.outputs.items():
            if self._is_half(name):
                if not name.startswith(tuple(f"next_{cache}" for cache in CACHES)):
                    raise PatternMismatch(f"{name} would be in {self.dtype}")
                value.type.tensor_type.elem_type = DTYPES[self.dtype]
        for name in self.caches:
            self.graph.inputs[name].type.tensor_type.elem_type = DTYPES[self.dtype]
        return self.twins

    def _halved(self, value: str) -> str:
        if self._is_half(value):
            return value
        if value in self.graph.initializers:
            return self.twins.setdefault(value, f"{value}.{self.dtype}")
        return self._cast(value, self.dtype, DTYPES[self.dtype])

    def _cast(self, value: str, dtype: str, data_type: int) -> str:
        if value not in self.casts:
            self.casts[value] = self.graph.add("Cast", [value], [f"{value}/{dtype}"], to=data_type)
        return self.casts[value]


def _operands(node: Any) -> Sequence[int]:
    """Which inputs of a half are in half precision."""
    if node.op_type == "TensorScatter":
        return (0, 1)
    return (0,) if node.op_type in MOVES else range(len(node.input))
