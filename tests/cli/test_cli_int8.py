"""`--weights int8` of `tarflow infer` and `tarflow verify`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tarflow_runtimes as tfr


def test_verify_writes_the_effect_beside_the_bundle(tarflow: Callable, own_bundle: Path) -> None:
    target = own_bundle.with_name("own.int8.json")
    target.write_text("of an earlier run")
    result = tarflow("verify", own_bundle, "--weights", "int8", "--json")
    assert result.code == 0, result.err
    document = json.loads(target.read_text())
    assert json.loads(result.out) == {"bundle": str(own_bundle), "file": str(target)} | document
    with tfr.load(own_bundle) as flow:
        assert document["digest"] == flow.bundle.digest
        assert (document["weights"], document["stored"]) == ("int8", "float32")
        labels = document["each"]["labels"]
        images = flow.sample(document["images"], labels=labels, seed=document["seed"], denoise=False).images
        np.testing.assert_allclose(document["each"]["stored_bits_per_dim"], flow.bits_per_dim(images, labels))
    assert labels == [i % 3 for i in range(document["images"])]
    psnr = document["summary"]["psnr"]
    assert 30 < psnr["worst"] <= psnr["mean"] < 100
    table = [line.split() for line in result.err.splitlines()]
    assert table[0] == ["measure", "mean", "worst"]
    assert table[1] == ["psnr", f"{psnr['mean']:.4f}", f"{psnr['worst']:.4f}"]
    assert {path.name for path in own_bundle.parent.iterdir()} >= {"own.tarflow", "own.int8.json"}
    assert not [path for path in own_bundle.parent.iterdir() if path.name.startswith(".")]


def test_the_bundle_may_be_the_working_folder(
    tarflow: Callable, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_bundle)
    assert tarflow("verify", ".", "--weights", "int8").code == 0
    assert own_bundle.with_name("own.int8.json").is_file()


def test_verify_says_first_where_it_cannot_write(
    refused: Callable, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_bundle.with_name("own.int8.json").mkdir()
    monkeypatch.setattr(tfr.Flow, "sample", None)
    result = refused("verify", own_bundle, "--weights", "int8")
    assert "own.int8.json" in result.err
    assert "copy the bundle" in result.err


def test_infer_draws_with_int8_weights(tarflow: Callable, class_bundle: Path) -> None:
    options = ("infer", class_bundle, "-n", 2, "--labels", "0,1", "--seed", 0, "--no-denoise", "--json")
    found = json.loads(tarflow(*options, "--weights", "int8", "-o", "int8.npy").out)
    stored = json.loads(tarflow(*options, "-o", "stored.npy").out)
    assert (found["weights"], stored["weights"]) == ("int8", "float32")
    difference = np.abs(np.load("int8.npy") - np.load("stored.npy")).max()
    assert 1e-4 < difference < 0.1


def test_unknown_weights(refused: Callable, class_bundle: Path) -> None:
    for verb in ("infer", "verify"):
        assert "weights must be one of stored, int8, got 'int4'" in refused(verb, class_bundle, "--weights", "int4").err
