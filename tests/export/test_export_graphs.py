"""The forward and gradient graphs equal PyTorch; all graphs are standard, alike across blocks, and share weights."""

import collections
from typing import Any

import numpy as np
import onnx
import pytest
import torch

KINDS = ("forward", "step", "gradient")


@pytest.mark.parametrize("images", [1, 3, 17])
def test_forward_equals_pytorch(tiny: Any, images: int) -> None:
    for k, block in enumerate(tiny.model.flow_blocks):
        labels, fed = tiny.labels(images)
        x = tiny.patches(images, seed=k)
        with torch.no_grad():
            z, log_det = block(x, labels)
        actual_z, actual_log_det = tiny.session(k, "forward").run(["z", "log_det"], {"patches": x.numpy(), **fed})
        np.testing.assert_allclose(actual_z, z.numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(actual_log_det, log_det.numpy(), rtol=1e-5, atol=1e-5)
        assert actual_log_det.shape == (images,)


@pytest.mark.parametrize("kind", ["classes", "mixed", "null"])
def test_forward_takes_every_kind_of_label(exported: Any, kind: str) -> None:
    tiny = exported("class")
    labels, fed = tiny.labels(5, kind)
    x = tiny.patches(5)
    with torch.no_grad():
        z, _ = tiny.model.flow_blocks[1](x, labels)
    (actual,) = tiny.session(1, "forward").run(["z"], {"patches": x.numpy(), **fed})
    np.testing.assert_allclose(actual, z.numpy(), rtol=0, atol=1e-5)


def test_forward_is_causal_in_block_order(tiny: Any) -> None:
    for k in range(tiny.config.blocks):
        _, fed = tiny.labels(2)
        session, order = tiny.session(k, "forward"), tiny.order(k)
        x = tiny.patches(2).numpy()
        (before,) = session.run(["z"], {"patches": x, **fed})
        place = tiny.config.patches // 2
        x[:, order[place]] += 1.0
        (after,) = session.run(["z"], {"patches": x, **fed})
        changed = np.abs(after - before)[:, order].max(axis=(0, 2))
        assert np.all(changed[:place] == 0.0)
        assert np.all(changed[place:] > 1e-4)


@pytest.mark.parametrize("images", [1, 3, 17])
def test_gradient_equals_autograd(tiny: Any, images: int) -> None:
    for k, block in enumerate(tiny.model.flow_blocks):
        labels, fed = tiny.labels(images)
        x, cotangent = tiny.patches(images, seed=k).requires_grad_(), tiny.patches(images, seed=100 + k)
        z, log_det = block(x, labels)
        (gradient,) = torch.autograd.grad((cotangent * z).sum() + log_det.sum(), x)
        arrays = {"patches": x.detach().numpy(), "cotangent": cotangent.numpy(), **fed}
        (actual,) = tiny.session(k, "gradient").run(["gradient"], arrays)
        difference = np.linalg.norm(actual - gradient.numpy()) / np.linalg.norm(gradient.numpy())
        assert difference <= 2e-6


def test_gradient_holds_the_share_of_log_det(exported: Any) -> None:
    tiny = exported("class")
    _, fed = tiny.labels(2)
    x = tiny.patches(2).numpy()
    (gradient,) = tiny.session(0, "gradient").run(None, {"patches": x, "cotangent": np.zeros_like(x), **fed})
    session, direction, h = tiny.session(0, "forward"), tiny.patches(2, seed=1).numpy(), 1e-2
    ends = [session.run(["log_det"], {"patches": x + sign * h * direction, **fed})[0] for sign in (1.0, -1.0)]
    numeric = (ends[0] - ends[1]) / (2 * h)
    np.testing.assert_allclose((gradient * direction).sum(axis=(1, 2)), numeric, rtol=2e-3, atol=2e-3)
    assert np.abs(numeric).max() > 0.01


def load(tiny: Any, block: int, kind: str) -> onnx.ModelProto:
    path = tiny.folder / f"block_{block:02d}" / f"{kind}.onnx"
    return onnx.load(path, load_external_data=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_valid_and_use_standard_operators_only(exported: Any, kind: str, dtype: str) -> None:
    for name in ("class", "no_nvp_unconditional"):
        tiny = exported(name, dtype)
        onnx.checker.check_model(tiny.folder / "block_00" / f"{kind}.onnx", full_check=True)
        model = load(tiny, 0, kind)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
        assert {node.domain for node in model.graph.node} == {""}
        operators = {node.op_type for node in model.graph.node}
        assert not operators & {"Attention", "Loop", "Scan", "If"}
        for node in model.graph.node:
            assert onnx.defs.get_schema(node.op_type, 24).name == node.op_type


def test_the_step_graph_keeps_to_the_form_that_tensorrt_takes(exported: Any) -> None:
    model = load(exported("class"), 0, "step")
    inputs, outputs = {value.name for value in model.graph.input}, {value.name for value in model.graph.output}
    scatters = [node for node in model.graph.node if node.op_type == "TensorScatter"]
    assert len(scatters) == 4
    for node in scatters:
        assert node.input[0] in inputs
        assert node.output[0] in outputs
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes == {"axis": -2, "mode": b"linear"}
    assert not [node for node in model.graph.node if node.op_type == "Slice"]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_differ_in_their_order_and_in_nothing_else(exported: Any, kind: str) -> None:
    tiny = exported("three_blocks")
    files = [(tiny.folder / f"block_{k:02d}" / f"{kind}.onnx").read_bytes() for k in range(3)]
    assert files[0] == files[2]
    assert files[0] != files[1]
    graphs = [load(tiny, k, kind) for k in (0, 1)]
    for graph in graphs:
        (order,) = [tensor for tensor in graph.graph.initializer if tensor.name == "order"]
        graph.graph.initializer.remove(order)
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_three_graphs_share_one_copy_of_the_weights(exported: Any, dtype: str) -> None:
    tiny = exported("class", dtype)
    places = collections.defaultdict(set)
    for kind in KINDS:
        for tensor in load(tiny, 1, kind).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                places[tensor.name].add((where["location"], int(where["offset"]), int(where["length"])))
            else:
                assert len(tensor.raw_data) <= 8 * tiny.config.patches  # constants, and the order
    state = tiny.model.flow_blocks[1].state_dict()
    assert set(places) == set(state)
    raw = (tiny.folder / "block_01" / "weights.bin").read_bytes()
    end = 0
    for name, tensor in state.items():
        ((location, offset, length),) = places[name]  # the same place in every graph
        assert location == "weights.bin"
        expected = tensor.numpy()
        if name == "class_embed":
            expected = np.concatenate([expected[:, 0], expected[:, 0].mean(axis=0, keepdims=True)])
        kept_wide = "norm" in name or name.endswith("_embed")
        stored = np.frombuffer(raw[offset : offset + length], "float32" if kept_wide else dtype)
        np.testing.assert_allclose(stored.reshape(expected.shape), expected.astype(stored.dtype), rtol=1e-6)
        end = max(end, offset + length)
    assert end == len(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_are_those_of_the_specification(exported: Any, kind: str) -> None:
    tiny = exported("class", "float16")
    config = tiny.config
    image, heads = ["B", config.patches, config.patch_values], [config.heads, config.patches, config.head_dim]
    cache = {f"{name}_{layer}": ["R", *heads] for layer in range(config.layers) for name in ("key", "value")}
    expected: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "forward": ({"patches": image, "labels": ["B"]}, {"z": image, "log_det": ["B"]}),
        "gradient": ({"patches": image, "cotangent": image, "labels": ["B"]}, {"gradient": image}),
        "step": (
            {
                "patches": ["B", "S", config.patch_values],
                "noise": image,
                "guidance": [2, config.patches],
                "position": ["B"],
                "labels": ["G", "B"],
                "inverse_temperature": ["G"],
                **cache,
            },
            {"next": ["B", "S", config.patch_values], **{f"next_{name}": shape for name, shape in cache.items()}},
        ),
    }
    graph = load(tiny, 0, kind).graph
    for values, shapes in zip((graph.input, graph.output), expected[kind], strict=True):
        found = {}
        for value in values:
            tensor = value.type.tensor_type
            found[value.name] = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
            is_cache, is_index = "key_" in value.name or "value_" in value.name, value.name in ("labels", "position")
            dtype = (
                onnx.TensorProto.FLOAT16 if is_cache else onnx.TensorProto.INT64 if is_index else onnx.TensorProto.FLOAT
            )
            assert tensor.elem_type == dtype, value.name
        assert found == shapes
    described = tiny.plan.graphs[kind]
    for listed, shapes in zip((described.inputs, described.outputs), expected[kind], strict=True):
        assert {entry["name"]: entry["shape"] for entry in listed} == shapes


def test_models_without_classes_have_no_labels(exported: Any) -> None:
    tiny = exported("unconditional")
    for kind in KINDS:
        assert "labels" not in {value.name for value in load(tiny, 0, kind).graph.input}


@pytest.mark.parametrize("name", ["class", "no_nvp"])
def test_float16_stays_close(exported: Any, name: str) -> None:
    tiny = exported(name, "float16")
    for k, block in enumerate(tiny.model.flow_blocks):
        labels, fed = tiny.labels(3)
        x, cotangent = tiny.patches(3, seed=k).requires_grad_(), tiny.patches(3, seed=100 + k)
        z, log_det = block(x, labels)
        (gradient,) = torch.autograd.grad((cotangent * z).sum() + log_det.sum(), x)
        arrays = {"patches": x.detach().numpy(), **fed}
        (actual_z,) = tiny.session(k, "forward").run(["z"], arrays)
        (actual_gradient,) = tiny.session(k, "gradient").run(None, {**arrays, "cotangent": cotangent.numpy()})
        for actual, expected in ((actual_z, z), (actual_gradient, gradient)):
            assert actual.dtype == np.float32
            error = np.linalg.norm(actual - expected.detach().numpy()) / np.linalg.norm(expected.detach().numpy())
            assert 1e-6 < error < 2e-3  # rounded, but not by more than eleven bits explain
