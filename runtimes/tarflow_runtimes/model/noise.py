"""`standard_normal`: the seeded noise, the same bits in every language, engine and batch.

Philox4x32-10, with the seed as key and the image index as counter, generates 32-bit words. Box-Muller in float64, with
the polynomials below, turns each pair of words into two normals. Only + - * / and sqrt of IEEE 754 are used, in the
order written here and never fused, so that the result is the same everywhere. The specification is docs/NOISE.md.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.errors import InputError

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)

HALF_PI: Final = float.fromhex("0x1.921fb54442d18p+0")
LN_2: Final = float.fromhex("0x1.62e42fefa39efp-1")
SQRT_HALF: Final = float.fromhex("0x1.6a09e667f3bcdp-1")

# Highest power first. Each is the float64 nearest to the Taylor coefficient; the truncation is below 1e-15.
LOG_SERIES: Final = tuple(1.0 / n for n in range(23, 0, -2))
"""atanh(s)/s in s^2: 1/23, 1/21, .., 1/3, 1."""
SIN_SERIES: Final = (
    -1.0 / 1307674368000,
    1.0 / 6227020800,
    -1.0 / 39916800,
    1.0 / 362880,
    -1.0 / 5040,
    1.0 / 120,
    -1.0 / 6,
    1.0,
)
"""sin(x)/x in x^2: -1/15!, 1/13!, .., -1/3!, 1."""
COS_SERIES: Final = (
    1.0 / 20922789888000,
    -1.0 / 87178291200,
    1.0 / 479001600,
    -1.0 / 3628800,
    1.0 / 40320,
    -1.0 / 720,
    1.0 / 24,
    -0.5,
    1.0,
)
"""cos(x) in x^2: 1/16!, -1/14!, .., -1/2!, 1."""

VALUES_PER_PASS: Final = 1 << 20
"""Values computed in one pass; limits the float64 scratch memory to some tens of megabytes."""

Words = npt.NDArray[np.uint64]
Doubles = npt.NDArray[np.float64]


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four 32-bit words for each counter, all held in uint64 arrays of one shape (broadcastable)."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = (product1 >> shift) ^ c1 ^ np.uint64(k0), product1 & mask
        c2, c3 = (product0 >> shift) ^ c3 ^ np.uint64(k1), product0 & mask
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def horner(coefficients: tuple[float, ...], x: Doubles) -> Doubles:
    """((c0 * x + c1) * x + c2) * x + .. with one rounding per operation."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += coefficient
    return value


def box_muller(radius_word: Words, angle_word: Words) -> tuple[Doubles, Doubles]:
    """Two independent standard normals from two words: r cos(t) and r sin(t).

    r = sqrt(-2 ln u), u = (2 w + 1) / 2^33; t is a quarter turn for each of the angle word's top two bits plus
    (f - 1/2) pi/2, f = (low 30 bits + 1/2) / 2^30.
    """
    fraction, exponent = np.frexp((radius_word * np.uint64(2) + np.uint64(1)).astype(np.float64))
    small = fraction < SQRT_HALF
    fraction = np.where(small, fraction * 2.0, fraction)  # [sqrt(1/2), sqrt(2))
    power = (exponent - small - 33).astype(np.float64)
    s = (fraction - 1.0) / (fraction + 1.0)
    log_u = power * LN_2 + (s * 2.0) * horner(LOG_SERIES, s * s)
    radius = np.sqrt(log_u * -2.0)

    quadrant = angle_word >> np.uint64(30)
    turn = ((angle_word & np.uint64(0x3FFFFFFF)).astype(np.float64) + 0.5) * 2.0**-30
    angle = (turn - 0.5) * HALF_PI
    square = angle * angle
    sine, cosine = angle * horner(SIN_SERIES, square), horner(COS_SERIES, square)
    odd, upper = (quadrant & np.uint64(1)) == 1, quadrant >= 2
    x, y = np.where(odd, -sine, cosine), np.where(odd, cosine, sine)
    return radius * np.where(upper, -x, x), radius * np.where(upper, -y, y)


def standard_normal(seed: int, first_index: int, n: int, patches: int, patch_values: int) -> npt.NDArray[np.float32]:
    """Standard normal noise for images first_index .. first_index + n - 1, float32 [n, N, D].

    Image i depends only on (seed, i), not on the batch.

    Raises:
        InputError: when seed or an image index is outside [0, 2^64).

    >>> bool((standard_normal(0, 3, 1, 4, 2) == standard_normal(0, 0, 8, 4, 2)[3:4]).all())
    True
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in [0, 2^64), got {seed}")
    if not (first_index >= 0 and n >= 0 and first_index + n <= 2**64):
        raise InputError(f"image indices {first_index} .. {first_index + n - 1} leave [0, 2^64)")
    values = patches * patch_values
    noise = np.empty((n, values), np.float32)
    chunk = max(1, VALUES_PER_PASS // values)
    for start in range(0, n, chunk):
        stop = min(n, start + chunk)
        noise[start:stop] = _images(seed, first_index + start, stop - start, values)
    return noise.reshape(n, patches, patch_values)


def _images(seed: int, first_index: int, n: int, values: int) -> npt.NDArray[np.float32]:
    """Noise [n, values] of the images from `first_index` on."""
    calls = np.arange((values + 3) // 4, dtype=np.uint64)[None, :]
    images = np.uint64(first_index) + np.arange(n, dtype=np.uint64)[:, None]
    zero = np.zeros((1, 1), np.uint64)
    words = philox(
        (calls, zero, images & np.uint64(0xFFFFFFFF), images >> np.uint64(32)), (seed & 0xFFFFFFFF, seed >> 32)
    )
    normals = np.empty((n, calls.size, 4), np.float32)
    for pair in (0, 2):
        first, second = box_muller(words[pair], words[pair + 1])
        normals[..., pair], normals[..., pair + 1] = first, second
    return normals.reshape(n, -1)[:, :values]
