"""The verification can fail: one fault in any graph or tensor leaves no bundle."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphs import KINDS, PROVIDERS
from tarflow_export import convert_bundle, export_bundle
from tarflow_runtimes import EngineError, VerificationError
from tarflow_sdk.testing import random_model, tiny_config

Plant = Callable[..., None]
SMALLEST = tiny_config(blocks=1, layers=1)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified bundle of one block of one layer, read only."""
    return export_bundle(random_model(SMALLEST), tmp_path_factory.mktemp("bundle") / "smallest.tarflow").path


def graphs_of(*precisions: Any) -> list[tuple[Any, str, str]]:
    """Every graph of bundles of these precisions: precision, provider, kind."""
    every = [(precision, provider) for precision in precisions for provider in PROVIDERS[precision]]
    return [(*of, kind) for of in every for kind in KINDS[of[1]]]


def wrong_node(model: onnx.ModelProto) -> None:
    """The last addition in a layer is a subtraction."""
    [node for node in model.graph.node if node.op_type == "Add" and node.name.startswith("layer_")][-1].op_type = "Sub"


def wrong_tensor(model: onnx.ModelProto) -> None:
    """The weight of a norm is read from where the next tensor lies, its bias."""
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "attn_blocks.0.attention.norm.weight")
    place = {entry.key: entry for entry in weight.external_data}
    place["offset"].value = str(int(place["offset"].value) + int(place["length"].value))


@pytest.mark.parametrize("change", [wrong_node, wrong_tensor])
@pytest.mark.parametrize("graph", graphs_of("float32"), ids="-".join)
def test_one_fault_in_any_graph_fails_and_leaves_nothing(
    tmp_path: Path, wrong_graph: Plant, graph: tuple[Any, str, str], change: Any
) -> None:
    wrong_graph(*graph[1:], change)
    check_planted(functools.partial(export_bundle, random_model(SMALLEST)), tmp_path, graph)


@pytest.mark.parametrize("graph", graphs_of("float16", "int8"), ids="-".join)
def test_one_fault_in_any_graph_fails_a_conversion(
    tmp_path: Path, wrong_graph: Plant, smallest: Path, graph: tuple[Any, str, str]
) -> None:
    wrong_graph(*graph[1:], wrong_node)
    check_planted(functools.partial(convert_bundle, smallest, precision=graph[0]), tmp_path, graph)


def check_planted(make: Any, folder: Path, graph: tuple[Any, str, str]) -> None:
    """Making the bundle fails, names the graph with the fault, and leaves nothing."""
    _, provider, kind = graph
    seen: list[Any] = []
    with pytest.raises(VerificationError, match="missed their tolerance") as caught:
        make(folder / "x.tarflow", on_verified=seen.append)
    assert caught.value.hint
    missed = {record.graph for record in seen[0].records if not record.passed}
    assert (f"block_00/{kind}.onnx" if provider == "portable" else f"graphs/{provider}/{kind}.onnx") in missed
    assert list(folder.iterdir()) == []


def test_a_graph_that_loads_but_does_not_run_is_one_clear_line(tmp_path: Path, wrong_graph: Plant) -> None:
    def too_few_rows(model: onnx.ModelProto) -> None:
        """Patches beyond the last are asked for; nothing says so before the graph runs."""
        node = next(node for node in model.graph.node if "order" in node.input)
        offset = onnx.numpy_helper.from_array(np.int64(1000), "offset")
        model.graph.initializer.append(offset)
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at, onnx.helper.make_node("Add", ["order", "offset"], ["beyond"], name="beyond"))
        for one in list(model.graph.node)[at + 1 :]:
            one.input[:] = ["beyond" if name == "order" else name for name in one.input]

    wrong_graph("portable", "forward", too_few_rows)
    with pytest.raises(EngineError, match=r"^ONNX Runtime failed in block_00/forward.onnx: .*1000") as caught:
        export_bundle(random_model(SMALLEST), tmp_path / "x.tarflow")
    assert "tarflow doctor" in caught.value.hint
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "order", "pos_embed", "class_embed", "proj_in.weight", "proj_out.bias", "attn_blocks.0.attention.norm.weight",
        "attn_blocks.0.attention.qkv.weight", "attn_blocks.0.mlp.main.2.bias",
    ],
)  # fmt: skip
def test_one_wrong_weight_fails_and_leaves_nothing(
    tmp_path: Path, wrong_weight: Callable[[str], None], name: str
) -> None:
    wrong_weight(name)
    with pytest.raises(VerificationError, match="missed their tolerance") as caught:
        export_bundle(random_model(SMALLEST), tmp_path / "x.tarflow")
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("wrong_prior")
def test_a_wrong_prior_fails_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="whole model"):
        export_bundle(random_model(dataclasses.replace(SMALLEST, nvp=False)), tmp_path / "x.tarflow")
    assert list(tmp_path.iterdir()) == []
