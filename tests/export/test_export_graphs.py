"""The forward and gradient graphs equal PyTorch; all graphs are standard, alike across blocks, and share weights."""

import collections
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import graphs

KINDS = graphs.KINDS["portable"]
RUN_READY = [(provider, kind) for provider, kinds in graphs.KINDS.items() if provider != "portable" for kind in kinds]


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
def test_the_graphs_of_all_blocks_are_the_same_bytes(exported: Any, kind: str) -> None:
    tiny = exported("three_blocks")
    assert len({(tiny.folder / f"block_{k:02d}" / f"{kind}.onnx").read_bytes() for k in range(3)}) == 1


@pytest.mark.parametrize("precision", graphs.PROVIDERS)
def test_a_bundle_has_the_graphs_of_its_precision(exported: Any, precision: str) -> None:
    tiny = exported("class", precision)
    listed_graphs = tiny.manifest["graphs"]
    assert tuple(listed_graphs) == graphs.PROVIDERS[precision]
    for provider, kinds in listed_graphs.items():
        assert set(kinds) == set(graphs.KINDS[provider])
        for kind, graph in kinds.items():
            file = f"block_00/{kind}.onnx" if provider == "portable" else graph["file"]
            model = onnx.load(tiny.folder / file, load_external_data=False)
            for values, listed in ((model.graph.input, "inputs"), (model.graph.output, "outputs")):
                names = {onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower() for value in values}
                assert {entry["dtype"].replace("float32", "float") for entry in graph[listed]} == names
                shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]
                assert [entry["shape"] for entry in graph[listed]] == shapes
                assert [entry["name"] for entry in graph[listed]] == [value.name for value in values]


@pytest.mark.parametrize(("provider", "kind"), RUN_READY)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_run_ready_graphs_keep_their_tensors_in_the_weights(
    exported: Any, provider: str, kind: str, precision: str
) -> None:
    tiny = exported("class", precision)
    model = onnx.load(tiny.folder / "graphs" / provider / f"{kind}.onnx", load_external_data=False)
    table = tiny.manifest["tensors"]
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = table[tensor.name]
            where = {one.key: one.value for one in tensor.external_data}
            expected = {"location": "weights.bin", "offset": str(entry["offset"]), "length": str(entry["bytes"])}
            assert where == expected
            assert list(tensor.dims) == entry["shape"]
        else:
            assert len(tensor.raw_data) <= 64
    domains = {node.domain for node in model.graph.node}
    assert domains == ({"", "com.microsoft"} if provider == "ort-cpu" and not kind.startswith("vjp") else {""})


@pytest.mark.parametrize(
    ("precision", "provider", "kind"),
    [(one, *graph) for one, providers in graphs.PROVIDERS.items() for graph in RUN_READY if graph[0] in providers],
)
def test_run_ready_graphs_are_valid(exported: Any, tmp_path: Path, precision: str, provider: str, kind: str) -> None:
    """Beside the weights, where the checker looks for them; it knows no types of ONNX Runtime's own operators."""
    tiny = exported("class", precision)
    for file in (tiny.folder / "block_00" / "weights.bin", tiny.folder / "graphs" / provider / f"{kind}.onnx"):
        shutil.copy(file, tmp_path)
    model = onnx.load(tmp_path / f"{kind}.onnx")
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert (opsets.pop(""), opsets, model.ir_version) == (24, {"com.microsoft": 1} if opsets else {}, 12)
    onnx.checker.check_model(model, full_check=not opsets)


def test_the_steps_of_the_cpu_have_no_portable_attention(exported: Any) -> None:
    tiny = exported("class")
    for kind in graphs.KINDS["ort-cpu"]:
        if kind.startswith("vjp"):
            continue
        model = onnx.load(tiny.folder / "graphs" / "ort-cpu" / f"{kind}.onnx", load_external_data=False)
        operators = collections.Counter(node.op_type for node in model.graph.node)
        branches = 2 if kind in ("window_guided", "window_tempered") else 1
        assert operators["GroupQueryAttention"] == branches * tiny.config.layers
        assert not {"TensorScatter", "Softmax", "Range", "GatherND", "Gather", "Shape", "Expand"} & set(operators)


def test_the_layers_of_an_int8_step_multiply_integers_and_nothing_else_does(exported: Any) -> None:
    tiny = exported("class", "int8")
    model = onnx.load(tiny.folder / "graphs" / "ort-cpu" / "step.onnx", load_external_data=False)
    operators = collections.Counter(node.op_type for node in model.graph.node)
    assert (operators["MatMulNBits"], operators["Gemm"]) == (4 * tiny.config.layers, 2)
    rounded = [t for t in tiny.manifest["tensors"] if t.startswith("attn_blocks.") and t.endswith(".weight")]
    assert all(".norm." in name for name in rounded)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", ["class", "unconditional", "no_nvp", "tokens"])
def test_the_halves_of_the_gradient_are_the_gradient(exported: Any, name: str, precision: str) -> None:
    tiny = exported(name, precision)
    close = 2e-3 if precision == "float16" else 2e-6  # halves round apart where ONNX Runtime fuses other nodes
    for k in range(tiny.config.blocks):
        _, fed = tiny.labels(3)
        x, cotangent = tiny.patches(3, seed=k).numpy(), tiny.patches(3, seed=9).numpy()
        (expected,) = tiny.session(k, "gradient").run(["gradient"], {"patches": x, "cotangent": cotangent, **fed})
        ahead, back = tiny.run_ready(k, "vjp_forward"), tiny.run_ready(k, "vjp_backward")
        names = [value.name for value in ahead.get_outputs()]
        kept = dict(zip(names, ahead.run(names, {"patches": x, **fed}), strict=True))
        found = tiny.session(k, "forward").run(["z", "log_det"], {"patches": x, **fed})
        for one, other in zip((kept.pop("z"), kept.pop("log_det")), found, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=close)
        (gradient,) = back.run(["gradient"], {**kept, "cotangent": cotangent})
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=close)


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
                assert len(tensor.raw_data) <= 64
    table = tiny.manifest["tensors"].items()
    assert places == {name: {("weights.bin", entry["offset"], entry["bytes"])} for name, entry in table}


def test_the_table_of_tensors_leads_to_the_weights_of_the_model(tiny: Any) -> None:
    check_tensors(tiny)


@pytest.mark.parametrize("name", ["class", "tokens"])
def test_the_tensors_of_a_float16_bundle_are_rounded_to_nearest(exported: Any, name: str) -> None:
    check_tensors(exported(name, "float16"))


def check_tensors(tiny: Any) -> None:
    """Every tensor of the state dict in the dtype of its place, `order`, and nothing else in the files."""
    table, precision = tiny.manifest["tensors"], tiny.manifest["precision"]
    for k, block in enumerate(tiny.model.flow_blocks):
        expected = {name: tensor.numpy() for name, tensor in block.state_dict().items()}
        if tiny.config.classes:
            rows = expected["class_embed"][:, 0]
            expected["class_embed"] = np.concatenate([rows, rows.mean(axis=0, keepdims=True)])
        assert set(table) == {"order", *expected}
        np.testing.assert_array_equal(tiny.tensor(k, "order"), tiny.order(k))
        for name, array in expected.items():
            is_wide = "norm" in name or name.endswith("_embed")
            assert table[name]["dtype"] == ("float32" if is_wide else precision)
            assert table[name]["offset"] % 64 == 0
            stored = tiny.tensor(k, name)
            if name == "class_embed":  # the mean of its last row may be summed in another order
                np.testing.assert_allclose(stored, array, rtol=0, atol=1e-7)
            else:
                np.testing.assert_array_equal(stored, array.astype(stored.dtype))
        ends = [entry["offset"] + entry["bytes"] for entry in table.values()]
        assert (tiny.folder / f"block_{k:02d}" / "weights.bin").stat().st_size == max(ends)


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
                "guidance": ["B", 2, config.patches],
                "position": ["B"],
                "labels": ["G", "B"],
                "inverse_temperature": ["G", "B"],
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
