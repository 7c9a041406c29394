"""The bundle reader: what it reads, and every fault it must refuse with one clear line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes import BundleError
from tarflow_runtimes.bundle.reader import open_bundle


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.hint
    for word in words:
        assert word in message, message


def test_reads_a_bundle(exported):
    source = exported("class")
    bundle = open_bundle(source.path)
    config = bundle.config
    assert (config.patches, config.patch_values, config.dims, config.heads) == (4, 16, 64, 2)
    assert config.noise_std == 0.1
    assert bundle.class_names == ("cat", "dog", "wild")
    assert bundle.precision == bundle.cache_dtype == "float32"
    assert bundle.prior_variance is None
    assert bundle.digest == hashlib.sha256((source.path / "manifest.json").read_bytes()).hexdigest()
    assert [block.order for block in bundle.blocks] == ["identity", "reversed"]
    for block in bundle.blocks:
        assert set(block.portable) == {"forward", "step", "gradient"}
        assert all(path.is_absolute() and path.is_file() for path in (block.weights, *block.portable.values()))
    assert bundle.graph("ort-cpu", "step", 0) == bundle.graph("ort-cpu", "step", 1)
    assert bundle.graph("portable", "step", 0) != bundle.graph("portable", "step", 1)


def test_the_table_of_tensors_leads_to_the_weights(exported):
    source = exported("class")
    bundle = open_bundle(source.path)
    for k, block in enumerate(source.model.flow_blocks):
        np.testing.assert_array_equal(bundle.tensor(k, "pos_embed"), block.pos_embed.detach().numpy())
        rows = block.class_embed.detach().numpy()[:, 0]
        np.testing.assert_array_equal(bundle.tensor(k, "class_embed")[:-1], rows)
        np.testing.assert_allclose(bundle.tensor(k, "class_embed")[-1], rows.mean(axis=0), rtol=1e-6)
        assert bundle.tensor(k, "order").tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]][k]


def test_what_is_read_is_what_was_checked(copied):
    bundle = open_bundle(copied)
    path = bundle.graph("ort-cpu", "step", 0)
    data = bundle.read(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="has changed since the bundle was opened"):
        bundle.read(path)
    path.unlink()
    with pytest.raises(BundleError, match="cannot read"):
        bundle.read(path)


@pytest.mark.parametrize("name", ["extra.bin", "block_00/notes.txt", "graphs/ort-cpu/other.onnx"])
def test_a_file_that_the_manifest_does_not_list_is_refused(copied, name):
    (copied / name).write_bytes(b"x")
    refused(copied, name, "does not list")
    with pytest.raises(BundleError):
        open_bundle(copied, verify_digests=False)


def test_a_link_that_the_manifest_does_not_list_is_refused(copied, tmp_path):
    (copied / "block_00" / "more").symlink_to(tmp_path)
    refused(copied, "block_00/more", "does not list")


def test_reads_the_prior(exported):
    source = exported("no_nvp")
    prior = open_bundle(source.path).prior_variance
    np.testing.assert_array_equal(prior, source.model.var.numpy())


def test_ignores_fields_it_does_not_know(edit_manifest):
    path = edit_manifest(lambda data: data.update(future={"x": 1}))
    assert open_bundle(path).config.classes == 3


def test_a_bundle_may_be_reached_through_a_link(copied, tmp_path):
    link = tmp_path / "link.tarflow"
    link.symlink_to(copied)
    assert open_bundle(link).path == copied


def test_missing_directory(tmp_path):
    refused(tmp_path / "none.tarflow", "no such directory")


def test_a_file_instead_of_a_directory(tmp_path):
    path = tmp_path / "x.tarflow"
    path.write_text("")
    refused(path, "expected a directory")


def test_missing_manifest(copied):
    (copied / "manifest.json").unlink()
    refused(copied, "manifest.json", "missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff\xfe", "[" * 200_000], ids=range(6))
def test_manifest_that_is_no_json_object(copied, text):
    (copied / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(copied, "manifest.json")


@pytest.mark.parametrize(
    ("version", "hint"), [(3, "upgrade"), (1, "tarflow-export CHECKPOINT -o copy.tarflow --overwrite")]
)
def test_another_schema_version(edit_manifest, version, hint):
    path = edit_manifest(lambda data: data.update(schema_version=version))
    refused(path, f"schema_version {version}")
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert hint in caught.value.hint


@pytest.mark.parametrize("value", [None, "1", True, 0, 1.0])
def test_schema_version_of_another_kind(edit_manifest, value):
    refused(edit_manifest(lambda data: data.update(schema_version=value)), "schema_version")


@pytest.mark.parametrize(
    "field",
    [
        "format",
        "schema_version",
        "data",
        "config",
        "precision",
        "image_range",
        "tensors",
        "graphs",
        "blocks",
        "cache",
        "files",
    ],
)
def test_missing_field(edit_manifest, field):
    refused(edit_manifest(lambda data: data.pop(field)), field)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d["config"].update(width="64"), "config: width"),
        (lambda d: d["config"].update(blocks=3), "blocks"),
        (lambda d: d["config"].pop("width"), "config: width must be an integer >= 1, got None"),
        (lambda d: d["config"].update(patch_size=3), "patch_size"),
        (lambda d: d["config"].update(patch_size=0), "patch_size"),
        (lambda d: d["config"].update(image_size=1 << 20, patch_size=1), "config: the model is too large"),
        (lambda d: d["config"].update(labels=["a"]), "config: 1 label names for 3 classes"),
        (lambda d: d["config"].update(labels=["a", "a", "b"]), "config: label names are not unique"),
        (lambda d: d["config"].update(labels=[1, 2, 3]), "config: label names must be"),
        (lambda d: d["config"].update(noise_std=-1.0), "noise_std"),
        (lambda d: d["config"].update(noise_std=float("nan")), "noise_std"),
        (lambda d: d["config"].update(noise="salt"), "noise"),
        (lambda d: d["config"].update(nvp=1), "nvp"),
        (lambda d: d.update(precision="int4"), "precision"),
        (lambda d: d.update(precision="float16"), "cache.dtype"),
        (lambda d: d.update(data="audio"), "data"),
        (lambda d: d.update(data="tokens"), "data is 'tokens', but config describes"),
        (lambda d: d["tensors"].pop("pos_embed"), "tensors.pos_embed"),
        (lambda d: d["tensors"]["order"].update(shape=[5]), "tensors.order.shape"),
        (lambda d: d["tensors"]["order"].update(dtype="int4"), "tensors.order.dtype"),
        (lambda d: d["tensors"]["class_embed"].update(shape=[64, 4]), "tensors.class_embed"),
        (lambda d: d["tensors"]["pos_embed"].update(offset=1 << 40), "tensors.pos_embed.offset"),
        (lambda d: d["graphs"]["ort-cpu"]["step"].pop("file"), "graphs.ort-cpu.step.file"),
        (lambda d: d["graphs"]["ort-cpu"]["step"].update(file="../x.onnx"), "../x.onnx"),
        (lambda d: d["graphs"].update({"ort-cpu": 5}), "graphs.ort-cpu"),
        (lambda d: d.update(image_range=[0, 1]), "image_range"),
        (lambda d: d["cache"].update(heads=7), "cache.heads"),
        (lambda d: d["cache"].update(layout=["R"]), "cache.layout"),
        (lambda d: d["blocks"].pop(), "blocks"),
        (lambda d: d["blocks"].__setitem__(0, 5), "blocks[0]"),
        (lambda d: d["blocks"][1].update(order="random"), "blocks[1].order"),
        (lambda d: d["blocks"][1].update(step=5), "blocks[1].step"),
        (lambda d: d["blocks"][1].update(step="block_01/other.onnx"), "block_01/other.onnx"),
        (lambda d: d["blocks"][1].update(weights="block_00/weights.bin"), "blocks[1].weights"),
        (lambda d: d["files"].update({"block_00/step.onnx": 5}), "block_00/step.onnx"),
        (lambda d: d["files"]["block_00/step.onnx"].update(sha256=5), "sha256"),
        (lambda d: d["files"]["block_00/step.onnx"].update(size=-1), "size"),
    ],
)
def test_wrong_field(edit_manifest, change, word):
    refused(edit_manifest(change), word)


def test_missing_file(copied):
    (copied / "block_01" / "step.onnx").unlink()
    refused(copied, "block_01/step.onnx", "missing")


def test_truncated_file(copied):
    path = copied / "block_01" / "weights.bin"
    os.truncate(path, path.stat().st_size - 1)
    refused(copied, "block_01/weights.bin", "bytes")


def test_flipped_byte(copied):
    path = copied / "block_00" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    refused(copied, "block_00/weights.bin", "SHA-256")
    assert open_bundle(copied, verify_digests=False).config.classes == 3


@pytest.mark.parametrize(
    "name",
    [
        "../outside.bin",
        "/etc/hostname",
        "block_00/../../outside.bin",
        "block_00\\weights.bin",
        "C:/x",
        "./prior.npy",
        "",
    ],
)
def test_path_that_leaves_the_bundle(edit_manifest, tmp_path, name):
    (tmp_path / "outside.bin").write_bytes(b"x")
    entry = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    refused(edit_manifest(lambda data: data["files"].update({name: entry})), "path")


@pytest.mark.parametrize("field", ["weights", "step"])
def test_escaping_path_of_a_block(edit_manifest, tmp_path, field):
    (tmp_path / "outside.bin").write_bytes(b"x")
    refused(edit_manifest(lambda data: data["blocks"][0].update({field: "../outside.bin"})), "../outside.bin", "leaves")


def test_file_that_is_a_link(copied, tmp_path):
    path = copied / "block_00" / "weights.bin"
    moved = path.rename(tmp_path / "elsewhere.bin")
    path.symlink_to(moved)
    refused(copied, "block_00/weights.bin", "symbolic link")


def test_folder_that_is_a_link(copied, tmp_path):
    moved = (copied / "block_00").rename(tmp_path / "elsewhere")
    (copied / "block_00").symlink_to(moved)
    refused(copied, "symbolic link")


def test_folder_in_the_place_of_a_file(copied):
    path = copied / "block_00" / "step.onnx"
    path.unlink()
    path.mkdir()
    refused(copied, "regular file")


@pytest.mark.parametrize(
    "prior",
    [np.ones((4, 16), np.float64), np.ones((4, 15), np.float32), np.zeros((4, 16), np.float32), b"not an array"],
)
def test_prior_that_does_not_fit(copied, edit_manifest, prior):
    path = copied / "prior.npy"
    if isinstance(prior, bytes):
        path.write_bytes(prior)
    else:
        np.save(path, prior)
    raw = path.read_bytes()
    entry = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    refused(
        edit_manifest(lambda data: (data.update(prior="prior.npy"), data["files"].update({"prior.npy": entry}))),
        "prior",
    )


def rewritten(bundle: Path, name: str, raw: bytes) -> Path:
    """`bundle` with another file under `name`, and a manifest that says so: the digests are right."""
    (bundle / name).write_bytes(raw)
    manifest = bundle / "manifest.json"
    data = json.loads(manifest.read_text())
    data["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest.write_text(json.dumps(data))
    return bundle


GRAPHS = {
    "step": "graphs/ort-cpu/step.onnx",
    "vjp": "graphs/ort-cpu/vjp_backward.onnx",
    "forward": "block_01/forward.onnx",
}


def use(flow: tfr.Flow, kind: str) -> None:
    """Something that opens the graph of that kind."""
    if kind == "forward":
        flow.encode(np.zeros((1, *flow.config.shape), np.float32))
    else:
        flow.sample(1, denoise=kind == "vjp", seed=0)


@pytest.mark.parametrize("kind", GRAPHS)
def test_graph_that_is_no_onnx(copied, kind):
    flow = tfr.load(rewritten(copied, GRAPHS[kind], b"not a graph"), "ort-cpu")
    with pytest.raises(tfr.EngineError, match="cannot open") as caught:
        use(flow, kind)
    assert GRAPHS[kind] in str(caught.value)


@pytest.mark.parametrize("kind", ["vjp_forward", "forward"])
def test_what_a_graph_returns_is_checked(copied, kind):
    """A self-consistent bundle whose graph returns another shape."""
    name = GRAPHS["forward"] if kind == "forward" else "graphs/ort-cpu/vjp_forward.onnx"
    model = onnx.load_from_string((copied / name).read_bytes())
    node = next(node for node in model.graph.node if "z" in node.output)
    node.output[list(node.output).index("z")] = "whole"
    bounds = [onnx.numpy_helper.from_array(np.array([n], np.int64), f"cut_{n}") for n in (0, 1)]
    model.graph.initializer.extend(bounds)
    model.graph.node.append(onnx.helper.make_node("Slice", ["whole", "cut_0", "cut_1", "cut_1"], ["z"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    flow = tfr.load(rewritten(copied, name, model.SerializeToString()), "ort-cpu")
    images = np.zeros((2, *flow.config.shape), np.float32)
    with pytest.raises(tfr.EngineError, match=r"returned z as float32 \[\d, 1, 16\], expected float32 \[\d, 4, 16\]"):
        flow.encode(images) if kind == "forward" else flow.denoise(images)
