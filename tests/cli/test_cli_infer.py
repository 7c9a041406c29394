"""`tarflow infer`: what it draws, writes and reports, and what it refuses before any work."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tarflow_runtimes as tfr
from rooms import CPU_ENGINE
from tarflow_runtimes.cli.infer import grid_columns
from tarflow_runtimes.cli.progress import StepClock

SHAPE = (4, 16)
"""N, D of the class bundle."""


def picture(path: str | Path) -> Image.Image:
    """An image file, read and closed."""
    with Image.open(path) as image:
        image.load()
    return image


def arrays(path: str) -> dict[str, np.ndarray]:
    """An .npz file, read and closed."""
    with np.load(path) as file:
        return dict(file)


def test_a_grid(tarflow: Callable, class_bundle: Path) -> None:
    result = tarflow(
        "infer", class_bundle, "--labels", "all", "-n", 7, "--seed", 3, "--guidance", 1.5, "-o", "grid.png"
    )
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith(f"wrote grid.png: 7 images, seed 3, {CPU_ENGINE}, ")
    grid = picture("grid.png")
    with tfr.load(class_bundle) as flow:
        assert grid.size == (3 * 8 + 2 * 2, 3 * 8 + 2 * 2)  # a row of the grid is one round of the labels
        expected = flow.sample(7, labels=[0, 1, 2, 0, 1, 2, 0], seed=3, guidance=1.5).uint8()
        pixels = np.asarray(grid)
        for index, image in enumerate(expected):
            top, left = index // 3 * 10, index % 3 * 10
            assert (pixels[top : top + 8, left : left + 8] == image[..., 0]).all()
        assert grid.text["tarflow:digest"] == flow.bundle.digest
        assert grid.text["tarflow:engine"] == CPU_ENGINE
        assert grid.text["tarflow:seed"] == "3"
        assert grid.text["tarflow:guidance"] == "1.5"


@pytest.mark.parametrize(
    ("count", "period", "columns"),
    [
        (100, 10, 10),
        (80, 10, 10),
        (90, 3, 9),
        (7, 3, 3),
        (3, 3, None),
        (9, 1, None),
        (1200, 1000, None),
        (20, 10, 10),
    ],
)
def test_labels_that_repeat_stand_below_each_other(count: int, period: int, columns: int | None) -> None:
    assert grid_columns(count, period=period) == columns


def test_captions(tarflow: Callable, class_bundle: Path) -> None:
    assert tarflow("infer", class_bundle, "--labels", "all", "-n", 6, "--captions", "-o", "grid.png").code == 0
    assert picture("grid.png").size == (28, 14 + 8 + 2 + 8)  # the same captions in every row stand once
    assert tarflow("infer", class_bundle, "--labels", "ant,bee,cat", "--captions", "-o", "few.png").code == 0
    assert picture("few.png").size == (18, 14 + 8 + 2 + 14 + 8)


def test_a_folder_numbers_images_as_the_seed_does(tarflow: Callable, class_bundle: Path) -> None:
    assert tarflow("infer", class_bundle, "-n", 4, "--seed", 5, "-o", "whole/").code == 0
    assert tarflow("infer", class_bundle, "-n", 2, "--seed", 5, "--first-index", 2, "-o", "part/").code == 0
    assert sorted(path.name for path in Path("whole").iterdir()) == [f"00000{index}.png" for index in range(4)]
    assert sorted(path.name for path in Path("part").iterdir()) == ["000002.png", "000003.png"]
    for path in Path("part").iterdir():
        same = picture(path), picture(Path("whole") / path.name)
        levels = [np.asarray(image, np.int64) for image in same]
        assert np.abs(levels[0] - levels[1]).max() <= 1
    assert tarflow("infer", class_bundle, "-n", 1, "--seed", 6, "--first-index", 9, "-o", "part").code == 0
    assert len(list(Path("part").iterdir())) == 3


LISTS = ("all", "cat,bee", "bee,null,cat,ant,ant,bee,null,cat,bee")


@pytest.mark.parametrize("labels", LISTS)
def test_a_job_cut_into_parts_draws_what_the_whole_draws(tarflow: Callable, class_bundle: Path, labels: str) -> None:
    """7 images whole, and as 3 and 4; the list of labels may be longer than a part, or than the whole."""
    drawn = []
    for name, first, count in (("whole", 0, 7), ("left", 0, 3), ("right", 3, 4)):
        options = ("-n", count, "--first-index", first, "--labels", labels, "--seed", 5, "--guidance", 1.5)
        result = tarflow("infer", class_bundle, *options, "-o", f"{name}.npz", "--json")
        assert result.code == 0, result.err
        saved = arrays(f"{name}.npz")
        drawn.append((json.loads(result.out)["labels"], saved["labels"].tolist(), saved["images"]))
        cut = f"{count} of the {labels.count(',') + 1} labels are drawn: those of images {first} to {first + count - 1}"
        assert (cut in result.err) == (labels.count(",") >= count)
    (words, numbers, images), left, right = drawn
    assert words == left[0] + right[0]
    assert numbers == left[1] + right[1]
    np.testing.assert_allclose(np.concatenate([left[2], right[2]]), images, atol=1e-5)


def test_tokens(tarflow: Callable, token_bundle: Path) -> None:
    result = tarflow("infer", token_bundle, "--labels", "all", "--seed", 3, "--save-latents", "u.npy", "--json")
    assert result.code == 0, result.err
    assert result.err.startswith(f"wrote samples.npy: 3 samples, seed 3, {CPU_ENGINE}, ")
    assert json.loads(result.out)["files"] == ["samples.npy"]
    with tfr.load(token_bundle) as flow:
        expected = flow.sample(3, labels=[0, 1, 2], seed=3).images
    assert expected.shape == (3, 5, 3)
    np.testing.assert_allclose(np.load("samples.npy"), expected, atol=1e-5)
    options = ("--labels", "all", "--noise", "u.npy", "-o", "again.npz")
    assert tarflow("infer", token_bundle, *options).code == 0
    np.testing.assert_allclose(arrays("again.npz")["images"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message", "mended"),
    [
        (("-o", "x.png"), "-o x.png: the data are tokens", ".npy or .npz"),
        (("-o", "x/"), "-o x/: the data are tokens", ".npy or .npz"),
        (("--captions",), "--captions are written into a grid only", "remove --captions"),
    ],
)
def test_there_are_no_pictures_of_tokens(
    refused: Callable, token_bundle: Path, arguments: tuple[str, ...], message: str, mended: str
) -> None:
    result = refused("infer", token_bundle, "-n", 1, *arguments)
    assert message in result.err
    assert result.err.rstrip().endswith(mended)


def test_arrays_and_json(tarflow: Callable, class_bundle: Path) -> None:
    options = ("--labels", "cat,null", "--seed", 1, "--batch-size", 1, "--no-denoise")
    result = tarflow("infer", class_bundle, *options, "-o", "images.npz", "--save-latents", "u.npy", "--json")
    report = json.loads(result.out)
    with tfr.load(class_bundle) as flow:
        sample = flow.sample(2, labels=[2, None], seed=1, denoise=False)
        same = flow.sample(2, labels=[2, None], noise=np.load("u.npy"), denoise=False)
        assert report["digest"] == flow.bundle.digest
    saved = arrays("images.npz")
    assert np.abs(saved["images"] - sample.images).max() < 1e-5
    assert saved["labels"].tolist() == [2, -1]
    assert saved["seed"] == 1
    assert (same.images == sample.images).all()
    assert (report["engine"], report["precision"]) == (CPU_ENGINE, "float32")
    assert (report["seed"], report["labels"]) == (1, ["cat", "null"])
    assert (report["files"], report["latents"]) == (["images.npz"], "u.npy")
    assert report["steps"] > 0
    assert 0.0 < report["seconds"]["per_step"] < report["seconds"]["sample"]
    again = tarflow(
        "infer", class_bundle, "--labels", "cat,null", "--noise", "u.npy", "--no-denoise", "-o", "images.npy"
    )
    assert again.err.startswith("wrote images.npy: 2 images, noise of u.npy")
    assert np.abs(np.load("images.npy") - sample.images).max() < 1e-5


def test_a_drawn_seed_is_reported_and_draws_the_same_again(tarflow: Callable, class_bundle: Path) -> None:
    report = json.loads(tarflow("infer", class_bundle, "-n", 2, "-o", "a.npy", "--json").out)
    other = json.loads(tarflow("infer", class_bundle, "-n", 2, "-o", "b.npy", "--json").out)
    assert report["seed"] != other["seed"]
    assert tarflow("infer", class_bundle, "-n", 2, "-o", "c.npy", "--seed", report["seed"]).code == 0
    assert (np.load("a.npy") == np.load("c.npy")).all()


def test_how_many(tarflow: Callable, class_bundle: Path, colour_bundle: Path) -> None:
    def count(*arguments: object) -> int:
        report = json.loads(tarflow("infer", *arguments, "-o", "x.npy", "--overwrite", "--json").out)
        assert len(np.load("x.npy")) == report["count"]
        return int(report["count"])

    assert count(class_bundle, "--labels", "all") == 3
    assert count(class_bundle, "--labels", "2") == 1
    assert count(class_bundle, "--labels", "2", "-n", 5) == 5
    assert count(colour_bundle) == 16
    np.save("noise.npy", np.zeros((2, *SHAPE), np.float32))
    assert count(class_bundle, "--noise", "noise.npy") == 2


def test_colour_pictures_and_overwrite(tarflow: Callable, colour_bundle: Path) -> None:
    assert tarflow("infer", colour_bundle, "-n", 1).code == 0
    first = Path("samples.png").read_bytes()
    assert picture("samples.png").mode == "RGB"
    assert tarflow("infer", colour_bundle, "-n", 1, "--overwrite").code == 0
    assert Path("samples.png").read_bytes() != first
    assert tarflow("infer", colour_bundle, "-n", 2, "-o", "f/").code == 0
    assert tarflow("infer", colour_bundle, "-n", 2, "-o", "f/", "--overwrite").code == 0
    assert [path.name for path in sorted(Path("f").iterdir())] == ["000000.png", "000001.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", 0), "-n must be at least 1, got 0"),
        (("-n", -3), "-n must be at least 1"),
        (("--noise", "good.npy", "--labels", "all"), "3 labels for 2 images"),
        (("--labels", "dog"), "no class 'dog'"),
        (("--labels", "3"), "no class '3'"),
        (("--first-index", -1), "--first-index must be in 0 .. 2^64 - 1"),
        (("--first-index", 2**64), "--first-index must be in"),
        (("--batch-size", 0), "--batch-size must be at least 1"),
        (("--guidance", -0.5), "not negative, got -0.5"),
        (("--guidance", "nan"), "--guidance must be a finite number"),
        (("--guide", "c"), "--guide must be one of a, b, ab, got 'c'"),
        (("--attention-temperature", 0), "--attention-temperature must be a positive number"),
        (("--seed", -1), "--seed must be in"),
        (("--seed", 2**64), "--seed must be in"),
        (("--seed", 0, "--noise", "good.npy"), "--seed and --noise contradict each other"),
        (("--first-index", 1, "--noise", "good.npy"), "--first-index numbers"),
        (("--noise", "good.npy", "-n", 3), "shape [2, 4, 16], expected [3, 4, 16]"),
        (("--noise", "shape.npy"), "shape [2, 16, 4], expected [2, 4, 16]"),
        (("--noise", "flat.npy"), "shape [16], expected [16, 4, 16]"),
        (("--noise", "number.npy"), "shape [], expected [1, 4, 16]"),
        (("--noise", "none.npy"), "shape [0, 4, 16] holds no noise"),
        (("--noise", "double.npy"), "dtype float64, expected float32"),
        (("--noise", "nan.npy"), "1 values are not finite"),
        (("--noise", "pickle.npy"), "not a NumPy file"),
        (("--noise", "cut.npy"), "not a NumPy file"),
        (("--noise", "missing.npy"), "no such file"),
        (("-o", "no/grid.png"), "the folder no does not exist"),
        (("-o", "no/folder/"), "the folder no does not exist"),
        (("-o", "grid.jpg"), "cannot tell what to write"),
        (("-o", "grid"), "cannot tell what to write"),
        (("-o", "here.png"), "exists already"),
        (("-o", "good.npy/grid.png"), "the folder good.npy does not exist"),
        (("-o", "good.npy/"), "is not a folder"),
        (("-o", "full/", "-n", 1), "holds 000000.png already"),
        (("-o", "/proc/grid.png"), "-o /proc/grid.png: "),
        (("-o", ""), "-o : cannot tell what to write"),
        (("--save-latents", "u.npz"), "--save-latents u.npz: cannot tell"),
        (("--save-latents", "no/u.npy"), "--save-latents no/u.npy: the folder no does not exist"),
        (("--save-latents", "good.npy"), "--save-latents good.npy: exists already"),
        (("-o", "x.npy", "--save-latents", "x.npy"), "both name x.npy"),
        (("-o", "x.npy", "--captions"), "--captions are written into a grid only"),
        (("--guidance", 1.5), "guidance"),
        (("--tf32",), "tf32 needs an engine on a GPU"),
        (("--engine", "trt"), "trt"),
        (("--engine", "ort-cuda"), "ort-cuda"),
        (("--engine", "no-such"), "no-such"),
    ],
)
def test_bad_input(refused: Callable, class_bundle: Path, arguments: tuple[object, ...], message: str) -> None:
    good = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    broken = good.copy()
    broken[1, 2, 3] = np.nan
    np.save("good.npy", good)
    np.save("shape.npy", good.transpose(0, 2, 1))
    np.save("flat.npy", np.zeros(16, np.float32))
    np.save("number.npy", np.float32(1))
    np.save("none.npy", good[:0])
    np.save("double.npy", good.astype(np.float64))
    np.save("nan.npy", broken)
    np.save("pickle.npy", np.array([{}], object), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("good.npy").read_bytes()[:-4])
    Path("here.png").touch()
    Path("full").mkdir()
    Path("full/000000.png").touch()
    assert message in refused("infer", class_bundle, *arguments).err


def test_engines_that_are_not_there_say_how_to_install_them(refused: Callable, class_bundle: Path) -> None:
    assert "pip install" in refused("infer", class_bundle, "--engine", "trt").err


def test_other_models(refused: Callable, colour_bundle: Path, deep_bundle: Path) -> None:
    assert "the model has no classes" in refused("infer", colour_bundle, "--labels", "0").err
    assert "PNG files have 1 or 3 channels, the images have 2" in refused("infer", deep_bundle, "--no-denoise").err
    assert "--no-denoise" in refused("infer", deep_bundle, "-o", "x.npy").err


def test_the_default_batch_size_is_in_the_help(tarflow: Callable) -> None:
    for verb in ("infer", "log-prob"):
        assert re.search(
            r"--batch-size COUNT +Images that run together\. +\[default: 64\]", tarflow(verb, "--help").out
        )


def test_a_missing_bundle(refused: Callable) -> None:
    assert "no such directory" in refused("infer", "missing.tarflow").err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_sampling_leaves_nothing(
    tarflow: Callable, class_bundle: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    seen: list[int] = []

    def on_step(self: StepClock, progress: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            signal.raise_signal(number)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(StepClock, "on_step", on_step)
    try:
        result = tarflow(
            "infer", class_bundle, "--engine", "ort-cpu", "-n", 4, "-o", "folder/", "--save-latents", "u.npy"
        )
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert (result.code, result.out, result.err) == (130, "", "interrupted; nothing was written\n")
    assert list(Path.cwd().iterdir()) == []
    assert len(seen) == 3
    assert signal.getsignal(signal.SIGTERM) == before[1]


def test_ctrl_c_ends_the_process_with_130(class_bundle: Path, tmp_path: Path) -> None:
    code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from tarflow_runtimes.cli import infer
from tarflow_runtimes.cli.progress import StepClock
StepClock.on_step = lambda *_: (print("sampling", flush=True), time.sleep(60))
sys.argv = ["tarflow-infer", {str(class_bundle)!r}, "-o", "x.png"]
infer.main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sampling\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tarflow: Callable, class_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[object] = []

    def full(self: Image.Image, path: object, **_: object) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        Path(str(path)).touch()

    monkeypatch.setattr(Image.Image, "save", full)
    result = tarflow("infer", class_bundle, "-n", 3, "-o", "folder/")
    assert (result.code, result.err) == (1, "error: No space left on device\n")
    assert list(Path.cwd().iterdir()) == []
