"""The verification can fail: one fault in any graph or tensor, planted where the exporter writes it, leaves no bundle.

Private modules are imported to plant the faults, and for the table of every graph that a bundle can hold.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import tarflow_export._export
import tarflow_export._plan
from tarflow_export import convert_bundle, export_bundle
from tarflow_export._graphs import BUILDERS, PRECISIONS
from tarflow_runtimes.errors import EngineError, VerificationError
from tarflow_sdk.testing import random_model, tiny_config

SMALLEST = tiny_config(blocks=1, layers=1)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified bundle of one block of one layer, read only."""
    return export_bundle(random_model(SMALLEST), tmp_path_factory.mktemp("bundle") / "smallest.tarflow").path


def graphs_of(*precisions: Any) -> list[tuple[Any, str, str]]:
    """Every graph of bundles of these precisions: precision, provider, kind."""
    every = [(precision, provider) for precision in precisions for provider in PRECISIONS[precision]]
    return [(*of, kind) for of in every for kind in BUILDERS[of[1]]]


def wrong_node(model: onnx.ModelProto) -> None:
    """The last addition in a layer is a subtraction."""
    [node for node in model.graph.node if node.op_type == "Add" and node.name.startswith("layer_")][-1].op_type = "Sub"


def wrong_tensor(model: onnx.ModelProto) -> None:
    """The weight of a norm is read from where the next tensor lies, its bias."""
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "attn_blocks.0.attention.norm.weight")
    place = {entry.key: entry for entry in weight.external_data}
    place["offset"].value = str(int(place["offset"].value) + int(place["length"].value))


def plant(monkeypatch: pytest.MonkeyPatch, provider: str, kind: str, change: Callable[[Any], None]) -> None:
    """Let the exporter write one graph with that change."""
    original = tarflow_export._plan._plan_graph

    def planted(*given: Any) -> Any:
        plan = original(*given)
        if (plan.provider, plan.kind) != (provider, kind):
            return plan
        model = onnx.load_from_string(plan.serialized)
        change(model)
        return dataclasses.replace(plan, serialized=model.SerializeToString())

    monkeypatch.setattr(tarflow_export._plan, "_plan_graph", planted)


@pytest.mark.parametrize("change", [wrong_node, wrong_tensor])
@pytest.mark.parametrize("graph", graphs_of("float32"), ids="-".join)
def test_one_fault_in_any_graph_fails_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: tuple[Any, str, str], change: Any
) -> None:
    check_planted(functools.partial(export_bundle, random_model(SMALLEST)), monkeypatch, tmp_path, graph, change)


@pytest.mark.parametrize("graph", graphs_of("float16", "int8"), ids="-".join)
def test_one_fault_in_any_graph_fails_a_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest: Path, graph: tuple[Any, str, str]
) -> None:
    convert = functools.partial(convert_bundle, smallest, precision=graph[0])
    check_planted(convert, monkeypatch, tmp_path, graph, wrong_node)


def check_planted(make: Any, monkeypatch: Any, folder: Path, graph: tuple[Any, str, str], change: Any) -> None:
    """Making the bundle fails, names the graph with the fault, and leaves nothing."""
    _, provider, kind = graph
    plant(monkeypatch, provider, kind, change)
    seen: list[Any] = []
    with pytest.raises(VerificationError, match="missed their tolerance") as caught:
        make(folder / "x.tarflow", on_verified=seen.append)
    assert caught.value.hint
    missed = {record.graph for record in seen[0].records if not record.passed}
    assert (f"block_00/{kind}.onnx" if provider == "portable" else f"graphs/{provider}/{kind}.onnx") in missed
    assert list(folder.iterdir()) == []


def test_a_graph_that_loads_but_does_not_run_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_few_rows(model: onnx.ModelProto) -> None:
        """Patches beyond the last are asked for; nothing says so before the graph runs."""
        node = next(node for node in model.graph.node if "order" in node.input)
        offset = onnx.numpy_helper.from_array(np.int64(1000), "offset")
        model.graph.initializer.append(offset)
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at, onnx.helper.make_node("Add", ["order", "offset"], ["beyond"], name="beyond"))
        for one in list(model.graph.node)[at + 1 :]:
            one.input[:] = ["beyond" if name == "order" else name for name in one.input]

    plant(monkeypatch, "portable", "forward", too_few_rows)
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


def test_a_wrong_prior_fails_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tarflow_export._export.load

    def load(*given: Any, **options: Any) -> Any:
        loaded = original(*given, **options)
        prior = loaded.contents.prior * np.float32(1.01)
        return dataclasses.replace(loaded, contents=dataclasses.replace(loaded.contents, prior=prior))

    monkeypatch.setattr(tarflow_export._export, "load", load)
    with pytest.raises(VerificationError, match="whole model"):
        export_bundle(random_model(dataclasses.replace(SMALLEST, nvp=False)), tmp_path / "x.tarflow")
    assert list(tmp_path.iterdir()) == []
