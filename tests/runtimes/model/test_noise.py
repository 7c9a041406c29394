"""The seeded noise: known answers, an independent implementation of docs/NOISE.md, and its distribution."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tarflow_runtimes import InputError
from tarflow_runtimes.model.noise import philox, standard_normal

SPECIFICATION = Path(__file__).parents[3] / "docs" / "NOISE.md"


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(np.array([c], np.uint64) for c in counter), key)
    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def specified_constants() -> dict[str, list[float]]:
    """The table of section 3 of the specification."""
    rows = re.findall(r"^\| `([A-Z_0-9]+)`[^|]*\| (.+) \|$", SPECIFICATION.read_text(), flags=re.MULTILINE)
    return {name: [float.fromhex(value) for value in re.findall(r"`(-?0x[^`]+)`", values)] for name, values in rows}


def specified_noise(seed: int, image: int, values: int) -> list[np.float32]:
    """The specification in scalar Python, whose floats are binary64 and never fused."""
    constants = specified_constants()
    mask = 0xFFFFFFFF

    def horner(name: str, x: float) -> float:
        result = constants[name][0]
        for c in constants[name][1:]:
            result = result * x
            result = result + c
        return result

    def pair(radius_word: int, angle_word: int) -> tuple[float, float]:
        f, e = math.frexp(float(2 * radius_word + 1))
        if f < constants["SQRT_HALF"][0]:
            f, e = f * 2, e - 1
        s = (f - 1) / (f + 1)
        ln_u = (e - 33) * constants["LN_2"][0] + (s * 2) * horner("LOG", s * s)
        r = math.sqrt(ln_u * -2)
        a = (((angle_word % 2**30) + 0.5) * 2**-30 - 0.5) * constants["HALF_PI"][0]
        sine, cosine = a * horner("SIN", a * a), horner("COS", a * a)
        x, y = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)][angle_word // 2**30]
        return r * x, r * y

    noise: list[np.float32] = []
    for j in range((values + 3) // 4):
        c, k = [j, 0, image & mask, image >> 32], [seed & mask, seed >> 32]
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(q >> 32) ^ c[1] ^ k[0], q & mask, (p >> 32) ^ c[3] ^ k[1], p & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        noise += [np.float32(value) for value in (*pair(c[0], c[1]), *pair(c[2], c[3]))]
    return noise[:values]


@pytest.mark.parametrize(("seed", "image"), [(0, 0), (1, 2), (2**64 - 1, 2**64 - 1), (0x0123456789ABCDEF, 2**32 + 5)])
def test_the_bits_are_those_of_the_specification(seed, image):
    ours = standard_normal(seed, image, 1, 7, 29)
    theirs = np.array(specified_noise(seed, image, 7 * 29), np.float32).reshape(1, 7, 29)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_golden_bits():
    first = standard_normal(0, 0, 1, 2, 8).view(np.uint32).ravel()[:8]
    assert (
        " ".join(f"{v:08x}" for v in first) == "3d40884e bfad6601 bf47101a 3dc4488f 3c9d7ce0 3e722d8b 3f3a4cf0 bee5a3b4"
    )
    second = standard_normal(0x0123456789ABCDEF, 2**32 + 5, 1, 3, 3).view(np.uint32).ravel()
    assert (
        " ".join(f"{v:08x}" for v in second)
        == "3ea2377b bf100ab7 3de7df53 bf327093 400209bb 3fa8f1ec 3eaffd42 bc466731 3ed456ea"
    )
    noise = standard_normal(7, 0, 4, 49, 16).astype("<f4").tobytes()
    digest = "450ea589e823a3e25e5aeddf0aaccacc5d11476f06ac8cde3ebd9ffb547633df"
    assert hashlib.sha256(noise).hexdigest() == digest
    text = SPECIFICATION.read_text()
    assert digest in text
    for bits in (first, second):
        assert " ".join(f"{v:08x}" for v in bits) in text


def test_an_image_does_not_depend_on_its_batch():
    whole = standard_normal(5, 0, 9, 6, 5)
    assert whole.dtype == np.float32
    for start, stop in ((0, 1), (3, 5), (2, 9)):
        np.testing.assert_array_equal(standard_normal(5, start, stop - start, 6, 5), whole[start:stop])


def test_a_batch_larger_than_one_pass_is_the_same(monkeypatch):
    whole = standard_normal(5, 0, 9, 6, 5)
    monkeypatch.setattr("tarflow_runtimes.model.noise.VALUES_PER_PASS", 61)
    np.testing.assert_array_equal(standard_normal(5, 0, 9, 6, 5), whole)


def test_seeds_and_images_differ_in_every_half():
    base = standard_normal(0, 0, 1, 4, 4)
    for seed, image in ((1, 0), (2**32, 0), (0, 1), (0, 2**32)):
        assert not np.any(standard_normal(seed, image, 1, 4, 4) == base)


def cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def test_the_distribution_is_the_standard_normal():
    z = standard_normal(11, 0, 100, 50, 40).astype(np.float64).ravel()
    n = z.size
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov on the cells of a fine grid; 1.95 / sqrt(n) is the 0.1 % quantile.
    edges = np.linspace(-5, 5, 2001)
    empirical = np.searchsorted(np.sort(z), edges, side="right") / n
    assert np.abs(empirical - cdf(edges)).max() < 1.95 / math.sqrt(n)
    for bound, expected in ((3.0, 2.6998e-3), (4.0, 6.334e-5)):
        count = int((np.abs(z) > bound).sum())
        assert abs(count - expected * n) < 5 * math.sqrt(expected * n)


def test_neighbouring_values_are_uncorrelated():
    z = standard_normal(12, 0, 200, 40, 25).astype(np.float64).reshape(200, -1)
    n = z.size
    for lag in (1, 2, 3, 4):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 5 / math.sqrt(n)
        assert abs((z[:, lag:] ** 2 * z[:, :-lag] ** 2).mean() - 1) < 5 * math.sqrt(8 / n)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize(("seed", "first_index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64 - 1)])
def test_out_of_range_is_an_error(seed, first_index):
    with pytest.raises(InputError):
        standard_normal(seed, first_index, 2, 2, 2)


def test_the_last_image_index_works():
    assert np.isfinite(standard_normal(2**64 - 1, 2**64 - 1, 1, 2, 2)).all()
