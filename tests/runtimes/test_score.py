"""The score on the two halves of the gradient graph, against the graph as it is; and what memory it may take."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._density import _score_recomputed, score
from tarflow_runtimes._engines import ort_cpu
from tarflow_runtimes._rewrites._graph import PatternMismatch
from tarflow_runtimes._rewrites.split_gradient import split_gradient

CUT = ["class", "class_n16", "unconditional", "three_blocks", "one_head"]


def patches_and_labels(flow: Any, images: int) -> tuple[np.ndarray, np.ndarray | None]:
    rng, config = np.random.default_rng(0), flow.config
    x = rng.uniform(-1, 1, (images, config.patches, config.patch_values)).astype(np.float32)
    return x, np.arange(images) % (config.classes + 1) if config.classes else None


def gradient_model(exported: Any, block: int = 0) -> Any:
    path = exported.path / f"block_{block:02d}" / "gradient.onnx"
    return proto.parse_model(path.read_bytes(), where=str(path))


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("name", CUT)
def test_the_score_is_that_of_the_whole_gradient_graph(flows, name, images):
    flow = flows(name)
    x, labels = patches_and_labels(flow, images)
    assert flow.backend.vjp_images() > 0
    whole = _score_recomputed(flow.backend, flow.bundle, x, labels)
    np.testing.assert_allclose(score(flow.backend, flow.bundle, x, labels), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(whole).max() > 0.1


@pytest.mark.parametrize("name", CUT)
def test_each_half_of_a_block(flows, name):
    flow = flows(name)
    x, labels = patches_and_labels(flow, 3)
    cotangent = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    for block in range(flow.config.blocks):
        z, way_back = flow.backend.vjp(block, x, labels, alone=True)
        np.testing.assert_allclose(z, flow.backend.forward(block, x, labels)[0], rtol=1e-5, atol=1e-5)
        expected = flow.backend.gradient(block, x, cotangent, labels)
        np.testing.assert_allclose(way_back(cotangent), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"), [("no_nvp", "float32"), ("no_nvp_unconditional", "float32"), ("class", "float16")]
)
def test_where_the_cut_is_not_possible_the_whole_graph_runs(flows, name, dtype):
    flow = flows(name, dtype)
    x, labels = patches_and_labels(flow, 2)
    assert flow.backend.vjp_images() == 0
    whole = _score_recomputed(flow.backend, flow.bundle, x, labels)
    np.testing.assert_array_equal(score(flow.backend, flow.bundle, x, labels), whole)


def test_a_batch_is_cut_to_what_may_be_kept(flows, monkeypatch):
    flow, sizes = flows("class_n16"), []
    x, labels = patches_and_labels(flow, 7)
    expected = score(flow.backend, flow.bundle, x, labels)
    vjp = flow.backend.vjp

    def counted(block: int, patches: np.ndarray, *given: Any, **named: Any) -> Any:
        sizes.append(len(patches))
        return vjp(block, patches, *given, **named)

    monkeypatch.setattr(flow.backend, "vjp", counted)
    monkeypatch.setattr(flow.backend, "vjp_images", lambda: 2)
    np.testing.assert_allclose(score(flow.backend, flow.bundle, x, labels), expected, rtol=1e-5, atol=1e-5)
    assert sum(sizes) == 7 * flow.config.blocks
    assert max(sizes) == 2


def test_the_bound_is_of_all_blocks_and_parts(flows, monkeypatch):
    flow = flows("class_n16")
    images = flow.backend.vjp_images()
    monkeypatch.setattr(ort_cpu, "VJP_BYTES", ort_cpu.VJP_BYTES // 2)
    assert flow.backend.vjp_images() == pytest.approx(images / 2, abs=1)
    monkeypatch.setattr(ort_cpu, "VJP_BYTES", 1)
    assert flow.backend.vjp_images() == 0


def test_no_node_runs_in_both_halves(exported):
    whole = gradient_model(exported("class"))
    halves = split_gradient(whole)
    forward, backward = (onnx.load_from_string(half) for half in (halves.forward, halves.backward))
    assert not {node.name for node in forward.graph.node if node.op_type in {"Gemm", "MatMul", "Softmax"}} & {
        node.name for node in backward.graph.node
    }
    assert [value.name for value in forward.graph.output] == ["z", *halves.saved]
    assert {value.name for value in backward.graph.input} == {"cotangent", *halves.saved}
    assert len(forward.graph.node) + len(backward.graph.node) == len(whole.graph.node) + 2


def test_a_block_without_scale_cannot_be_cut(exported):
    with pytest.raises(PatternMismatch, match="0 scales"):
        split_gradient(gradient_model(exported("no_nvp")))


def test_another_graph_cannot_be_cut(exported):
    path = exported("class").path / "block_00" / "forward.onnx"
    with pytest.raises(PatternMismatch, match="cotangent"):
        split_gradient(proto.parse_model(path.read_bytes(), where=str(path)))


def test_a_gradient_graph_that_cannot_be_cut_runs_whole(exported, flows, monkeypatch):
    def mismatch(_):
        raise PatternMismatch("two differences")

    monkeypatch.setattr("tarflow_runtimes._engines.ort_cpu.split_gradient", mismatch)
    model = exported("class_n16")
    images, labels = model.images(3), [0, 1, None]
    with tfr.load(model.path) as flow:
        found = flow.denoise(images, labels)
        assert flow.engine_report["declined"] == ["block 0: two differences", "block 1: two differences"]
        assert flow.engine_report["step_graph"] == "rewritten"
    np.testing.assert_allclose(found, flows("class_n16").denoise(images, labels), atol=1e-6)
