"""`GraphBuilder`: `op.Gemm(x, w, b, transB=1)` on top of an onnx-ir tape, with names a person can read.

Python numbers and lists of integers become constants, `op.scope("layer_0.mlp")` names the nodes made inside it,
`op.weight(name)` is a tensor of the block's weights.bin.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from tarflow_export._weights import WEIGHTS_FILE, WeightLayout
from tarflow_sdk._config import FlowConfig

OPSET = 24
"""First opset with TensorScatter."""

IR_VERSION = 12
"""The one that opset 24 was released with; a newer one would only shut readers out."""

Operand = ir.Value | float | int | Sequence[int]

_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "int64": ir.DataType.INT64}


class GraphBuilder:
    """Collects the nodes of one graph of one block of `config`; linear layers run in `layout.dtype`."""

    def __init__(self, kind: str, config: FlowConfig, layout: WeightLayout, *, is_reversed: bool) -> None:
        self.kind = kind
        self.config = config
        self.layout = layout
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[object, ir.Value] = {}
        self._scope = ""
        self._counts: Counter[str] = Counter()
        indices = np.arange(config.patches, dtype=np.int64)
        # The one thing in which the blocks' graphs differ. Gathering through it turns image order into block order
        # and back.
        self.order = self._initializer("order", "order", indices[::-1].copy() if is_reversed else indices)

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        """`op.Add(x, y)`: a node of that operator with one output."""
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def node(*operands: Operand, **attributes: Any) -> ir.Value:
            return self._node(op_type, operands, attributes, 1)[0]

        return node

    def split(self, x: ir.Value, parts: int, axis: int) -> tuple[ir.Value, ...]:
        """Split: `x` in equal parts along `axis`."""
        return self._node("Split", [x], {"axis": axis, "num_outputs": parts}, parts)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes made inside are named `name/...`."""
        before, self._scope = self._scope, f"{name}/"
        try:
            yield
        finally:
            self._scope = before

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; letters in `shape` are symbolic axes."""
        value = ir.val(name, dtype=_DTYPES[dtype], shape=shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare `value` a graph output called `name`."""
        value.name, value.dtype, value.shape = name, _DTYPES[dtype], ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str) -> ir.Value:
        """The tensor `name` of weights.bin, in the state dict's orientation."""
        if name not in self._initializers:
            entry = self.layout.entries[name]
            tensor = ir.ExternalTensor(
                WEIGHTS_FILE,
                entry.offset,
                entry.nbytes,
                _DTYPES[entry.dtype],
                shape=ir.Shape(entry.shape),
                name=name,
            )
            self._initializers[name] = self._tape.initializer(tensor)
        return self._initializers[name]

    @property
    def affine_values(self) -> int:
        """Values that proj_out yields for a patch: a and b (2D), or b alone (D) without nvp."""
        return self.config.patch_values * (2 if self.config.nvp else 1)

    def linear_constant(self, number: float) -> ir.Value:
        """A scalar in the dtype of linear layers."""
        array = np.asarray(number, dtype=self.layout.dtype)
        return self._initializer((array.dtype.str, (), array.tobytes()), f"const_{number}_linear", array)

    def halve(self, value: ir.Value) -> ir.Value:
        """To the dtype of linear layers and caches: a cast in float16 bundles, nothing in float32 ones."""
        return value if self.layout.dtype == "float32" else self.Cast(value, to=ir.DataType.FLOAT16)

    def widen(self, value: ir.Value) -> ir.Value:
        """Back to float32, the dtype of norms, softmax, residuals and the affine map."""
        return value if self.layout.dtype == "float32" else self.Cast(value, to=ir.DataType.FLOAT)

    def model(self) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name=self.kind,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="tarflow-export")

    def _node(
        self, op_type: str, operands: Sequence[Operand], attributes: Mapping[str, Any], outputs: int
    ) -> tuple[ir.Value, ...]:
        name = self._unique(op_type)
        inputs = [self._value(operand) for operand in operands]
        values = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs, name=name)
        for i, value in enumerate(values):
            value.name = name if outputs == 1 else f"{name}.{i}"
        return tuple(values)

    def _unique(self, op_type: str) -> str:
        stem = self._scope + op_type
        self._counts[stem] += 1
        return stem if self._counts[stem] == 1 else f"{stem}_{self._counts[stem]}"

    def _value(self, operand: Operand) -> ir.Value:
        if isinstance(operand, ir.Value):
            return operand
        array = np.asarray(operand, dtype=np.float32 if isinstance(operand, float) else np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        name = "const_" + "_".join(str(number) for number in array.ravel().tolist())
        return self._initializer(key, name if array.ndim else f"{name}_scalar", array)

    def _initializer(self, key: object, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        if key not in self._initializers:
            self._initializers[key] = self._tape.initializer(ir.tensor(array, name=name))
        return self._initializers[key]
