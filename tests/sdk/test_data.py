"""Training sets: what is read, what is refused, and what augmentation does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_sdk import DataError
from tarflow_sdk._data import AUGMENTATIONS, Augmentation, Images, load_images, load_indices

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)


def write_npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "data.npz", **arrays)
    return str(path / "data.npz")


def write_picture(path: Path, width: int = 8, height: int = 8, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8), mode).save(path)


def test_npz(tmp_path: Path) -> None:
    grey = load_images(write_npz(tmp_path, images=PIXELS))
    assert grey.pixels.shape == (6, 1, 8, 8)
    assert grey.labels is None
    rgb = np.stack([PIXELS, PIXELS, PIXELS // 2], axis=-1)
    labelled = load_images(write_npz(tmp_path, images=rgb, labels=np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)))
    assert torch.equal(labelled.pixels[4, 2], torch.from_numpy(PIXELS[4] // 2))
    assert labelled.names == ("0", "1", "2")
    assert labelled.labels is not None
    assert labelled.labels.dtype == torch.int64
    named = load_images(write_npz(tmp_path, images=PIXELS, labels=np.zeros(6, int), names=np.array(["cat", "dog"])))
    assert named.names == ("cat", "dog")


def test_model_range() -> None:
    images = Images(pixels=torch.tensor([0, 255, 51, 204], dtype=torch.uint8).reshape(1, 1, 2, 2))
    torch.testing.assert_close(images.model_range(torch.tensor([0])).flatten(), torch.tensor([-1.0, 1.0, -0.6, 0.6]))


def test_folder_of_images(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp"):
        write_picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_images(str(tmp_path), image_size=4)
    assert images.pixels.shape == (3, 3, 4, 4)
    assert images.labels is None
    assert load_images(str(tmp_path), image_size=4, image_channels=1).pixels.shape == (3, 1, 4, 4)


def test_folder_of_classes(tmp_path: Path) -> None:
    write_picture(tmp_path / "dog" / "x.png", mode="RGBA")
    write_picture(tmp_path / "cat" / "deep" / "y.png", mode="L")
    write_picture(tmp_path / "cat" / "z.png")
    (tmp_path / ".hidden").mkdir()
    images = load_images(str(tmp_path), image_size=8)
    assert images.names == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]


def test_pictures_are_cut_to_the_central_square(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (load_images(str(tmp_path), image_size=8).pixels == 200).all()


def test_mnist5k() -> None:
    images = load_images("mnist5k")
    assert images.pixels.shape == (5000, 1, 28, 28)
    assert images.names == tuple("0123456789")
    assert images.labels is not None
    assert torch.equal(images.labels.bincount(), torch.full((10,), 500))


BAD_NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"x": PIXELS}, "no array `images`, found x"),
    "floats": ({"images": PIXELS / 255}, r"must be uint8 .* got float64 \[6, 8, 8\]"),
    "rank": ({"images": PIXELS[0]}, "must be uint8"),
    "not square": ({"images": PIXELS[:, :4]}, "must be square, got 4 x 8"),
    "empty": ({"images": PIXELS[:0]}, "empty"),
    "objects": ({"images": np.array([{}], dtype=object)}, "cannot read"),
    "labels of another length": ({"images": PIXELS, "labels": np.zeros(5, int)}, "5 labels for 6 images"),
    "labels as floats": ({"images": PIXELS, "labels": np.zeros(6)}, "labels must be integers"),
    "negative labels": ({"images": PIXELS, "labels": np.full(6, -1)}, r"labels must be in 0\.\."),
    "too few names": ({"images": PIXELS, "labels": np.full(6, 2), "names": np.array(["a"])}, r"in 0\.\.0"),
    "names as numbers": ({"images": PIXELS, "labels": np.zeros(6, int), "names": np.arange(2)}, "names must be text"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_bad_npz(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_images(write_npz(tmp_path, **arrays))


def test_damaged_npz(tmp_path: Path) -> None:
    whole = Path(write_npz(tmp_path, images=PIXELS)).read_bytes()
    for data in (whole[: len(whole) // 2], b"hello", b""):
        (tmp_path / "data.npz").write_bytes(data)
        with pytest.raises(DataError, match="cannot read"):
            load_images(str(tmp_path / "data.npz"))
    np.save(tmp_path / "data.npy", PIXELS)
    with pytest.raises(DataError, match="trains on images, not on arrays"):
        load_images(str(tmp_path / "data.npy"))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_images(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="needs --image-size"):
        load_images(str(tmp_path))
    with pytest.raises(DataError, match="no image files"):
        load_images(str(tmp_path), image_size=8)
    with pytest.raises(DataError, match="at least 1"):
        load_images(str(tmp_path), image_size=0)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="cat: no image files"):
        load_images(str(tmp_path), image_size=8)
    write_picture(tmp_path / "loose.png")
    with pytest.raises(DataError, match="beside folders"):
        load_images(str(tmp_path), image_size=8)
    with pytest.raises(DataError, match="1 or 3 channels, not 2"):
        load_images(str(tmp_path), image_size=8, image_channels=2)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.9])
def test_damaged_picture(part: float, tmp_path: Path) -> None:
    write_picture(tmp_path / "x.png", 32, 32)
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(DataError, match=r"x\.png: cannot read an image"):
        load_images(str(tmp_path), image_size=8)


def test_flags_that_contradict_the_data(tmp_path: Path) -> None:
    source = write_npz(tmp_path, images=PIXELS)
    with pytest.raises(DataError, match="8 pixels wide, --image-size says 16"):
        load_images(source, image_size=16)
    with pytest.raises(DataError, match="1 channels, --image-channels says 3"):
        load_images(source, image_channels=3)


@pytest.mark.parametrize("text", ["", "1\n1\n", "7\n", "-1\n", "one\n"])
def test_bad_holdout_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "holdout.txt").write_text(text)
    with pytest.raises(DataError, match="image numbers"):
        load_indices(tmp_path / "holdout.txt", 7)
    with pytest.raises(DataError, match="cannot read"):
        load_indices(tmp_path / "absent.txt", 7)


def test_digest_knows_pixels_and_labels() -> None:
    pixels = torch.from_numpy(PIXELS)[:, None]
    labels = torch.arange(6) % 2
    images = Images(pixels=pixels, labels=labels, names=("a", "b"))
    assert images.digest == images.take(torch.arange(6)).digest
    others = [
        Images(pixels=pixels),
        Images(pixels=pixels, labels=1 - labels, names=("a", "b")),
        Images(pixels=pixels.flip(0), labels=labels, names=("a", "b")),
    ]
    assert images.digest not in {other.digest for other in others}


# -- augmentation ------------------------------------------------------------------------------------------------


def smooth_images(count: int) -> torch.Tensor:
    """A bright blob a little left of the centre of a dark field."""
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    blob = torch.exp(-((y - 14) ** 2 + (x - 11) ** 2) / 18) * 2 - 1
    return blob.expand(count, 1, 28, 28)


def test_no_augmentation_is_the_identity() -> None:
    images = smooth_images(3)
    assert torch.equal(AUGMENTATIONS["none"](images, torch.Generator().manual_seed(0)), images)


def test_flip_mirrors_about_half() -> None:
    images = smooth_images(200)
    flipped = AUGMENTATIONS["flip"](images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    kept = (flipped == images).flatten(1).all(dim=1)
    assert (mirrored ^ kept).all()
    assert 70 < int(mirrored.sum()) < 130


def test_digits_are_deformed_a_little() -> None:
    images = smooth_images(50)
    deformed = AUGMENTATIONS["digits"](images, torch.Generator().manual_seed(0))
    assert deformed.shape == images.shape
    assert deformed.min() >= -1
    assert deformed.max() <= 1
    moved = (deformed - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
    assert (moved > 1e-3).all()
    assert moved.mean() < 0.25
    assert torch.equal(deformed, AUGMENTATIONS["digits"](images, torch.Generator().manual_seed(0)))


def test_a_shift_moves_by_pixels() -> None:
    """The standard deviation of the blob's centre is the `shift` that was asked for."""
    images = smooth_images(500)
    shifted = Augmentation(shift=1.5)(images, torch.Generator().manual_seed(0))
    weight = shifted[:, 0] + 1
    centre = (weight * torch.arange(28.0)).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))
    assert 1.3 < float(centre.std()) < 1.7
    assert abs(float(centre.mean()) - 11.0) < 0.3
