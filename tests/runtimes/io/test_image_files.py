"""The pictures that are written and the image files that are read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarflow_runtimes import InputError
from tarflow_runtimes.io.pictures import grid, to_uint8
from tarflow_runtimes.io.read import read_images
from tarflow_runtimes.io.write import Output, check_output, write_arrays

GREY, COLOUR, TOKENS = (1, 8, 8), (3, 8, 8), (5, 3)


def test_levels_of_a_picture_come_back(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "all.png")
    images = read_images([tmp_path / "all.png"], (1, 16, 16))
    assert images.values.dtype == np.float32
    assert images.values.shape == (1, 1, 16, 16)
    assert (images.values.min(), images.values.max()) == (-1.0, 1.0)
    assert (to_uint8(images.values)[0, ..., 0] == levels).all()


def test_channels_come_first(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "colour.png")
    Image.fromarray(levels).quantize(64).save(tmp_path / "palette.png")
    images = read_images([tmp_path / "colour.png", tmp_path / "palette.png"], COLOUR)
    assert (to_uint8(images.values)[0] == levels).all()
    assert images.name(1) == str(tmp_path / "palette.png")


def test_grid() -> None:
    levels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(2, 1).repeat(3, 2)
    sheet = grid(levels)
    assert sheet.shape == (2 * 2 + 2, 3 * 3 + 2 * 2, 1)
    assert (sheet[0, 5], sheet[4, 0], sheet[4, 10], sheet[0, 3]) == (1, 3, 255, 255)
    assert grid(levels[:1]).shape == (2, 3, 1)
    assert grid(levels, columns=5).shape == (2, 5 * 3 + 4 * 2, 1)


def test_images_without_a_caption_font_problem() -> None:
    levels = np.zeros((2, 8, 8, 3), np.uint8)
    sheet = grid(levels, columns=1, captions=["wildebeest", ""])
    assert sheet.shape == (14 + 8 + 2 + 14 + 8, 8, 3)
    assert (sheet[:14] < 255).any()  # letters
    assert (sheet[24:38] == 255).all()  # an empty caption


def test_array_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("old")
    output = Output(name="-o x.npz", path=path, kind=".npz", overwrite=True)

    class Broken:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_arrays(output, np.zeros(3), key="images", arrays={"broken": Broken()})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert write_arrays(output, np.zeros(3), key="images", arrays={"seed": 1}) == [path]
    assert sorted(np.load(path).files) == ["images", "seed"]


def test_checking_an_output_creates_nothing(tmp_path: Path) -> None:
    output = check_output(f"{tmp_path}/new/", kinds=("folder",), overwrite=False)
    assert (output.kind, output.path) == ("folder", tmp_path / "new")
    assert check_output(f"{tmp_path}/UPPER.PNG", kinds=(".png",), overwrite=False).kind == ".png"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_output(str(tmp_path / "x.npy"), kinds=(".npy",), overwrite=True)


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("small.png", Image.new("L", (4, 8)), "4x8 pixels, the model has 8x8"),
        ("colour.png", Image.new("RGB", (8, 8)), "3 channels, the model has 1"),
        ("alpha.png", Image.new("LA", (8, 8)), "mode LA"),
        ("deep.png", Image.new("I;16", (8, 8)), "mode I;16"),
        ("text.png", None, "not an image"),
        ("text.npy", None, "not a NumPy file"),
        ("shape.npy", np.zeros((2, 8, 8), np.float32), r"shape \[2, 8, 8\], expected \[B, 1, 8, 8\]"),
        ("empty.npy", np.zeros((0, 1, 8, 8), np.float32), r"shape \[0, 1, 8, 8\]"),
        ("bytes.npy", np.zeros((2, 1, 8, 8), np.uint8), "dtype uint8, expected float32"),
        ("inf.npy", np.full((2, 1, 8, 8), np.inf, np.float32), "128 values are not finite"),
        ("other.npz", {"pictures": np.zeros(3)}, "no array named 'images'"),
    ],
)
def test_wrong_images(tmp_path: Path, name: str, image: object, message: str) -> None:
    path = tmp_path / name
    if isinstance(image, Image.Image):
        image.save(path)
    elif isinstance(image, np.ndarray):
        np.save(path, image)
    elif isinstance(image, dict):
        np.savez(path, **image)
    else:
        path.write_text("nothing of the kind")
    with pytest.raises(InputError, match=message) as caught:
        read_images([path], GREY)
    assert caught.value.hint


def test_tokens_are_arrays(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((2, 5, 3), dtype=np.float32)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", images=values)
    read = read_images([tmp_path / "a.npy", tmp_path / "b.npz"], TOKENS)
    assert (read.values == np.concatenate([values, values])).all()
    assert read.name(3) == f"{tmp_path / 'b.npz'}[1]"
    Image.new("L", (8, 8)).save(tmp_path / "c.png")
    np.save(tmp_path / "d.npy", values[:, :4])
    np.save(tmp_path / "e.npy", np.float32(1))
    for name, message in (
        ("c.png", "tokens, not pictures"),
        ("d.npy", r"shape \[2, 4, 3\], expected \[B, 5, 3\]"),
        ("e.npy", r"shape \[\], expected \[B, 5, 3\]"),
        ("none.png", "no such file"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read_images([tmp_path / name], TOKENS)
        assert caught.value.hint in ("give .npy or .npz files, float32 [B, 5, 3]", "tokens are [B, N, D]")


def test_missing_files_and_models_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_images([tmp_path / "none.png"], GREY)
    with pytest.raises(InputError, match="is a folder"):
        read_images([tmp_path], GREY)
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    with pytest.raises(InputError, match="the model has 2"):
        read_images([tmp_path / "grey.png"], (2, 8, 8))
