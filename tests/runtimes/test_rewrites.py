"""The ONNX subset and the load-time rewrites: each against the portable graph, and what declines."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._engines._session import Session
from tarflow_runtimes._engines._steppers import PortableStepper, SequentialStepper, StepInputs
from tarflow_runtimes._rewrites import attention, sequential_graph, sequential_input, sequential_output
from tarflow_runtimes._rewrites._graph import Graph, PatternMismatch

CASES = [
    (name, dtype, branches, temperature)
    for (name, dtype), branches, temperature in itertools.product(
        [("class_n16", "float32"), ("unconditional", "float32"), ("no_nvp", "float32"), ("class", "float16")],
        (1, 2),
        (1.0, 0.5),
    )
    if branches == 2 or temperature == 1.0
]


def step_model(exported: Any, block: int = 0) -> Any:
    path = exported.path / f"block_{block:02d}" / "step.onnx"
    return proto.parse_model(path.read_bytes(), where=str(path))


def op_types(data: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


def test_unknown_fields_survive(exported):
    path = exported("class").path / "block_00" / "step.onnx"
    ours = proto.parse_model(path.read_bytes(), where="step").SerializeToString()
    assert onnx.load_from_string(ours) == onnx.load_from_string(path.read_bytes())


def test_made_messages_are_onnx():
    node = onnx.NodeProto.FromString(
        proto.node("Op", ["a", ""], ["b"], domain="d", i=3, f=0.5, s=b"x", ints=[1, 2]).SerializeToString()
    )
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert (node.op_type, list(node.input), list(node.output), node.domain) == ("Op", ["a", ""], ["b"], "d")
    assert values == {"i": 3, "f": 0.5, "s": b"x", "ints": [1, 2]}
    for array in (np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int64), np.zeros((0,), np.int32)):
        tensor = proto.tensor("t", array)
        theirs = onnx.TensorProto.FromString(tensor.SerializeToString())
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(theirs), array)
    info = onnx.ValueInfoProto.FromString(proto.value_info("v", proto.FLOAT, ("B", 3)).SerializeToString())
    assert info == onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, ["B", 3])


def test_what_is_no_model_is_refused():
    for data in (b"", b"\x08\x01", b"text that is not a model"):
        with pytest.raises(tfr.BundleError, match="not an ONNX model"):
            proto.parse_model(data, where="file")


@pytest.mark.parametrize(("name", "dtype", "branches", "temperature"), CASES)
def test_rewritten_graph_equals_the_portable_one(  # noqa: PLR0917 - fixtures and cases
    exported, flows, name, dtype, branches, temperature
):
    source, flow = exported(name, dtype), flows(name, dtype)
    config, batch = flow.config, 3
    rng = np.random.default_rng(0)
    labels = rng.integers(0, config.classes + 1, (branches, batch)) if config.classes else None
    for block in range(2):
        inputs = StepInputs(
            noise=source.latents(batch, seed=block),
            labels=labels,
            guidance=rng.uniform(0, 2, (2, config.patches)).astype(np.float32),
            inverse_temperature=np.array([1.0, 1 / temperature][:branches], np.float32),
            is_reversed=block == 1,
            cache_dtype=dtype,
        )
        files = flow.bundle.blocks[block]
        portable = PortableStepper(Session(files.step, folder=files.step.parent, threads=1), config, inputs)
        session, tables = flow._engine._open_rewritten(block, inputs, windows=False, threads=1)
        rewritten = SequentialStepper(session, config, inputs, tables)
        tolerance = 2e-6 if dtype == "float32" else 4e-3
        for _ in range(config.patches - 1):
            portable.advance()
            rewritten.advance()
            np.testing.assert_allclose(rewritten.result(), portable.result(), rtol=0, atol=tolerance)
        assert np.abs(portable.result() - inputs.noise).max() > 0.1
    assert flow.engine_report["declined"] == []


def test_the_rewrites_leave_no_portable_attention(exported):
    source = exported("class")
    config = tfr.load(source.path).config
    graph = sequential_graph(step_model(source), config, branches=2, temperature=True)
    ops = op_types(graph.model)
    assert ops.count("GroupQueryAttention") == config.layers
    assert not {"TensorScatter", "Softmax", "Range", "GatherND", "Gather", "Shape", "Expand"} & set(ops)
    assert set(graph.inputs) == {"rows", "embedding", "z", "g", "lengths", "total", "query_factor"} | {
        f"{kind}_{layer}" for kind in ("key", "value") for layer in range(config.layers)
    }
    plain = sequential_graph(step_model(source), config, branches=1, temperature=False)
    assert not {"g", "query_factor"} & set(plain.inputs)


def find(graph: Graph, op_type: str, index: int = 0) -> Any:
    return [node for node in graph.nodes if node.op_type == op_type][index]


def by_name(graph: Graph, name: str) -> Any:
    return next(node for node in graph.nodes if node.name == name)


def swap(graph: Graph, op_type: str, other: str, index: int = 0) -> None:
    find(graph, op_type, index).op_type = other


DAMAGE = {
    "no scatter": lambda graph: swap(graph, "TensorScatter", "Identity"),
    "caches exchanged": lambda graph: find(graph, "TensorScatter").input.__setitem__(0, "value_0"),
    "written elsewhere": lambda graph: find(graph, "TensorScatter").input.__setitem__(2, "labels"),
    "no mask": lambda graph: swap(graph, "Where", "Max"),
    "mask of the labels": lambda graph: find(graph, "LessOrEqual").input.__setitem__(0, "labels"),
    "scale of the labels": lambda graph: find(graph, "Expand", -1).input.__setitem__(0, "labels"),
    "softmax over queries": lambda graph: find(graph, "Softmax").attribute.__getitem__(0).__setattr__("i", 2),
    "another activation after the softmax": lambda graph: swap(graph, "Softmax", "Sigmoid"),
    "heads merged in another order": lambda graph: (
        [n for n in graph.nodes if n.op_type == "Transpose"][-1].attribute[0].ints.__setitem__(0, 1)
    ),
    "q, k, v in another order": lambda graph: (
        find(graph, "Split").output.reverse() if hasattr(find(graph, "Split").output, "reverse") else None
    ),
    "position not added": lambda graph: find(graph, "Gather", 1).input.__setitem__(0, "proj_in.weight"),
    "embedding multiplied": lambda graph: by_name(graph, "embed/Add").__setattr__("op_type", "Mul"),
    "another softmax scale": lambda graph: by_name(graph, "query_scale/Mul").input.__setitem__(1, "const_1_scalar"),
    "mask of another sign": lambda graph: by_name(graph, "mask/LessOrEqual").__setattr__("op_type", "Greater"),
    "mask of zeros": lambda graph: by_name(graph, "mask/Where").input.__setitem__(2, "const_0.0_scalar"),
    "no exponential": lambda graph: swap(graph, "Exp", "Tanh"),
    "exponential of the shift": lambda graph: find(graph, "Exp").input.__setitem__(
        0, next(n for n in graph.nodes if "next" in n.output).input[1]
    ),
}
"""Graphs that compute something else. None of them may come out rewritten."""


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_another_graph_is_declined(exported, damage):
    source = exported("class")
    config = tfr.load(source.path).config
    graph = Graph(step_model(source))
    damage(graph)
    model = type(graph.model)()
    model.CopyFrom(graph.model)
    del model.graph.node[:]
    model.graph.node.extend(graph.nodes)
    with pytest.raises(PatternMismatch):
        sequential_graph(model, config, branches=2, temperature=True)


def test_a_model_of_another_shape_is_declined(exported):
    config = tfr.load(exported("class").path).config
    for rewrite in (
        lambda graph: attention.rewrite(graph, config, branches=1, temperature=False, windows=False),
        lambda graph: sequential_input.rewrite(graph, config),
        lambda graph: sequential_output.rewrite(graph, config, branches=1, windows=False),
    ):
        graph = Graph(proto.parse_model(onnx_identity(), where="identity"))
        with pytest.raises(PatternMismatch):
            rewrite(graph)


def onnx_identity() -> bytes:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Identity", ["patches"], ["next"])
    graph = onnx.helper.make_graph([node], "g", [value("patches", 1, ["B", 1])], [value("next", 1, ["B", 1])])
    return onnx.helper.make_model(graph).SerializeToString()


def test_a_declined_rewrite_runs_the_portable_graph_and_says_so(exported, monkeypatch):
    source = exported("class")
    images = []
    for declined in (False, True):
        if declined:

            def decline(*_: object, **__: object) -> None:
                raise PatternMismatch("another form")

            monkeypatch.setattr("tarflow_runtimes._engines.ort_cpu.sequential_graph", decline)
        with tfr.load(source.path) as flow:
            sample = flow.sample(3, labels=[0, 1, None], seed=4, guidance=1.0, attention_temperature=0.5)
            images.append(sample.images)
            report = flow.engine_report
        assert report["step_graph"] == ("portable" if declined else "rewritten")
        assert bool(report["declined"]) == declined
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=5e-6)
