"""`tarflow encode`, `denoise`, `log-prob`, `classify` beside the same calls in Python."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tarflow_runtimes as tfr
from rooms import CPU_ENGINE


def picture(path: str | Path) -> Image.Image:
    """An image file, read and closed."""
    with Image.open(path) as image:
        image.load()
    return image


def arrays(path: str) -> dict[str, np.ndarray]:
    """An .npz file, read and closed."""
    with np.load(path) as file:
        return dict(file)


@pytest.fixture
def files(tarflow: Callable) -> list[str]:
    """Two pictures and an array of three, all 8x8x1."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(name)
    np.save("c.npy", rng.uniform(-1, 1, (3, 1, 8, 8)).astype(np.float32))
    return ["a.png", "b.png", "c.npy"]


@pytest.fixture
def pixels(files: list[str]) -> np.ndarray:
    levels = [np.asarray(picture(name), np.float32)[None, None] for name in files[:2]]
    return np.concatenate([*[level / 127.5 - 1 for level in levels], np.load("c.npy")]).astype(np.float32)


NAMES = ["a.png", "b.png", "c.npy[0]", "c.npy[1]", "c.npy[2]"]


def test_encode_and_back(tarflow: Callable, class_bundle: Path, files: list[str], pixels: np.ndarray) -> None:
    options = ("--bundle", class_bundle, "--labels", "bee", "--batch-size", 2)
    result = tarflow("encode", *files, *options, "-o", "z.npz", "--json")
    assert result.code == 0
    report, saved = json.loads(result.out), arrays("z.npz")
    with tfr.load(class_bundle) as flow:
        z, log_det = flow.encode(pixels, labels=[1] * 5)
    assert np.abs(saved["z"] - z).max() < 1e-5
    assert np.abs(saved["log_det"] - log_det).max() < 1e-4
    assert [row["file"] for row in report["images"]] == NAMES
    assert [row["label"] for row in report["images"]] == ["bee"] * 5
    assert np.allclose([row["log_det"] for row in report["images"]], log_det, atol=1e-4)
    assert report["files"] == ["z.npz"]
    assert (report["engine"], report["precision"]) == (CPU_ENGINE, "float32")
    np.save("z.npy", saved["z"])
    back = tarflow("infer", class_bundle, "--labels", "bee", "--noise", "z.npy", "--no-denoise", "-o", "x.npy")
    assert back.code == 0
    assert np.abs(np.load("x.npy") - pixels).max() < 1e-3


def test_log_prob(tarflow: Callable, class_bundle: Path, files: list[str], pixels: np.ndarray) -> None:
    labels = [0, 1, 2, None, 0]
    options = ("--bundle", class_bundle, "--labels", "ant,bee,cat,null,0")
    with tfr.load(class_bundle) as flow:
        log_prob, bits = flow.log_prob(pixels, labels=labels), flow.bits_per_dim(pixels, labels=labels)
    table = tarflow("log-prob", *files, *options)
    assert (table.code, table.err) == (0, "")
    rows = [line.split("\t") for line in table.out.splitlines()]
    assert [row[0] for row in rows] == NAMES
    assert np.allclose([float(row[1]) for row in rows], log_prob, atol=1e-3)
    assert np.allclose([float(row[2]) for row in rows], bits, atol=1e-4)
    result = tarflow("log-prob", *files, *options, "-o", "scores.npz", "--json", "--batch-size", 3)
    report = json.loads(result.out)
    assert np.allclose([row["log_prob"] for row in report["images"]], log_prob, rtol=1e-5)
    assert np.allclose([row["bits_per_dim"] for row in report["images"]], bits, rtol=1e-5)
    assert np.allclose(arrays("scores.npz")["bits_per_dim"], bits, rtol=1e-5)
    assert result.err.startswith("wrote scores.npz (5 images, ")


def test_classify(tarflow: Callable, class_bundle: Path, files: list[str], pixels: np.ndarray) -> None:
    with tfr.load(class_bundle) as flow:
        posteriors = flow.classify(pixels)
    best = [("ant", "bee", "cat")[index] for index in posteriors.argmax(1)]
    table = tarflow("classify", *files, "--bundle", class_bundle)
    rows = [line.split("\t") for line in table.out.splitlines()]
    assert [row[:2] for row in rows] == [[name, label] for name, label in zip(NAMES, best, strict=True)]
    assert np.allclose([float(row[2]) for row in rows], np.exp(posteriors.max(1)), atol=1e-4)
    report = json.loads(tarflow("classify", *files, "--bundle", class_bundle, "--json", "-o", "p.npy").out)
    assert [row["label"] for row in report["images"]] == best
    assert np.allclose([row["log_posteriors"]["cat"] for row in report["images"]], posteriors[:, 2], atol=1e-4)
    assert np.allclose(np.load("p.npy"), posteriors, atol=1e-4)


def test_denoise(tarflow: Callable, class_bundle: Path, files: list[str], pixels: np.ndarray) -> None:
    with tfr.load(class_bundle) as flow:
        expected = flow.denoise(pixels, labels=[2] * 5, sigma=0.2, strength=0.5)
        digest = flow.bundle.digest
    options = ("--bundle", class_bundle, "--labels", "cat", "--sigma", 0.2, "--strength", 0.5)
    assert tarflow("denoise", *files, *options, "-o", "x.npy").code == 0
    assert np.abs(np.load("x.npy") - expected).max() < 1e-5
    report = json.loads(tarflow("denoise", *files, *options, "-o", "clean/", "--json").out)
    names = ["a.png", "b.png", "c_000000.png", "c_000001.png", "c_000002.png"]
    assert report["files"] == [f"clean/{name}" for name in names]
    levels = np.rint(127.5 * np.clip(expected, -1, 1) + 127.5)
    for name, level in zip(names, levels, strict=True):
        cleaned = picture(Path("clean") / name)
        assert np.abs(np.asarray(cleaned, np.float32) - level[0]).max() <= 1
        assert cleaned.text["tarflow:digest"] == digest


def test_files_of_the_same_name_are_numbered(tarflow: Callable, class_bundle: Path, files: list[str]) -> None:
    Path("other").mkdir()
    Path("a.png").rename("other/b.png")
    assert tarflow("denoise", "b.png", "other/b.png", "--bundle", class_bundle, "-o", "clean/").code == 0
    assert sorted(path.name for path in Path("clean").iterdir()) == ["000000_b.png", "000001_b.png"]


def test_tokens(tarflow: Callable, token_bundle: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 3), dtype=np.float32)
    np.save("x.npy", values)
    names = ["x.npy[0]", "x.npy[1]", "x.npy[2]"]
    with tfr.load(token_bundle) as flow:
        z, log_det = flow.encode(values, labels=[1] * 3)
        log_prob, clean = flow.log_prob(values, labels=[1] * 3), flow.denoise(values, labels=[1] * 3)
        best = flow.classify(values).argmax(axis=1)
    options = ("--bundle", token_bundle, "--labels", "bee")
    assert tarflow("encode", "x.npy", *options, "-o", "z.npz").err.startswith("wrote z.npz (3 samples, ")
    np.testing.assert_allclose(arrays("z.npz")["z"], z, atol=1e-5)
    np.testing.assert_allclose(arrays("z.npz")["log_det"], log_det, atol=1e-4)
    assert tarflow("denoise", "x.npy", *options, "-o", "clean.npz").code == 0
    np.testing.assert_allclose(arrays("clean.npz")["images"], clean, atol=1e-5)
    assert tarflow("denoise", "clean.npz", *options, "-o", "cleaner.npy").code == 0  # what is written can be read

    rows = [line.split("\t") for line in tarflow("log-prob", "x.npy", *options).out.splitlines()]
    assert [(row[0], len(row)) for row in rows] == [(name, 2) for name in names]
    np.testing.assert_allclose([float(row[1]) for row in rows], log_prob, atol=1e-3)
    report = json.loads(tarflow("log-prob", "x.npy", *options, "-o", "s.npz", "--json").out)
    assert [sorted(row) for row in report["images"]] == [["file", "label", "log_prob"]] * 3
    assert list(arrays("s.npz")) == ["log_prob"]

    rows = [line.split("\t") for line in tarflow("classify", "x.npy", "--bundle", token_bundle).out.splitlines()]
    assert [row[1] for row in rows] == [("ant", "bee", "cat")[index] for index in best]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("log-prob", "a.png"), "a.png: the model's data are tokens, not pictures"),
        (("encode", "c.npy", "-o", "z.npy"), "shape [3, 1, 8, 8], expected [B, 5, 3]"),
        (("denoise", "x.npy", "-o", "x.png"), "-o x.png: the data are tokens"),
        (("denoise", "x.npy", "-o", "x/"), "-o x/: the data are tokens"),
    ],
)
def test_there_are_no_pictures_of_tokens(
    refused: Callable, token_bundle: Path, files: list[str], arguments: tuple[str, ...], message: str
) -> None:
    np.save("x.npy", np.zeros((1, 5, 3), np.float32))
    assert message in refused(*arguments, "--bundle", token_bundle).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("log-prob", "none.png"), "none.png: no such file"),
        (("log-prob", "."), "is a folder"),
        (("log-prob", "wide.png"), "wide.png: 8x4 pixels, the model has 8x8"),
        (("log-prob", "a.png", "--labels", "dog"), "no class 'dog'"),
        (("log-prob", "a.png", "--labels", "ant,bee"), "2 labels for 1 image"),
        (("log-prob", "a.png", "--batch-size", 0), "--batch-size must be at least 1"),
        (("log-prob", "a.png", "-o", "scores.txt"), "cannot tell what to write"),
        (("log-prob", "a.png", "--engine", "trt"), "trt"),
        (("encode", "a.png", "-o", "no/z.npy"), "the folder no does not exist"),
        (("encode", "a.png", "-o", "c.npy"), "exists already"),
        (("denoise", "a.png", "-o", "x.npy", "--sigma", 0), "--sigma must be a positive number"),
        (("denoise", "a.png", "-o", "x.npy", "--strength", "inf"), "--strength must be a finite number"),
        (("denoise", "a.png", "-o", "x.npy", "--strength", -1), "not negative, got -1"),
        (("denoise", "a.png", "-o", "./"), "holds a.png already"),
        (("classify", "a.png", "-o", "p.png"), "cannot tell what to write"),
    ],
)
def test_bad_input(
    refused: Callable, class_bundle: Path, files: list[str], arguments: tuple[object, ...], message: str
) -> None:
    Image.new("L", (8, 4)).save("wide.png")
    assert message in refused(*arguments, "--bundle", class_bundle).err


def test_models_that_cannot(refused: Callable, colour_bundle: Path, deep_bundle: Path) -> None:
    np.save("deep.npy", np.zeros((1, 2, 8, 8), np.float32))
    Image.new("RGB", (8, 8)).save("colour.png")
    assert "classes" in refused("classify", "colour.png", "--bundle", colour_bundle).err
    assert "sigma" in refused("denoise", "deep.npy", "--bundle", deep_bundle, "-o", "x.npy").err
    assert "PNG files have" in refused("denoise", "deep.npy", "--bundle", deep_bundle, "-o", "x.png").err
