"""The load-time rewrites of libtarflow: node for node the graphs that Python's make."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from tarflow_export import export_bundle
from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import open_bundle
from tarflow_runtimes._rewrites import sequential_graph
from tarflow_runtimes._rewrites.split_gradient import split_gradient
from tarflow_sdk.testing import random_model, tiny_config
from tests.project.test_cpp import _run, build  # noqa: F401 - the fixture

MODELS = {
    "class": ({"patch_size": 2}, "float32"),
    "unconditional": ({"classes": 0}, "float32"),
    "no_nvp": ({"nvp": False}, "float32"),
    "half": ({}, "float16"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_those_of_python(name: str, build: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    settings, dtype = MODELS[name]
    path, graphs = tmp_path / "x.tarflow", tmp_path / "graphs"
    graphs.mkdir()
    export_bundle(random_model(tiny_config(**settings), seed=3), path, dtype=dtype, verify=False)
    _run(build("cpp") / "tests" / "tarflow_unit_rewrites", path, graphs)
    bundle = open_bundle(path)
    expected = {}
    step = bundle.blocks[1].step.read_bytes()
    for branches, temperature, windows in itertools.product((1, 2), (False, True), (False, True)):
        model = proto.parse_model(step, where="step")
        kind = {"branches": branches, "temperature": temperature, "windows": windows}
        graph = sequential_graph(model, bundle.config, **kind)
        expected[f"step_{branches}{'t' * temperature}{'w' * windows}"] = graph.model
    if bundle.config.nvp and dtype == "float32":
        halves = split_gradient(proto.parse_model(bundle.blocks[1].gradient.read_bytes(), where="gradient"))
        expected |= {"gradient_forward": halves.forward, "gradient_backward": halves.backward}
    assert sorted(expected) == sorted(file.stem for file in graphs.iterdir())
    for graph_name, theirs in expected.items():
        ours = (graphs / f"{graph_name}.onnx").read_bytes()
        assert _plain(ours) == _plain(theirs), graph_name


def _plain(data: bytes) -> onnx.ModelProto:
    """A model whose standard domain is written in one way, as nothing."""
    model = onnx.load_from_string(data)
    for node in model.graph.node:
        if not node.domain:
            node.ClearField("domain")
    return model
