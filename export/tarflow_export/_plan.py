"""`Plan`: the graphs and weights that an export will write, and their sizes, derived from the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from tarflow_export._graphs import BUILDERS, PRECISIONS, GraphBuilder
from tarflow_export._graphs.builder import DTYPES
from tarflow_export._weights import WEIGHTS_FILE, WeightLayout, weight_layout
from tarflow_runtimes.bundle.config import ModelConfig, Order, Precision
from tarflow_runtimes.bundle.reader import PORTABLE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """One serialised graph and its interface."""

    provider: str
    kind: str
    nodes: int
    serialized: bytes
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]

    @property
    def file(self) -> str | None:
        """The file in the bundle; None for portable graphs, which are stored in the folder of every block."""
        return None if self.provider == PORTABLE else f"graphs/{self.provider}/{self.kind}.onnx"

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        place = {} if self.file is None else {"file": self.file}
        return {**place, "inputs": list(self.inputs), "outputs": list(self.outputs)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The graphs, and the layout of the weights of every block of a model."""

    config: ModelConfig
    layout: WeightLayout
    graphs: tuple[GraphPlan, ...]

    @property
    def portable(self) -> tuple[GraphPlan, ...]:
        """The graphs that are stored in the folder of every block."""
        return tuple(graph for graph in self.graphs if graph.provider == PORTABLE)

    @property
    def files(self) -> dict[str, int]:
        """Name and size in bytes of the files of the graphs and blocks."""
        files = {graph.file: len(graph.serialized) for graph in self.graphs if graph.file is not None}
        for k in range(self.config.blocks):
            files |= {block_file(k, f"{graph.kind}.onnx"): len(graph.serialized) for graph in self.portable}
            files[block_file(k, WEIGHTS_FILE)] = self.layout.nbytes
        return files


def plan_export(config: ModelConfig, precision: Precision) -> Plan:
    """Make each graph once, and compute the layout of the weights."""
    layout = weight_layout(config, precision)
    graphs = [
        _plan_graph(provider, kind, config, layout) for provider in PRECISIONS[precision] for kind in BUILDERS[provider]
    ]
    return Plan(config=config, layout=layout, graphs=tuple(graphs))


def block_order(block: int) -> Order:
    """The order of patches of a block: even blocks first to last, odd ones last to first."""
    return "reversed" if block % 2 else "identity"


def block_file(block: int, name: str) -> str:
    """The path of a block's file in the bundle."""
    return f"block_{block:02d}/{name}"


def _plan_graph(provider: str, kind: str, config: ModelConfig, layout: WeightLayout) -> GraphPlan:
    op = GraphBuilder(
        kind, config, layout, has_integer_products=kind.startswith(("step", "window")) and provider != PORTABLE
    )
    model = BUILDERS[provider][kind](op)
    return GraphPlan(
        provider=provider,
        kind=kind,
        nodes=len(list(model.graph)),
        serialized=ir.to_proto(model).SerializeToString(deterministic=True),
        inputs=tuple(_described(value) for value in model.graph.inputs),
        outputs=tuple(_described(value) for value in model.graph.outputs),
    )


def _described(value: ir.Value) -> dict[str, Any]:
    names = {data_type: name for name, data_type in DTYPES.items()}
    if value.dtype is None or value.shape is None:
        raise AssertionError(f"graph value {value.name} was declared without dtype or shape")
    shape = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
    return {"name": value.name, "dtype": names[value.dtype], "shape": shape}
