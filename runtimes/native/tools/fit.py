"""The coefficients of core/functions.hpp: minimax fits in float64, printed as float32.

    exp(r)          ~ 1 + r + r^2 p(r)            |r| <= ln(2) / 2,  p of degree 4
    erf(x / sqrt 2) ~ x p(x^2) / q(x^2)           |x| <= LIMIT,      p of degree 6, q of degree 4, q(0) = 1

Lawson's iteration: least squares whose weights grow where the error is large converge to the minimax fit. The rational
fit is linearised with the denominator of the previous round (Sanathanan and Koerner 1963).

    python runtimes/native/tools/fit.py
"""

import math

import numpy as np

LIMIT = 5.56
"""erf(LIMIT / sqrt 2) is 1 in float32."""


def fit_exp() -> np.ndarray:
    """Coefficients of p, the constant first; the relative error is what is bounded."""
    half = math.log(2) / 2
    r = half * np.cos(np.linspace(0, math.pi, 4001))
    r = r[np.abs(r) > 1e-6]
    powers = r[:, None] ** np.arange(2, 7)
    target = np.expm1(r) - r
    weights = np.ones_like(r)
    for _ in range(300):
        scale = np.sqrt(weights) / np.exp(r)
        p, *_ = np.linalg.lstsq(powers * scale[:, None], target * scale, rcond=None)
        error = np.abs(powers @ p - target) / np.exp(r)
        weights *= error / error.max() + 1e-3
        weights /= weights.mean()
    print(f"exp: largest relative error {error.max():.2e}")
    return p


def fit_erf() -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of p and q, the constants first; the relative error is what is bounded."""
    x = LIMIT * (1 - np.cos(np.linspace(0, math.pi, 6001))[1:]) / 2
    t = (x / LIMIT) ** 2  # scaled, for the condition of the matrix
    target = np.array([math.erf(value / math.sqrt(2)) for value in x])
    top, bottom = t[:, None] ** np.arange(7), t[:, None] ** np.arange(1, 5)
    weights, denominator = np.ones_like(x), np.ones_like(x)
    for _ in range(400):
        scale = np.sqrt(weights) / (denominator * target)
        matrix = np.concatenate([top * x[:, None], -bottom * target[:, None]], axis=1)
        found, *_ = np.linalg.lstsq(matrix * scale[:, None], target * scale, rcond=None)
        p, q = found[:7], np.concatenate([[1.0], found[7:]])
        denominator = np.concatenate([np.ones((len(x), 1)), bottom], axis=1) @ q
        error = np.abs(x * (top @ p) / denominator / target - 1)
        weights *= (error / error.max()) ** 0.5 + 1e-3
        weights /= weights.mean()
    print(f"erf: largest relative error {error.max():.2e}")
    scale = LIMIT ** (-2.0 * np.arange(7))
    return p * scale, q * scale[:5]


if __name__ == "__main__":
    for name, values in zip(("exp p", "erf p", "erf q"), (fit_exp(), *fit_erf()), strict=True):
        print(name, ", ".join(f"{np.float32(value)!s}F" for value in values))
