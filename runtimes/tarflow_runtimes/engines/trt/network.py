"""`parse`: a graph of a bundle -> a strongly typed network, or an error with TensorRT's first message.

An input that no layer reads is an error: TensorRT for RTX 1.7 silently drops operands that it does not support.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tarflow_runtimes.engines.trt.log import listen, logger
from tarflow_runtimes.engines.trt.package import Package
from tarflow_runtimes.engines.trt.profiles import Profile
from tarflow_runtimes.errors import EngineError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """A graph that is ready to be built: block `block`'s `kind` at `precision`.

    `model` is the serialised ONNX model, whose external tensors lie in `folder`; `digest` is that of both. `inputs` and
    `outputs` have the shape of each, symbolic axes by their letters; `cache_updates` is the number of tensors that the
    graph updates in place, `cache_entries` is N.
    """

    kind: str
    block: int
    precision: str
    model: bytes
    folder: Path
    digest: str
    inputs: Mapping[str, Sequence[int | str]]
    outputs: Mapping[str, Sequence[int | str]]
    cache_updates: int
    cache_entries: int

    @property
    def name(self) -> str:
        """Description of the graph for messages."""
        return f"{self.kind} graph of block {self.block} in {self.precision}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A parsed graph: the builder, its network, the parser that owns the weights, and what was warned of."""

    builder: Any
    network: Any
    parser: Any
    warnings: tuple[str, ...]

    @property
    def layers(self) -> int:
        """The number of layers before any optimisation."""
        return int(self.network.num_layers)


def parse(package: Package, graph: Graph) -> Network:
    """Parse a graph.

    Raises:
        EngineError: when TensorRT cannot parse it, drops an input, or does not update the caches in place.
    """
    trt = package.module
    flags = 0
    if not package.ahead:  # TensorRT 10 has weakly typed networks, too; 11 and TensorRT for RTX have no others
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    with listen() as heard:
        builder = trt.Builder(logger(package))
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger(package))
        parsed = parser.parse(graph.model, str(graph.folder / "graph.onnx"))
        faults = [" ".join(parser.get_error(i).desc().split()) for i in range(parser.num_errors)]
    if not parsed or faults or heard.errors:
        why = next(iter((*heard.errors, *faults)), "no reason given")
        raise EngineError(f"{package.name} cannot take the {graph.name}: {why}", hint="use another engine")
    _check_inputs(package, graph, network)
    _check_updates(package, graph, network)
    return Network(builder=builder, network=network, parser=parser, warnings=tuple(heard.warnings))


def _check_inputs(package: Package, graph: Graph, network: Any) -> None:
    """Check that every input is read by a layer, and that none must be in host memory."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    read = {tensor.name for layer in layers for i in range(layer.num_inputs) if (tensor := layer.get_input(i))}
    unread = sorted(set(graph.inputs) - read)
    on_host = sorted(tensor.name for tensor in inputs if tensor.is_shape_tensor)
    if unread or on_host:
        what = f"without {', '.join(unread)}" if unread else f"with {', '.join(on_host)} in the host's memory"
        raise EngineError(f"{package.name} reads the {graph.name} {what}", hint="use another engine")


def _check_updates(package: Package, graph: Graph, network: Any) -> None:
    """Check that every tensor updated in place is updated from a network input to a network output."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    updates = [layer for layer in layers if layer.type == package.module.LayerType.KV_CACHE_UPDATE]
    direct = sum(layer.get_input(0).is_network_input and layer.get_output(0).is_network_output for layer in updates)
    if direct != graph.cache_updates or len(updates) != direct:
        raise EngineError(
            f"{package.name} reads {len(updates)} updates in place from the {graph.name}, {direct} of them from input"
            f" to output; expected {graph.cache_updates}",
            hint="use another engine",
        )


def add_profiles(package: Package, graph: Graph, network: Network, config: Any, profiles: Sequence[Profile]) -> None:
    """Declare the shapes that the engine is built for.

    Raises:
        EngineError: when TensorRT refuses one.
    """
    for profile in profiles:
        declared = network.builder.create_optimization_profile()
        with listen() as heard:
            for name, shape in graph.inputs.items():
                if any(isinstance(axis, str) for axis in shape):
                    declared.set_shape(name, *profile.ranges(shape, graph.cache_entries))
            index = config.add_optimization_profile(declared)
        if index < 0 or heard.errors:
            why = next(iter(heard.errors), "no reason given")
            raise EngineError(f"{package.name} refuses {profile} of the {graph.name}: {why}")
