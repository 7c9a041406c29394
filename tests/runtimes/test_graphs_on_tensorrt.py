"""The graphs for engines on a GPU, built by TensorRT for RTX, which needs no GPU for that. Nothing is executed.

What TensorRT drops it only warns of, so that the network it has read is asked which tensors its layers take.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import Bundle, open_bundle
from tarflow_runtimes._flow import SHIPPED
from tarflow_runtimes._rewrites import half
from tarflow_runtimes._rewrites.advance import advance_graph

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

KINDS = ("advance", "forward", "gradient")
DTYPES = ("float32", *half.DTYPES)
NAMES = ["class", "class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head"]
MODELS = Path(__file__).parents[2] / "runtimes" / "tarflow_runtimes" / "models"

Profile = dict[str, tuple[int, int]]
"""Least and largest size of every symbolic axis."""


class Network:
    """A graph as TensorRT has read it."""

    def __init__(self, model: bytes, folder: Path) -> None:
        logger = trt.Logger(trt.Logger.ERROR)
        self.builder = trt.Builder(logger)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, logger)
        assert self.parser.parse(model, str(folder / "model.onnx")), self.parser.get_error(0).desc()
        self.inputs = [self.network.get_input(i) for i in range(self.network.num_inputs)]
        self.layers = [self.network.get_layer(i) for i in range(self.network.num_layers)]
        graph = onnx.load_from_string(model).graph
        self.axes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in graph.input
        }

    def unused(self) -> set[str]:
        """Inputs of the graph that no layer reads."""
        tensors = (layer.get_input(i) for layer in self.layers for i in range(layer.num_inputs))
        return set(self.axes) - {tensor.name for tensor in tensors if tensor is not None}

    def host_inputs(self) -> set[str]:
        """Inputs whose values the host would have to know."""
        return {tensor.name for tensor in self.inputs if tensor.is_shape_tensor}

    def updates_in_place(self) -> set[tuple[str, str]]:
        """The tensors that lead from an input to an output of the network through a cache update."""
        updates = [layer for layer in self.layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
        assert all(layer.get_input(0).is_network_input and layer.get_output(0).is_network_output for layer in updates)
        return {(layer.get_input(0).name, layer.get_output(0).name) for layer in updates}

    def build(self, profiles: list[Profile]) -> int:
        """Bytes of the engine."""
        config = self.builder.create_builder_config()
        for sizes in profiles:
            profile = self.builder.create_optimization_profile()
            for name, axes in self.axes.items():
                least, most = ([sizes[axis][i] if isinstance(axis, str) else axis for axis in axes] for i in (0, 1))
                profile.set_shape(name, least, most, most)
            config.add_optimization_profile(profile)
        engine = self.builder.build_serialized_network(self.network, config)
        assert engine is not None
        return int(engine.nbytes)


def profiles(bundle: Bundle, kind: str) -> list[Profile]:
    """Batches of 1 to 4; of the advance graph one profile for single patches, one for windows of two branches."""
    patches = bundle.config.patches
    if kind != "advance":
        return [{"B": (1, 4)}]
    return [
        {
            "B": (1, 4), "G": (branches, branches), "R": (branches, 4 * branches),
            "S + 1": (window + 1, window + 1), "L": (1, patches),
        }
        for branches, window in ((1, 1), (2, patches - 1))
    ]  # fmt: skip


@pytest.fixture
def read(exported: Any, tmp_path: Path) -> Callable[..., tuple[Bundle, Network]]:
    """`read(name, kind, dtype)`: the last block of a bundle on TensorRT."""

    def get(name: str, kind: str, dtype: str) -> tuple[Bundle, Network]:
        bundle = open_bundle(MODELS / SHIPPED if name == "shipped" else exported(name).path)
        files = bundle.blocks[-1]
        model = getattr(files, "step" if kind == "advance" else kind).read_bytes()
        if kind == "advance":
            model = advance_graph(proto.parse_model(model, where="step"), bundle.config)
        folder = files.weights.parent
        if dtype in half.DTYPES:
            model, folder = half.rewrite(model, dtype, files.weights, folder=tmp_path), tmp_path
        return bundle, Network(model, folder)

    return get


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "class_n16" else pytest.mark.slow) for name in (*NAMES, "shipped")]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_graph_builds(read, name, kind, dtype):
    bundle, network = read(name, kind, dtype)
    assert network.unused() == set()
    assert network.host_inputs() == set()
    caches = [f"{cache}_{layer}" for cache in ("key", "value") for layer in range(bundle.config.layers)]
    in_place = ["finished", *caches] if kind == "advance" else []
    assert network.updates_in_place() == {(tensor, f"next_{tensor}") for tensor in in_place}
    least = 2 if dtype in half.DTYPES else 4
    assert network.build(profiles(bundle, kind)) > least * 3 * bundle.config.layers * bundle.config.width**2


def test_frozen_graphs_build_without_a_profile(exported, tmp_path):
    bundle = open_bundle(exported("class_n16").path)
    files = bundle.blocks[1]
    step = proto.parse_model(files.step.read_bytes(), where="step")
    model = advance_graph(step, bundle.config, images=3, branches=2, window=5, reach=7)
    network = Network(model, files.weights.parent)
    assert network.unused() == set()
    assert not [axis for axes in network.axes.values() for axis in axes if isinstance(axis, str)]
    assert network.build([])


def test_an_input_that_is_dropped_is_noticed(exported):
    bundle = open_bundle(exported("class_n16").path)
    files = bundle.blocks[0]
    step = proto.parse_model(files.step.read_bytes(), where="step")
    model = onnx.load_from_string(advance_graph(step, bundle.config))
    model.graph.input.append(onnx.helper.make_tensor_value_info("planted", onnx.TensorProto.FLOAT, ["B"]))
    assert Network(model.SerializeToString(), files.weights.parent).unused() == {"planted"}


def test_a_position_that_the_host_would_have_to_know_is_noticed(exported):
    bundle = open_bundle(exported("class_n16").path)
    files = bundle.blocks[0]
    step = proto.parse_model(files.step.read_bytes(), where="step")
    model = onnx.load_from_string(advance_graph(step, bundle.config, images=1))
    start = onnx.helper.make_node("Slice", ["noise", "position", "ends", "axes"], ["sliced"])
    model.graph.node.append(start)
    for name, value in (("ends", 16), ("axes", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    model.graph.output.append(onnx.helper.make_tensor_value_info("sliced", onnx.TensorProto.FLOAT, None))
    assert Network(model.SerializeToString(), files.weights.parent).host_inputs() == {"position"}
