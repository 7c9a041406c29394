"""One set of bits: whatever the batch, the place in it, the threads, the kernel, the processor."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

CASES = [
    (name, precision, kind)
    for name, precision in (
        ("digits", "float32"), ("n64", "float32"), ("odd_tokens", "float32"), ("heads_of_5", "float32"),
        ("no_nvp", "float32"), ("class", "bfloat16"), ("odd_tokens", "bfloat16"), ("class", "int8"),
        ("heads_of_5", "int8"),
    )
    for kind in ("plain", "guided")
]  # fmt: skip


@pytest.mark.parametrize(("name", "precision", "kind"), CASES)
def test_batch_threads_and_kernel_do_not_matter(models, name, precision, kind):
    model = models(name, precision)
    noise, conditions = model.noise(64), model.conditions(64, kind)
    expected = model.native(noise, conditions)
    assert np.isfinite(expected).all()
    for batch in (1, 5):
        for first in (0, 17, 59):
            images = slice(first, first + batch)
            assert np.array_equal(model.native(noise[images], conditions.of(images)), expected[images])
    for threads in (2, 3, 100):
        assert np.array_equal(model.native(noise, conditions, threads=threads), expected)
    for few in (slice(0, 1), slice(3, 5)):  # rows too few to share out: the threads share columns
        for threads in (2, 4):
            assert np.array_equal(model.native(noise[few], conditions.of(few), threads=threads), expected[few]), threads
    for kernel in model.library.kernels:
        few = slice(0, 2 if (name, kernel) == ("digits", "portable") else 11)  # portable takes seconds
        assert np.array_equal(model.native(noise[few], conditions.of(few), kernel=kernel), expected[few]), kernel


@pytest.mark.parametrize("rows", range(1, 20))
def test_every_height_of_a_tile(models, rows):
    for precision in ("float32", "bfloat16", "int8"):
        model = models("heads_of_80", precision)
        noise, conditions = model.noise(20), model.conditions(20, "plain")
        expected = np.concatenate([model.native(noise[i : i + 1], conditions.of(slice(i, i + 1))) for i in range(rows)])
        for kernel in model.library.kernels:
            found = model.native(noise[:rows], conditions.of(slice(0, rows)), kernel=kernel)
            assert np.array_equal(found, expected), (precision, kernel)


def test_the_bits_of_random_models_are_these(models):
    """Committed, so that another machine or compiler that differs is found; the models' weights come from seeds."""
    made = hashlib.sha256()
    for name in ("n16", "no_nvp", "odd_tokens"):
        model = models(name)
        for kind in ("plain", "guided"):
            made.update(model.native(model.noise(16), model.conditions(16, kind)).tobytes())
    assert made.hexdigest() == DIGEST


DIGEST = "b0da48bbf672d43986ff7e9e8ac66fe047ccfcbc16c56a2966dfc0fcd36731a6"
