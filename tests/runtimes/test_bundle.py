"""The bundle reader: what it reads, and every fault it must refuse with one clear line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes import BundleError
from tarflow_runtimes._bundle import open_bundle


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
    assert bundle.labels == ("cat", "dog", "wild")
    assert bundle.dtype == bundle.cache_dtype == "float32"
    assert bundle.prior is None
    assert bundle.digest == hashlib.sha256((source.path / "manifest.json").read_bytes()).hexdigest()
    assert [block.order for block in bundle.blocks] == ["identity", "reversed"]
    for block in bundle.blocks:
        assert all(path.is_absolute() and path.is_file() for path in (block.forward, block.step, block.gradient))


def test_reads_the_prior(exported):
    source = exported("no_nvp")
    prior = open_bundle(source.path).prior
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


def test_future_schema_version(edit_manifest):
    path = edit_manifest(lambda data: data.update(schema_version=2))
    refused(path, "schema_version 2")
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("value", [None, "1", True, 0, 1.0])
def test_schema_version_of_another_kind(edit_manifest, value):
    refused(edit_manifest(lambda data: data.update(schema_version=value)), "schema_version")


@pytest.mark.parametrize(
    "field", ["format", "schema_version", "config", "dtype", "image_range", "blocks", "cache", "files"]
)
def test_missing_field(edit_manifest, field):
    refused(edit_manifest(lambda data: data.pop(field)), field)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d["config"].update(width="64"), "config.width"),
        (lambda d: d["config"].update(blocks=3), "blocks"),
        (lambda d: d["config"].update(patch_size=3), "patch_size"),
        (lambda d: d["config"].update(patch_size=0), "patch_size"),
        (lambda d: d["config"].update(image_size=1 << 20, patch_size=1), "config.width or another size is too large"),
        (lambda d: d["config"].update(labels=["a"]), "labels"),
        (lambda d: d["config"].update(labels=["a", "a", "b"]), "labels"),
        (lambda d: d["config"].update(labels=[1, 2, 3]), "labels"),
        (lambda d: d["config"].update(noise_std=-1.0), "noise_std"),
        (lambda d: d["config"].update(noise_std=float("nan")), "noise_std"),
        (lambda d: d["config"].update(noise="salt"), "noise"),
        (lambda d: d["config"].update(nvp=1), "nvp"),
        (lambda d: d.update(dtype="int8"), "dtype"),
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


def use(flow: tfr.Flow, kind: str) -> None:
    """Something that opens the graphs of that kind."""
    if kind == "forward":
        shape = flow.config.image_channels, flow.config.image_size, flow.config.image_size
        flow.encode(np.zeros((1, *shape), np.float32))
    else:
        flow.sample(1, denoise=kind == "gradient", seed=0)


@pytest.mark.parametrize("kind", ["step", "forward", "gradient"])
def test_graph_that_is_no_onnx(copied, kind):
    flow = tfr.load(rewritten(copied, f"block_01/{kind}.onnx", b"not a graph"))
    with pytest.raises(BundleError, match="not an ONNX model"):
        use(flow, kind)


@pytest.mark.parametrize("kind", ["step", "forward", "gradient"])
def test_graph_whose_weights_lie_elsewhere(copied, kind):
    raw = (copied / "block_01" / f"{kind}.onnx").read_bytes().replace(b"weights.bin", b"/etc/passwd")
    flow = tfr.load(rewritten(copied, f"block_01/{kind}.onnx", raw))
    with pytest.raises(BundleError, match="/etc/passwd"):
        use(flow, kind)


def test_the_shipped_bundle_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setattr("tarflow_runtimes._flow.SHIPPED", "none.tarflow")
    with pytest.raises(BundleError, match="comes with the package"):
        tfr.load()
