"""`Plan`: what an export will write, decided from the configuration alone: graphs, weights, bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from tarflow_export._graphs import GRAPH_KINDS, GraphBuilder
from tarflow_export._weights import Dtype, WeightLayout, weight_layout
from tarflow_sdk._config import FlowConfig

ORDERS = ("identity", "reversed")
"""A block's order of patches: even blocks first to last, odd ones last to first."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """One kind of graph: its two serialised forms (by block order), which differ in the initializer `order` alone."""

    kind: str
    nodes: int
    serialized: Mapping[str, bytes]
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The graphs and the layout of the weights of every block of a model."""

    config: FlowConfig
    layout: WeightLayout
    graphs: Mapping[str, GraphPlan]

    @property
    def files(self) -> dict[str, int]:
        """Name and size in bytes of the files of all blocks."""
        files = {}
        for k in range(self.config.blocks):
            for kind, graph in self.graphs.items():
                files[block_file(k, f"{kind}.onnx")] = len(graph.serialized[block_order(k)])
            files[block_file(k, "weights.bin")] = self.layout.nbytes
        return files


def plan_export(config: FlowConfig, dtype: Dtype) -> Plan:
    """Make each kind of graph once per block order, and lay the weights out."""
    layout = weight_layout(config, dtype)
    return Plan(config=config, layout=layout, graphs={kind: _plan_graph(kind, config, layout) for kind in GRAPH_KINDS})


def block_order(block: int) -> str:
    """`identity` or `reversed`."""
    return ORDERS[block % 2]


def block_file(block: int, name: str) -> str:
    """The path of a block's file in the bundle."""
    return f"block_{block:02d}/{name}"


def _plan_graph(kind: str, config: FlowConfig, layout: WeightLayout) -> GraphPlan:
    serialized = {}
    for order in ORDERS:
        model = GRAPH_KINDS[kind](GraphBuilder(kind, config, layout, is_reversed=order == "reversed"))
        serialized[order] = ir.to_proto(model).SerializeToString(deterministic=True)
    return GraphPlan(
        kind=kind,
        nodes=len(list(model.graph)),
        serialized=serialized,
        inputs=tuple(_described(value) for value in model.graph.inputs),
        outputs=tuple(_described(value) for value in model.graph.outputs),
    )


def _described(value: ir.Value) -> dict[str, Any]:
    names = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT64: "int64"}
    if value.dtype is None or value.shape is None:
        raise AssertionError(f"graph value {value.name} was declared without dtype or shape")
    shape = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
    return {"name": value.name, "dtype": names[value.dtype], "shape": shape}
