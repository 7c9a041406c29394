"""`Sample`: 8-bit values, and files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tarflow_runtimes as tfr
from rooms import CPU_ENGINE
from tarflow_runtimes import Sample


def sample(n: int = 5, channels: int = 1, **fields: object) -> Sample:
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (n, channels, 6, 6)).astype(np.float32)
    return Sample(images=images, seed=7, metadata={"digest": "d" * 64, "engine": "ort-cpu", "seed": "7"}, **fields)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_uint8_rounds_to_the_nearest_even_and_clips():
    values = np.array([-5.0, -1.0, 0.0, 0.5 / 127.5, 1.0, 1.5], np.float32).reshape(1, 1, 1, 6)
    levels = Sample(images=values, seed=None).uint8()
    assert levels.dtype == np.uint8
    assert levels.shape == (1, 1, 6, 1)
    assert levels.ravel().tolist() == [0, 0, 128, 128, 255, 255]


def test_uint8_is_channel_last():
    made = sample(2, 3)
    expected = np.rint(127.5 * np.clip(made.images.astype(np.float64), -1, 1) + 127.5).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(made.uint8(), expected)


def test_uint8_refuses_what_is_not_finite(tmp_path):
    images = np.zeros((3, 1, 2, 2), np.float32)
    images[1, 0, 0, 0] = np.nan
    broken = Sample(images=images, seed=0)
    with pytest.raises(tfr.InputError, match="1 of 3 images"):
        broken.uint8()
    for name in ("grid.png", "folder"):
        with pytest.raises(tfr.InputError, match="not finite"):
            broken.save(tmp_path / name)
    assert listed(tmp_path) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_with_its_facts(tmp_path, channels):
    made = sample(5, channels)
    assert made.save(tmp_path / "grid.png") == [tmp_path / "grid.png"]
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 6 + 2 * 2, 2 * 6 + 2)
        assert picture.mode == {1: "L", 3: "RGB"}[channels]
        assert picture.text == {"tarflow:digest": "d" * 64, "tarflow:engine": "ort-cpu", "tarflow:seed": "7"}
        pixels = np.asarray(picture).reshape(14, 22, channels)
    np.testing.assert_array_equal(pixels[:6, 8:14], made.uint8()[1])
    np.testing.assert_array_equal(pixels[8:, :6], made.uint8()[3])
    assert (pixels[6:8] == 255).all()
    assert listed(tmp_path) == ["grid.png"]


def test_a_folder_of_pictures(tmp_path):
    made = sample(3, first_index=41)
    names = ["000041.png", "000042.png", "000043.png"]
    assert made.save(f"{tmp_path}/folder/") == [tmp_path / "folder" / name for name in names]
    assert listed(tmp_path / "folder") == names
    with Image.open(tmp_path / "folder" / names[2]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), made.uint8()[2, :, :, 0])
        assert picture.text["tarflow:seed"] == "7"
    assert listed(tmp_path) == ["folder"]


def test_arrays(tmp_path):
    made = sample(3, 5)
    made.save(tmp_path / "images.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), made.images)
    made.save(tmp_path / "images.npz")
    with np.load(tmp_path / "images.npz") as archive:
        assert sorted(archive.files) == ["images", "seed"]
        np.testing.assert_array_equal(archive["images"], made.images)
        assert archive["seed"] == 7


def test_a_large_seed_is_kept(tmp_path):
    Sample(images=sample().images, seed=2**64 - 1).save(tmp_path / "images.npz")
    with np.load(tmp_path / "images.npz", allow_pickle=False) as archive:
        assert int(archive["seed"]) == 2**64 - 1


def test_a_file_is_replaced(tmp_path):
    (tmp_path / "images.npy").write_bytes(b"old")
    sample().save(tmp_path / "images.npy")
    assert np.load(tmp_path / "images.npy").shape == (5, 1, 6, 6)


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample().save("grid.png")
    assert listed(tmp_path) == ["grid.png"]


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("grid.jpg", 1, "cannot tell"),
        ("missing/grid.png", 1, "does not exist"),
        ("grid.png", 2, "1 or 3 channels"),
        ("folder", 4, "1 or 3 channels"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, channels, message):
    with pytest.raises(tfr.InputError, match=message):
        sample(2, channels).save(tmp_path / name)
    assert listed(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the super-user may write anywhere")
def test_an_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(tfr.InputError, match="cannot write"):
        sample().save(tmp_path / "grid.png")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "images.npy").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(tfr.InputError, match="No space left"):
        sample().save(tmp_path / "images.npy")
    assert (tmp_path / "images.npy").read_bytes() == b"old"
    assert listed(tmp_path) == ["images.npy"]


def test_a_failed_folder_leaves_nothing_new(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(tfr.InputError, match=f"{tmp_path}/folder: .*No space left"):
        sample().save(tmp_path / "folder")
    assert listed(tmp_path) == []


@pytest.mark.parametrize("name", ["grid.png", "folder"])
def test_tokens_are_no_pictures(tmp_path, name):
    tokens = Sample(images=np.zeros((2, 5, 3), np.float32), seed=0)
    with pytest.raises(tfr.InputError, match=f"{tmp_path / name}.*tokens"):
        tokens.save(tmp_path / name)
    assert tokens.save(tmp_path / "tokens.npy") == [tmp_path / "tokens.npy"]
    assert listed(tmp_path) == ["tokens.npy"]


def test_a_flow_says_how_its_images_were_made(flows):
    flow = flows("class")
    made = flow.sample(2, labels=[0, 1], seed=3, guidance=1.5, first_index=4, denoise=False)
    assert made.metadata == {
        "digest": flow.bundle.digest,
        "engine": CPU_ENGINE,
        "precision": "float32",
        "seed": "3",
        "first_index": "4",
        "guidance": "1.5",
        "guide": "ab",
        "attention_temperature": "1.0",
        "anneal_guidance": "false",
        "denoise": "false",
        "decode": "sequential",
    }
    assert made.first_index == 4
