"""The bundle in the package is what today's exporter makes of the shipped checkpoint, and it draws digits."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import tarflow_runtimes as tfr
from tarflow_export import export_bundle

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "runtimes" / "tarflow_runtimes" / "models" / "mnist.tarflow"
(CHECKPOINT,) = (ROOT / "examples" / "01_train_mnist").glob("*.safetensors")


@pytest.fixture(scope="module")
def manifest() -> dict[str, object]:
    return json.loads((SHIPPED / "manifest.json").read_text())


def test_comes_from_the_shipped_checkpoint(manifest: dict) -> None:
    assert manifest["checkpoint"]["file"] == CHECKPOINT.name
    assert manifest["checkpoint"]["sha256"] == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    assert manifest["verification"]["status"] == "passed"
    assert CHECKPOINT.stat().st_size < 20e6


def test_exporting_again_gives_the_same_bundle(manifest: dict, tmp_path: Path) -> None:
    export_bundle(CHECKPOINT, tmp_path / "again.tarflow", verify=False)
    again = json.loads((tmp_path / "again.tarflow" / "manifest.json").read_text())
    for field in manifest.keys() - {"files", "reference", "verification", "tools"}:
        assert again[field] == manifest[field], field
    assert again["files"] == {name: file for name, file in manifest["files"].items() if name != "reference.npz"}


def test_every_graph_is_named_in_the_record_of_its_verification(manifest: dict) -> None:
    graphs = {name for name in manifest["files"] if name.endswith(".onnx")}
    assert {record["graph"] for record in manifest["verification"]["records"]} - {None} == graphs
    assert {name.split("/")[1] for name in graphs if name.startswith("graphs/")} == {"ort-cpu", "ort-cuda", "trt"}


def test_reads_the_digits_it_draws() -> None:
    with tfr.load() as flow:
        assert flow.config.classes == 10
        labels = list(range(10))
        out = flow.sample(20, labels=labels * 2, seed=0, guidance=2.0)
        read = flow.classify(out.images).argmax(axis=1)
        assert (read == np.array(labels * 2)).mean() >= 0.7
        bits = flow.bits_per_dim(out.images, labels=labels * 2)
        assert np.isfinite(bits).all()
