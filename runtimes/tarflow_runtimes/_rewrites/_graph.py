"""`Graph`: an ONNX graph with the look-ups a rewrite needs, and `PatternMismatch`, how a rewrite declines."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from tarflow_runtimes import _onnx_proto as proto


class PatternMismatch(Exception):  # noqa: N818 - a refusal, not a fault: the portable graph runs instead
    """The graph is not of the form that a rewrite knows."""


class Graph:
    """The nodes, initializers, inputs and outputs of an ONNX model, in lists that may be edited.

    A rewrite adds nodes in any order and redirects readers with `replace`; `serialized` keeps what the outputs need.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes: list[Any] = list(model.graph.node)
        self.initializers: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs: dict[str, Any] = {value.name: value for value in model.graph.input}
        self.outputs: dict[str, Any] = {value.name: value for value in model.graph.output}
        self._producers: dict[str, Any] = {}
        self._consumers: dict[str, list[Any]] = {}
        self._index()

    def _index(self) -> None:
        """Look-ups by value; made again whenever the nodes change, because reading a message is slow."""
        self._producers = {name: node for node in self.nodes for name in node.output if name}
        self._consumers = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._consumers.setdefault(name, []).append(node)

    def producer(self, value: str, *op_types: str) -> Any:
        """The node that makes `value`, which must be one of `op_types` when any are given."""
        node = self._producers.get(value)
        if node is None or (op_types and (node.op_type not in op_types or node.domain)):
            found = "no node" if node is None else node.op_type
            raise PatternMismatch(f"{value} comes from {found}, expected {' or '.join(op_types) or 'a node'}")
        return node

    def consumers(self, value: str) -> list[Any]:
        """All nodes that read `value`."""
        return list(self._consumers.get(value, ()))

    def consumer(self, value: str, *op_types: str) -> Any:
        """The only node that reads `value`, which must be one of `op_types` when any are given."""
        nodes = self.consumers(value)
        if len(nodes) != 1 or (op_types and (nodes[0].op_type not in op_types or nodes[0].domain)):
            found = ", ".join(node.op_type for node in nodes) or "nothing"
            raise PatternMismatch(f"{value} is read by {found}, expected one {' or '.join(op_types) or 'node'}")
        return nodes[0]

    def only(self, value: str, op_type: str) -> Any:
        """The only node of `op_type` among the readers of `value`."""
        nodes = [node for node in self.consumers(value) if node.op_type == op_type]
        if len(nodes) != 1:
            raise PatternMismatch(f"{value} is read by {len(nodes)} {op_type} nodes, expected one")
        return nodes[0]

    def after_cast(self, value: str) -> str:
        """`value`, or the Cast of it when that is its only reader: float16 bundles cast around linear layers."""
        nodes = self.consumers(value)
        return str(nodes[0].output[0]) if len(nodes) == 1 and nodes[0].op_type == "Cast" else value

    def initializer(self, name: str, shape: tuple[int, ...]) -> Any:
        """The initializer `name`, which must have this shape."""
        tensor = self.initializers.get(name)
        if tensor is None or tuple(tensor.dims) != shape:
            raise PatternMismatch(f"{name}: expected an initializer of shape {list(shape)}")
        return tensor

    def number(self, name: str) -> float:
        """The value of a constant of one element that lies in the model; NaN, equal to nothing, for anything else."""
        tensor = self.initializers.get(name)
        array = None if tensor is None else proto.array(tensor)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else math.nan

    def dependencies(self, value: str) -> set[str]:
        """The graph inputs that the numbers in `value` depend on; inputs that give only a shape do not count."""
        found: set[str] = set()
        seen: set[str] = set()
        todo = [value]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.inputs:
                found.add(name)
                continue
            node = self._producers.get(name)
            if node is not None and node.op_type != "Shape":
                todo.extend(node.input)
        return found

    def add(self, op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        """Append a node; returns its first output. `domain` may be among the attributes."""
        node = proto.node(op_type, inputs, outputs, **attributes)
        self.nodes.append(node)
        self._producers |= dict.fromkeys(filter(None, outputs), node)
        for name in dict.fromkeys(inputs):
            self._consumers.setdefault(name, []).append(node)
        return outputs[0]

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """Add an initializer (once); returns its name."""
        self.initializers.setdefault(name, proto.tensor(name, array))
        return name

    def shape(self, *dims: int) -> str:
        """An int64 constant for Reshape."""
        return self.constant("shape_" + "_".join(map(str, dims)), np.array(dims, np.int64))

    def replace(self, old: str, new: str) -> None:
        """Let every reader of `old` read `new`."""
        for node in self.consumers(old):
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new
        self._index()

    def remove(self, nodes: Collection[Any]) -> None:
        """Drop nodes, so that others may make what they made."""
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        self._index()

    def declare_input(self, name: str, elem_type: int, shape: tuple[int | str, ...] | None) -> str:
        """Add a graph input; letters in `shape` are symbolic axes, None leaves even their number open."""
        self.inputs[name] = proto.value_info(name, elem_type, shape)
        return name

    def needed(self) -> list[Any]:
        """The nodes that the outputs need, each after the nodes that it reads."""
        producers = self._producers
        ordered: dict[int, Any] = {}
        stack: list[tuple[Any, bool]] = [
            (producers[name], False) for name in reversed(self.outputs) if name in producers
        ]
        while stack:  # an explicit stack: deep models would exhaust Python's
            node, inputs_done = stack.pop()
            if id(node) in ordered:
                continue
            if inputs_done:
                ordered[id(node)] = node
                continue
            stack.append((node, True))
            stack.extend((producers[name], False) for name in reversed(node.input) if name in producers)
        return list(ordered.values())

    def serialized(self) -> bytes:
        """The model as bytes, without the nodes, initializers and inputs that nothing needs."""
        nodes = self.needed()
        read = {name for node in nodes for name in node.input}
        model = type(self.model)()
        model.CopyFrom(self.model)
        graph = model.graph
        for field in (graph.node, graph.initializer, graph.input, graph.output, graph.value_info):
            del field[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in read)
        graph.input.extend(value for name, value in self.inputs.items() if name in read)
        graph.output.extend(self.outputs.values())
        imported = {entry.domain for entry in model.opset_import}
        if "com.microsoft" not in imported and any(node.domain == "com.microsoft" for node in nodes):
            model.opset_import.add(domain="com.microsoft", version=1)
        self.inputs = {value.name: value for value in graph.input}
        return bytes(model.SerializeToString())
