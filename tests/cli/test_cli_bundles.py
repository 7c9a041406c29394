"""`tarflow inspect`, `tarflow verify`, and every verb on a bundle that is damaged or unsafe."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_tensorrt
import tarflow_runtimes as tfr
from rooms import CPU_ENGINE, open_bundle


def test_inspect(tarflow: Callable, class_bundle: Path) -> None:
    report = json.loads(tarflow("inspect", class_bundle, "--json").out)
    bundle = open_bundle(class_bundle)
    assert report["digest"] == bundle.digest
    assert (report["model"]["data"], report["model"]["shape"]) == ("image", [1, 8, 8])
    assert (report["model"]["patches"], report["model"]["patch_values"]) == (4, 16)
    assert report["labels"] == ["ant", "bee", "cat"]
    assert report["precision"] == "float32"
    assert report["graphs"]["portable"] == ["forward", "step", "gradient"]
    assert {"step", "window"} <= set(report["graphs"]["ort-cpu"])
    assert report["converted"] is None
    files = [path for path in class_bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert report["bytes"]["all"] == sum(path.stat().st_size for path in files)
    assert report["verification"]["status"] == "passed"
    assert report["verification"]["records"] > 10
    text = tarflow("inspect", class_bundle)
    assert (text.code, text.err) == (0, "")
    for part in (
        bundle.digest,
        "8x8, 1 channel, 4 patches of 16 values",
        "3: ant, bee, cat",
        "gaussian, sigma 0.1",
        "passed",
    ):
        assert part in text.out
    assert text.out.count("\n") == 12


def test_inspect_runs_nothing(
    tarflow: Callable, own_bundle: Path, colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfr, "load", lambda *_, **__: pytest.fail("an engine was opened"))
    flip(own_bundle / "block_00/weights.bin")
    assert tarflow("inspect", own_bundle).code == 0
    assert "classes         none" in tarflow("inspect", colour_bundle).out


def test_inspect_survives_a_manifest_with_odd_extras(tarflow: Callable, own_bundle: Path) -> None:
    edit(own_bundle, lambda manifest: manifest.update(verification="yes", tools=None, checkpoint=[1], opset=None))
    assert tarflow("inspect", own_bundle).code == 0


def test_verify(tarflow: Callable, class_bundle: Path) -> None:
    result = tarflow("verify", class_bundle, "--engine", "ort-cpu")
    assert (result.code, result.out) == (0, "")
    lines = result.err.splitlines()
    assert lines[0].split() == ["comparison", "graph", "measure", "value", "tolerance"]
    assert lines[-1].startswith(f"all {len(lines) - 2} comparisons passed on ort-cpu, float32 (")
    assert all(line.endswith("ok") for line in lines[1:-1])
    named = {word for line in lines for word in line.split() if word.endswith(".onnx")}
    assert {"block_00/forward.onnx", "block_01/forward.onnx", "graphs/ort-cpu/step_guided.onnx"} <= named
    report = json.loads(tarflow("verify", class_bundle, "--engine", "ort-cpu", "--json").out)
    assert (report["passed"], report["precision"]) == (True, "float32")
    assert len(report["records"]) == len(lines) - 2
    assert f"passed on {CPU_ENGINE}, float32 (" in tarflow("verify", class_bundle).err


def test_verify_fails_when_a_tolerance_is_missed(tarflow: Callable, own_bundle: Path) -> None:
    scale_weights(own_bundle, 1.1)
    result = tarflow("verify", own_bundle, "--json")
    assert result.code == 1
    report = json.loads(result.out)
    missed = [record["name"] for record in report["records"] if not record["passed"]]
    assert not report["passed"]
    assert any("block 1" in name for name in missed)
    assert not any("block 0" in name for name in missed)
    assert "MISSED" in result.err
    error, hint = result.err.splitlines()[-2:]
    assert error.startswith(f"error: {len(missed)} of {len(report['records'])} comparisons with PyTorch missed")
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("damaged", [False, True])
def test_verify_tells_the_engines_of_tensorrt(tarflow: Callable, own_bundle: Path, *, damaged: bool) -> None:
    """Passed or not, the outcome goes to where those engines are kept."""
    if damaged:
        scale_weights(own_bundle, 1.1)
    with fake_tensorrt.stand_in("trt"):
        result = tarflow("verify", own_bundle, "--engine", "trt", "--engine-dir", "engines", "--json")
    assert result.code == int(damaged)
    report = json.loads(result.out)
    assert (report["engine"], report["precision"], report["passed"]) == ("trt", "float32", not damaged)
    missed = [record["name"] for record in report["records"] if not record["passed"]]
    assert bool(missed) == damaged
    found = {"bundle": report["digest"], "comparisons": len(report["records"]), "missed": missed}
    told = [json.loads(path.read_text())["verifications"] for path in Path("engines").glob("*.json")]
    assert len(told) >= 8, "four graphs of two blocks"
    for [verification] in map(dict.values, told):
        assert verification["passed"] is not damaged
        assert verification["facts"] == found


def test_tokens(tarflow: Callable, token_bundle: Path) -> None:
    report = json.loads(tarflow("inspect", token_bundle, "--json").out)
    assert (report["model"]["data"], report["model"]["shape"]) == ("tokens", [5, 3])
    assert "data            5 tokens of 3 values" in tarflow("inspect", token_bundle).out
    result = tarflow("verify", token_bundle)
    assert result.code == 0
    assert "bits_per_dim" not in result.err


def test_verify_needs_a_reference(refused: Callable, colour_bundle: Path) -> None:
    assert "--no-verify" in refused("verify", colour_bundle, code=1).err
    assert "trt" in refused("verify", colour_bundle, "--engine", "trt").err


def scale_weights(bundle: Path, factor: float) -> None:
    """Make block 1 of another model, with a manifest that knows it."""
    weights = bundle / "block_01/weights.bin"
    weights.write_bytes((np.fromfile(weights, np.float32) * np.float32(factor)).tobytes())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    edit(bundle, lambda manifest: manifest["files"]["block_01/weights.bin"].update(sha256=digest))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 0x40
    path.write_bytes(data)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rename_file(bundle: Path, name: str) -> None:
    """Make the manifest call block 0's weights by another name."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("block_00/weights.bin")
        manifest["blocks"][0]["weights"] = name

    edit(bundle, change)


def link(bundle: Path, name: str) -> None:
    """Move a file or folder of the bundle out of it and leave a link."""
    (bundle / name).rename(bundle.parent / "outside")
    (bundle / name).symlink_to(bundle.parent / "outside")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda bundle: flip(bundle / "block_00/weights.bin"), "block_00/weights.bin is damaged"),
    "flipped byte of a graph": (lambda bundle: flip(bundle / "graphs/ort-cpu/step.onnx"), "step.onnx is damaged"),
    "file too many": (lambda bundle: (bundle / "block_00/notes.txt").touch(), "block_00/notes.txt"),
    "missing file": (lambda bundle: (bundle / "block_01/forward.onnx").unlink(), "block_01/forward.onnx is missing"),
    "missing manifest": (lambda bundle: (bundle / "manifest.json").unlink(), "manifest.json is missing"),
    "shortened file": (lambda bundle: (bundle / "block_00/weights.bin").write_bytes(b"0"), "has 1 bytes"),
    "no JSON": (lambda bundle: (bundle / "manifest.json").write_bytes(b"\xff{"), "not UTF-8 JSON"),
    "another format": (lambda bundle: edit(bundle, lambda manifest: manifest.update(format="zip")), "format"),
    "future version": (
        lambda bundle: edit(bundle, lambda manifest: manifest.update(schema_version=3)),
        "schema_version 3",
    ),
    "field missing": (
        lambda bundle: edit(bundle, lambda manifest: manifest["config"].pop("width")),
        "width must be an integer",
    ),
    "parent path": (lambda bundle: rename_file(bundle, "../own.tarflow/block_00/weights.bin"), "leaves the bundle"),
    "absolute path": (lambda bundle: rename_file(bundle, "/etc/hostname"), "not a relative path"),
    "linked file": (lambda bundle: link(bundle, "block_00/weights.bin"), "symbolic link"),
    "linked folder": (lambda bundle: link(bundle, "block_00"), "symbolic link"),
    "linked manifest": (lambda bundle: link(bundle, "manifest.json"), "symbolic link"),
    "no folder": (lambda bundle: (shutil.rmtree(bundle), bundle.touch()), "expected a directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundles(refused: Callable, own_bundle: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(own_bundle)
    assert message in refused("infer", own_bundle, "-n", 1).err
    if not damage.startswith("flipped"):  # inspect does not hash
        assert message in refused("inspect", own_bundle).err
