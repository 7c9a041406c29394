"""Cut the ten colour photographs that scikit-image and scikit-learn ship into a training set of 32x32 crops.

    pip install scikit-image scikit-learn
    python crops.py                           # writes photos.npz, holdout.txt

Each photograph is a class. Crops are squares of random side (48 pixels up to half the short side of the photograph) at
random places, reduced to 32x32. Held-out crops come from the same photographs, so they measure the fit, not
generalisation to other photographs.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

PHOTOGRAPHS = {
    "astronaut": "skimage/astronaut.png",
    "cat": "skimage/chelsea.png",
    "coffee": "skimage/coffee.png",
    "galaxies": "skimage/hubble_deep_field.jpg",
    "motorcycle": "skimage/motorcycle_left.png",
    "pagoda": "sklearn/china.jpg",
    "flower": "sklearn/flower.jpg",
    "retina": "skimage/retina.jpg",
    "rocket": "skimage/rocket.jpg",
    "tissue": "skimage/ihc.png",
}
FOLDERS = {
    "skimage": Path(skimage.data.__file__).parent,
    "sklearn": Path(sklearn.datasets.__file__).parent / "images",
}
SIZE = 32


def crop(photograph: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """One random square of a photograph as uint8 [32, 32, 3]."""
    side = int(rng.integers(48, min(photograph.size) // 2, endpoint=True))
    left = int(rng.integers(0, photograph.width - side, endpoint=True))
    top = int(rng.integers(0, photograph.height - side, endpoint=True))
    return np.asarray(photograph.resize((SIZE, SIZE), Image.Resampling.BOX, (left, top, left + side, top + side)))


def main() -> None:
    """Write `photos.npz` and the numbers of the held-out crops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=840, help="crops of every photograph")
    parser.add_argument("--held-out", type=int, default=40, help="the last of which are held out")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    images, labels, held_out = [], [], []
    for label, name in enumerate(PHOTOGRAPHS.values()):
        package, file = name.split("/")
        with Image.open(FOLDERS[package] / file) as opened:
            photograph = opened.convert("RGB")
        held_out += range(len(images) + arguments.crops - arguments.held_out, len(images) + arguments.crops)
        images += [crop(photograph, rng) for _ in range(arguments.crops)]
        labels += [label] * arguments.crops
    np.savez_compressed("photos.npz", images=np.stack(images), labels=np.array(labels), names=np.array([*PHOTOGRAPHS]))
    Path("holdout.txt").write_text("".join(f"{number}\n" for number in held_out))
    print(f"photos.npz: {len(images)} crops of {len(PHOTOGRAPHS)} photographs; holdout.txt: {len(held_out)} of them")


if __name__ == "__main__":
    main()
