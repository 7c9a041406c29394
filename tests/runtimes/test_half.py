"""Half precision: rounding, where float32 stays, the same numbers as a float16 bundle, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.external_data_helper import load_external_data_for_model

import tarflow_runtimes as tfr
from tarflow_export import export_bundle
from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engines._session import Session
from tarflow_runtimes._rewrites import half
from tarflow_runtimes._rewrites._graph import PatternMismatch
from tarflow_runtimes._rewrites.advance import advance_graph

KINDS = ("step", "advance", "forward", "gradient")
NAMES = ["class", "class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head"]
TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def graph_of(bundle: Bundle, kind: str, block: int = 0) -> bytes:
    files = bundle.blocks[block]
    path: Path = files.step if kind == "advance" else getattr(files, kind)
    data = path.read_bytes()
    return advance_graph(proto.parse_model(data, where=kind), bundle.config) if kind == "advance" else data


def halved(bundle: Bundle, kind: str, dtype: str, folder: Path, block: int = 0) -> bytes:
    return half.rewrite(graph_of(bundle, kind, block), dtype, bundle.blocks[block].weights, folder=folder)


@pytest.fixture(scope="session")
def twins(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Bundle, Bundle]]:
    """A model's bundles in float32 and in float16."""
    made: dict[str, tuple[Bundle, Bundle]] = {}

    def get(name: str) -> tuple[Bundle, Bundle]:
        if name not in made:
            source = exported(name)
            path = tmp_path_factory.mktemp("twins") / "half.tarflow"
            export_bundle(source.model, path, dtype="float16", verify=False)
            made[name] = tuple(tfr._bundle.open_bundle(one) for one in (source.path, path))
        return made[name]

    return get


@pytest.mark.parametrize("dtype", half.DTYPES)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
@settings(deadline=None)
def test_rounding_is_pytorchs_on_all_finite_numbers(dtype, bits):
    numbers = np.array(bits, np.uint32).view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    expected = torch.from_numpy(numbers).to(TORCH[dtype]).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(half.rounded(numbers, dtype), expected)


@given(
    high=st.integers(0, 0x7F7F),
    low=st.one_of(st.sampled_from([0x7FFF, 0x8000, 0x8001]), st.integers(0, 0xFFFF)),
    sign=st.booleans(),
)
def test_bfloat16_is_the_nearest_and_at_ties_the_even_one(high, low, sign):
    number = np.array([sign << 31 | high << 16 | low], np.uint32).view(np.float32)
    found = int(half.rounded(number, "bfloat16")[0]) & 0x7FFF
    assert found == high + (low > 0x8000 or (low == 0x8000 and high % 2 == 1))


def element_types(model: onnx.ModelProto) -> dict[str, list[int]]:
    """What each node but the Casts yields."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return {node.name: [types[name] for name in node.output] for node in graph.node if node.op_type != "Cast"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_where_a_float16_bundle_has_it(twins, tmp_path, name, kind):
    single, exported_half = twins(name)
    for block in range(min(2, len(single.blocks))):
        made = element_types(onnx.load_from_string(halved(single, kind, "float16", tmp_path, block)))
        expected = element_types(onnx.load_from_string(graph_of(exported_half, kind, block)))
        assert made == {node: expected[node] for node in made}  # the rewrite drops what no output needs
        assert set(map(tuple, made.values())) >= {(onnx.TensorProto.FLOAT,), (onnx.TensorProto.FLOAT16,)}
        model = onnx.load_from_string(halved(single, kind, "bfloat16", tmp_path, block))
        coarse = element_types(model)
        swapped = {10: 16}
        assert coarse == {node: [swapped.get(one, one) for one in types] for node, types in made.items()}
        onnx.save(model, tmp_path / "model.onnx")
        onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", half.DTYPES)
def test_inputs_and_outputs_stay_float32_but_the_caches(twins, tmp_path, kind, dtype):
    single, _ = twins("class")
    before = onnx.load_from_string(graph_of(single, kind)).graph
    after = onnx.load_from_string(halved(single, kind, dtype, tmp_path)).graph
    for values, expected in ((after.input, before.input), (after.output, before.output)):
        assert [value.name for value in values] == [value.name for value in expected]
        for value, other in zip(values, expected, strict=True):
            is_cache = value.name.removeprefix("next_").startswith(("key_", "value_"))
            elem_type = half.DTYPES[dtype] if is_cache else other.type.tensor_type.elem_type
            assert value.type.tensor_type.elem_type == elem_type
            assert value.type.tensor_type.shape == other.type.tensor_type.shape


def feeds(bundle: Bundle, session: Session) -> dict[str, np.ndarray]:
    """Two images, two branches, three patches; every input of the graph its own numbers."""
    config, rng = bundle.config, np.random.default_rng(0)
    sizes = {"B": 2, "G": 2, "R": 4, "S": 3, "S + 1": 4, "L": config.patches}
    made: dict[str, np.ndarray] = {}
    for value in session.session.get_inputs():
        shape = [sizes.get(axis, axis) for axis in value.shape]
        if value.name == "reach":
            made[value.name] = np.arange(config.patches)
        elif "int64" in value.type:
            made[value.name] = np.zeros(shape, np.int64)
        else:
            made[value.name] = rng.standard_normal(shape).astype("f2" if "float16" in value.type else "f4")
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_float16_computes_what_a_float16_bundle_does(twins, tmp_path, name, kind):
    single, exported_half = twins(name)
    rewritten = Session(halved(single, kind, "float16", tmp_path), folder=tmp_path, threads=1)
    bundled = Session(graph_of(exported_half, kind), folder=exported_half.blocks[0].weights.parent, threads=1)
    precise = Session(graph_of(single, kind), folder=single.blocks[0].weights.parent, threads=1)
    given = feeds(single, rewritten)
    wide = {key: array.astype("f4") if array.dtype == np.float16 else array for key, array in given.items()}
    found, expected = (session.run(given, rewritten.outputs) for session in (rewritten, bundled))
    for one, other, exact in zip(found, expected, precise.run(wide, rewritten.outputs), strict=True):
        np.testing.assert_array_equal(one, other)
        # eleven bits, over two layers; what is read from random caches adds up to more
        np.testing.assert_allclose(one, exact, rtol=0, atol=2e-2 * max(1.0, np.abs(exact).max()))
    assert any((one != exact).any() for one, exact in zip(found, precise.run(wide, rewritten.outputs), strict=True))


@pytest.mark.parametrize("dtype", half.DTYPES)
def test_weights_are_rounded_once_and_islands_kept(twins, tmp_path, dtype):
    single, _ = twins("class")
    before = onnx.load(single.blocks[0].step)
    model = onnx.load_from_string(halved(single, "step", dtype, tmp_path))
    places = [
        int(entry.value) for one in model.graph.initializer for entry in one.external_data if entry.key == "offset"
    ]
    assert places
    assert all(place % 64 == 0 for place in places)
    load_external_data_for_model(model, str(tmp_path))
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    names = set()
    for tensor in model.graph.initializer:
        name = tensor.name.removesuffix(f".{dtype}")
        names.add(name)
        if tensor.name == name:
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), weights[name])
        else:
            expected = torch.from_numpy(weights[name].copy()).to(TORCH[dtype]).view(torch.int16).numpy()
            np.testing.assert_array_equal(np.frombuffer(tensor.raw_data, np.int16).reshape(expected.shape), expected)
        is_island = ".norm." in name or name in ("pos_embed", "class_embed") or weights[name].dtype == np.int64
        if name.startswith(("attn_blocks", "proj", "pos_embed", "class_embed")):
            assert is_island == (tensor.name == name)
    assert names == set(weights)
    assert (tmp_path / "weights.bin").stat().st_size < 0.6 * single.blocks[0].weights.stat().st_size


def with_weight(bundle: Bundle, name: str, value: float) -> None:
    """Set the first number of a tensor of block 0."""
    tensor = next(
        one for one in onnx.load(bundle.blocks[0].step, load_external_data=False).graph.initializer if one.name == name
    )
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    with bundle.blocks[0].weights.open("r+b") as file:
        file.seek(offset)
        file.write(np.array(value, np.float32).tobytes())


@pytest.mark.parametrize("name", ["attn_blocks.1.mlp.main.0.weight", "proj_out.bias"])
def test_weights_beyond_the_range_are_refused_by_name(copied, tmp_path, name):
    bundle = tfr._bundle.open_bundle(copied)
    with_weight(bundle, name, -65519.0)  # rounds to the largest
    halved(bundle, "step", "float16", tmp_path)
    with_weight(bundle, name, -65520.0)  # half way to what would be next
    with pytest.raises(tfr.EngineError, match=f"{name} holds values beyond the range of float16"):
        halved(bundle, "step", "float16", tmp_path)
    halved(bundle, "step", "bfloat16", tmp_path)
    all_ones = np.array(0xFFFFFFFF, np.uint32).view(np.float32)  # a NaN that would be rounded up to zero
    for value in (np.finfo(np.float32).max, np.inf, np.nan, all_ones):
        with_weight(bundle, name, value)
        with pytest.raises(tfr.EngineError, match=f"{name} holds values beyond the range of bfloat16"):
            halved(bundle, "step", "bfloat16", tmp_path)


def test_islands_may_be_beyond_the_range(copied, tmp_path):
    bundle = tfr._bundle.open_bundle(copied)
    with_weight(bundle, "pos_embed", 1e5)
    halved(bundle, "step", "float16", tmp_path)


@pytest.mark.parametrize("dtype", half.DTYPES)
def test_graphs_in_half_precision_are_refused(twins, tmp_path, dtype):
    _, exported_half = twins("class")
    with pytest.raises(tfr.EngineError, match=f"float16 weights cannot be made {dtype}"):
        halved(exported_half, "forward", dtype, tmp_path)


def test_an_output_that_a_product_makes_is_declined(twins, tmp_path):
    single, _ = twins("class")
    model = onnx.load_from_string(graph_of(single, "forward"))
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    model.graph.output.append(onnx.helper.make_tensor_value_info(gemm.output[0], 1, None))
    with pytest.raises(PatternMismatch, match="would be in float16"):
        half.rewrite(model.SerializeToString(), "float16", single.blocks[0].weights, folder=tmp_path)


def test_an_output_between_halves_stays_float32(twins, tmp_path):
    single, _ = twins("class")
    model = onnx.load_from_string(graph_of(single, "forward"))
    (reshape,) = [node for node in model.graph.node if node.name == "layer_0.attention/Reshape_4"]
    model.graph.output.append(onnx.helper.make_tensor_value_info(reshape.output[0], 1, None))
    made = onnx.load_from_string(
        half.rewrite(model.SerializeToString(), "float16", single.blocks[0].weights, folder=tmp_path)
    )
    assert element_types(made)["layer_0.attention/Reshape_4"] == [onnx.TensorProto.FLOAT]
    assert element_types(made)["layer_0.attention/Reshape"] == [onnx.TensorProto.FLOAT16]


def test_a_folder_that_cannot_be_written_is_one_line(twins, tmp_path):
    single, _ = twins("class")
    with pytest.raises(tfr.EngineError, match=r"cannot write .*weights\.bin"):
        halved(single, "step", "float16", tmp_path / "missing")
