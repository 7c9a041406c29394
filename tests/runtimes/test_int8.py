"""Int8 weights: rounding, the rewritten graph, what is reported, what is refused, and the measurement."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes import _effect
from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._effect import Effect, measure_effect
from tarflow_runtimes._rewrites import _weights_file, int8_weights, sequential_graph
from tarflow_runtimes._rewrites._graph import PatternMismatch

CASES = [("class_n16", "float32"), ("unconditional", "float32"), ("no_nvp", "float32"), ("class", "float16")]


@pytest.mark.parametrize("columns", [64, int8_weights.BLOCK, int8_weights.BLOCK + 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounding_is_to_the_nearest_of_255_levels_of_each_group(columns, dtype):
    weight = np.random.default_rng(0).standard_normal((8, columns)).astype(dtype)
    weight[3] = 0
    integers, scales = int8_weights.quantised(weight)
    groups = -(-columns // int8_weights.BLOCK)
    assert integers.shape == (8, groups, int8_weights.BLOCK)
    assert scales.shape == (8, groups)
    assert (integers.dtype, scales.dtype) == (np.uint8, dtype)
    levels = integers.astype(np.float64) - int8_weights.ZERO_POINT
    assert np.abs(levels).max() == 127
    found = (levels * scales[:, :, None]).reshape(8, -1)
    assert not found[:, columns:].any()
    assert not found[3].any()
    bound = np.repeat(scales.astype(np.float64), int8_weights.BLOCK, axis=1)[:, :columns] * 0.5001
    slack = 0 if dtype is np.float32 else 127 * bound * 2**-9  # the scale itself is rounded
    assert (np.abs(found[:, :columns] - weight) <= bound + slack).all()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_images_are_close_to_those_of_the_stored_weights_and_others(exported, flows, name, dtype):
    stored = flows(name, dtype)
    labels = [0, 1, None] if stored.config.classes else None
    with tfr.load(exported(name, dtype).path, weights="int8") as flow:
        for guidance, temperature in itertools.product((0.0, 1.0), (1.0, 0.5)):
            options = {"labels": labels, "seed": 1, "guidance": guidance, "denoise": False}
            if guidance and (labels is not None or temperature != 1.0):
                options["attention_temperature"] = temperature
            elif guidance:
                continue
            found, expected = flow.sample(3, **options).images, stored.sample(3, **options).images
            difference = np.abs(found - expected)
            assert difference.max() > 1e-4
            assert np.sqrt(np.mean(difference**2)) < 0.02 * expected.std()


def test_windows_take_the_int8_weights_too(exported):
    # not within the tolerance of the windows: rounded activations jump where real ones move a little
    with tfr.load(exported("class_n16").path, weights="int8") as flow:
        one_by_one = flow.sample(2, labels=[0, 1], seed=0, denoise=False).images
        plan = tfr.Parallel(window=5, tolerance=1e-6)
        windows = flow.sample(2, labels=[0, 1], seed=0, denoise=False, plan=plan).images
    with tfr.load(exported("class_n16").path) as flow:
        stored = flow.sample(2, labels=[0, 1], seed=0, denoise=False).images
    assert np.abs(windows - one_by_one).mean() < 0.2 * np.abs(stored - one_by_one).mean()


def test_density_and_denoiser_stay_as_they_are(exported, flows):
    source, stored = exported("class"), flows("class")
    images, labels = source.images(3), [0, 1, None]
    with tfr.load(source.path, weights="int8") as flow:
        np.testing.assert_array_equal(flow.log_prob(images, labels), stored.log_prob(images, labels))
        np.testing.assert_array_equal(flow.denoise(images, labels), stored.denoise(images, labels))


def test_the_report_and_the_sample_name_the_weights(exported, flows):
    for name, dtype, weights, expected in [
        ("class", "float32", "int8", "int8"),
        ("class", "float32", "stored", "float32"),
        ("class", "float16", "stored", "float16"),
    ]:
        with tfr.load(exported(name, dtype).path, weights=weights) as flow:
            assert flow.engine_report["weights"] == expected
            assert flow.sample(1, seed=0, denoise=False).metadata["weights"] == expected
            assert flow.engine_report["step_graph"] == "rewritten"
    assert flows("class").engine_report["weights"] == "float32"


def test_only_the_layers_are_rewritten_and_no_float_weight_of_theirs_stays(exported, tmp_path):
    folder = exported("class").path / "block_00"
    config = tfr.load(exported("class").path).config
    model = int8_weights.rewrite(step_graph(exported), config, folder / "weights.bin", folder=tmp_path)
    graph = onnx.load_from_string(model).graph
    ops = [node.op_type for node in graph.node]
    assert ops.count("MatMulNBits") == 4 * config.layers
    assert ops.count("Gemm") == 2
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name.startswith(int8_weights.LAYERS)}
    matrices = [tensor for tensor in weights.values() if len(tensor.dims) > 1]
    assert {tensor.name.rsplit(".", 1)[1] for tensor in matrices} == {"int8", "scale"}
    places = {entry.value for tensor in weights.values() for entry in tensor.external_data if entry.key == "location"}
    assert places == {_weights_file.FILE}
    domains = [entry.domain for entry in onnx.load_from_string(model).opset_import]
    assert sorted(domains) == sorted(set(domains))


def step_graph(exported) -> bytes:
    path = exported("class").path / "block_00" / "step.onnx"
    config = tfr.load(exported("class").path).config
    model = proto.parse_model(path.read_bytes(), where="step")
    return sequential_graph(model, config, branches=1, temperature=False).model


def test_other_linear_layers_are_declined(exported, tmp_path):
    folder = exported("class").path / "block_00"
    config = tfr.load(exported("class").path).config

    def scale(gemm: onnx.NodeProto) -> None:
        gemm.attribute.append(onnx.helper.make_attribute("alpha", 2.0))

    def rename(gemm: onnx.NodeProto) -> None:
        gemm.op_type = "MatMul"

    for damage, message in ((scale, "more than a linear layer"), (rename, "7 linear layers, expected 8")):
        model = onnx.load_from_string(step_graph(exported))
        damage([node for node in model.graph.node if node.op_type == "Gemm"][1])
        with pytest.raises(PatternMismatch, match=message):
            int8_weights.rewrite(model.SerializeToString(), config, folder / "weights.bin", folder=tmp_path)


def test_a_graph_that_cannot_be_rewritten_is_an_error_and_not_another_graph(exported, monkeypatch):
    def decline(*_: object, **__: object) -> None:
        raise PatternMismatch("another form")

    monkeypatch.setattr("tarflow_runtimes._engines.ort_cpu.sequential_graph", decline)
    with tfr.load(exported("class").path, weights="int8") as flow:
        for _ in range(2):
            with pytest.raises(tfr.EngineError, match="block 1 cannot run with int8 weights: another form") as caught:
                flow.sample(1, seed=0, denoise=False)
        assert "stored" in caught.value.hint


def test_weights_that_are_not_finite_are_refused(copied):
    path = copied / "block_01" / "step.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.name == "attn_blocks.0.mlp.main.0.weight")
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    data = bytearray((copied / "block_01" / "weights.bin").read_bytes())
    data[offset : offset + 4] = np.array([np.nan], np.float32).tobytes()
    (copied / "block_01" / "weights.bin").write_bytes(data)
    with (
        tfr.load(copied, weights="int8", verify_digests=False) as flow,
        pytest.raises(tfr.EngineError, match=r"attn_blocks\.0\.mlp\.main\.0\.weight holds values that are not finite"),
    ):
        flow.sample(1, seed=0, denoise=False)


def test_a_full_disk_is_an_engine_error(exported, tmp_path):
    config, folder = tfr.load(exported("class").path).config, exported("class").path / "block_00"
    with pytest.raises(tfr.EngineError, match="cannot write"):
        int8_weights.rewrite(step_graph(exported), config, folder / "weights.bin", folder=tmp_path / "missing")


def test_unknown_weights_are_refused(exported):
    with pytest.raises(tfr.InputError, match="'int4'") as caught:
        tfr.load(exported("class").path, weights="int4")
    assert "stored" in str(caught.value)


def test_no_file_stays_behind(exported, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with tfr.load(exported("class").path, weights="int8") as flow:
        flow.sample(1, seed=0, denoise=False)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["class", "unconditional"])
def test_the_effect_is_what_the_images_say(exported, flows, name, monkeypatch):
    monkeypatch.setattr(_effect, "IMAGES", 4)
    stored, steps = flows(name), []
    with tfr.load(exported(name).path, weights="int8") as changed:
        effect = measure_effect(stored, changed, on_step=lambda done, total: steps.append((done, total)))
        labels = [0, 1, 2, 0] if stored.config.classes else None
        pair = [flow.sample(4, labels=labels, seed=0, denoise=False).images for flow in (stored, changed)]
    difference = pair[1].astype(np.float64) - pair[0]
    assert effect.labels == labels
    np.testing.assert_allclose(effect.psnr, -10 * np.log10(np.mean(difference**2, axis=(1, 2, 3)) / 4))
    np.testing.assert_allclose(effect.max_difference, np.abs(difference).max(axis=(1, 2, 3)))
    np.testing.assert_allclose(effect.stored_bits_per_dim, stored.bits_per_dim(pair[0], labels))
    np.testing.assert_allclose(effect.bits_per_dim, stored.bits_per_dim(pair[1], labels))
    assert min(effect.psnr) > 30
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    summary = effect.summary()
    assert summary["psnr"] == (pytest.approx(np.mean(effect.psnr)), min(effect.psnr))
    assert summary["max_difference"][1] == max(effect.max_difference)
    assert json.loads(json.dumps(effect.to_json()))["each"]["psnr"] == effect.psnr


def test_the_effect_of_nothing_is_nothing(exported, flows, monkeypatch):
    monkeypatch.setattr(_effect, "IMAGES", 2)
    effect = measure_effect(flows("class"), flows("class"))
    assert isinstance(effect, Effect)
    assert (effect.psnr, effect.max_difference) == ([np.inf] * 2, [0.0] * 2)
    assert effect.bits_per_dim == effect.stored_bits_per_dim


def test_images_that_are_not_finite_fail_the_measurement(flows, monkeypatch):
    monkeypatch.setattr(_effect, "IMAGES", 1)
    flow = flows("class")
    sample = flow.sample(1, labels=[0], seed=0, denoise=False)
    sample.images[:] = np.nan
    monkeypatch.setattr(flow, "sample", lambda *_, **__: sample)
    with pytest.raises(tfr.VerificationError, match="float32 weights hold values that are not finite"):
        measure_effect(flow, flow)


def test_the_plan_of_one_kind_of_weights_is_not_that_of_the_other(exported):
    identities = []
    for weights in ("stored", "int8"):
        with tfr.load(exported("class").path, weights=weights) as flow:
            identities.append(flow.identity())
    assert identities[0] != identities[1]


def test_a_bundle_is_not_written_to(exported, copied):
    before = {path: path.stat().st_mtime_ns for path in Path(copied).rglob("*")}
    with tfr.load(copied, weights="int8") as flow:
        flow.sample(1, seed=0, denoise=False)
    assert {path: path.stat().st_mtime_ns for path in Path(copied).rglob("*")} == before
