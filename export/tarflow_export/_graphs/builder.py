"""`GraphBuilder`: `op.Gemm(x, w, b, transB=1)` on top of an onnx-ir tape, with readable names.

Python numbers and lists of integers become constants, `op.scope("layer_0.mlp")` names the nodes made inside it,
`op.weight(name)` is a tensor of the block's weights.bin. Operators of ONNX Runtime alone: `domain="com.microsoft"`.
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
from tarflow_runtimes.bundle.config import ModelConfig

OPSET = 24
"""First opset with TensorScatter."""

IR_VERSION = 12
"""The IR version released with opset 24; a newer one would only exclude readers."""

Operand = ir.Value | float | int | Sequence[int] | None
"""An input of a node; None omits an optional input."""

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "uint8": ir.DataType.UINT8,
}
"""The dtypes of the manifest."""

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class GraphBuilder:
    """Collects the nodes of one graph of the blocks of `config`; linear layers run in `layout.linear`.

    `has_integer_products`: the products of an int8 layout are ONNX Runtime's MatMulNBits, else its weights are made
    float32 again.
    """

    def __init__(
        self, kind: str, config: ModelConfig, layout: WeightLayout, *, has_integer_products: bool = False
    ) -> None:
        self.kind = kind
        self.has_integer_products = has_integer_products
        self.config = config
        self.layout = layout
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[object, ir.Value] = {}
        self._scope = ""
        self._counts: Counter[str] = Counter()
        self.made: dict[str, ir.Value] = {}
        """Values that are created once, by name."""

    @property
    def order(self) -> ir.Value:
        """[N]: gathering through it turns the order of the data into that of the block, and back."""
        return self.weight("order")

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        """`op.Add(x, y)`: a node of that operator with one output."""
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def node(*operands: Operand, **attributes: Any) -> ir.Value:
            return self._node(op_type, operands, attributes, 1)[0]

        return node

    def split(self, x: ir.Value, parts: int, axis: int) -> tuple[ir.Value, ...]:
        """Split `x` into equal parts along `axis`."""
        return self._node("Split", [x], {"axis": axis, "num_outputs": parts}, parts)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Name the nodes made inside `name/...`."""
        before, self._scope = self._scope, f"{name}/"
        try:
            yield
        finally:
            self._scope = before

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; letters in `shape` are symbolic axes."""
        value = ir.val(name, dtype=DTYPES[dtype], shape=shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare `value` a graph output called `name`."""
        value.name, value.dtype, value.shape = name, DTYPES[dtype], ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str, shape: Sequence[int] | None = None) -> ir.Value:
        """The tensor `name` of weights.bin, in the state dict's orientation or reshaped to another shape."""
        if name not in self._initializers:
            entry = self.layout.entries[name]
            tensor = ir.ExternalTensor(
                WEIGHTS_FILE,
                entry.offset,
                entry.nbytes,
                DTYPES[entry.dtype],
                shape=ir.Shape(entry.shape if shape is None else shape),
                name=name,
            )
            self._initializers[name] = self._tape.initializer(tensor)
        return self._initializers[name]

    @property
    def affine_values(self) -> int:
        """The number of outputs of proj_out per patch: 2D for a and b, or D for b alone without nvp."""
        return self.config.patch_values * (2 if self.config.nvp else 1)

    def linear_constant(self, number: float) -> ir.Value:
        """A scalar in the dtype of linear layers."""
        tensor = ir.tensor(number, dtype=DTYPES[self.layout.linear], name=f"const_{number}_linear")
        return self._initializer((tensor.name, self.layout.linear), tensor)

    def narrow(self, value: ir.Value) -> ir.Value:
        """Convert to the dtype of linear layers and caches: a cast in half precision, nothing in float32."""
        return value if self.layout.linear == "float32" else self.Cast(value, to=DTYPES[self.layout.linear])

    def widen(self, value: ir.Value) -> ir.Value:
        """Convert to float32, the dtype of norms, softmax, residuals and the affine map."""
        return value if self.layout.linear == "float32" else self.Cast(value, to=DTYPES["float32"])

    def model(self) -> ir.Model:
        """The finished model."""
        opsets = {"": OPSET}
        if any(node.domain == CONTRIB for node in self._tape.nodes):
            opsets[CONTRIB] = 1
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=opsets,
            name=self.kind,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="tarflow-export")

    def multiple(self, op_type: str, outputs: int, *operands: Operand, **attributes: Any) -> tuple[ir.Value, ...]:
        """A node of that operator with several outputs."""
        return self._node(op_type, operands, attributes, outputs)

    def _node(
        self, op_type: str, operands: Sequence[Operand], attributes: Mapping[str, Any], outputs: int
    ) -> tuple[ir.Value, ...]:
        name = self._unique(op_type)
        inputs = [None if operand is None else self._value(operand) for operand in operands]
        given = {key: value for key, value in attributes.items() if key != "domain"}
        domain = attributes.get("domain", "")
        values = self._tape.op_multi_out(op_type, inputs, given, num_outputs=outputs, name=name, domain=domain)
        for i, value in enumerate(values):
            value.name = name if outputs == 1 else f"{name}.{i}"
        return tuple(values)

    def _unique(self, op_type: str) -> str:
        stem = self._scope + op_type
        self._counts[stem] += 1
        return stem if self._counts[stem] == 1 else f"{stem}_{self._counts[stem]}"

    def _value(self, operand: ir.Value | float | Sequence[int]) -> ir.Value:
        if isinstance(operand, ir.Value):
            return operand
        array = np.asarray(operand, dtype=np.float32 if isinstance(operand, float) else np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        name = "const_" + "_".join(str(number) for number in array.ravel().tolist())
        return self._initializer(key, ir.tensor(array, name=name if array.ndim else f"{name}_scalar"))

    def _initializer(self, key: object, tensor: ir.TensorProtocol) -> ir.Value:
        if key not in self._initializers:
            self._initializers[key] = self._tape.initializer(tensor)
        return self._initializers[key]
