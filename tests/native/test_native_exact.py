"""The native inverse against float64 and against ONNX Runtime, on every kind of model and in every precision."""

from __future__ import annotations

import numpy as np
import pytest

NAMES = [
    "class", "n16", "n64", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "heads_of_16",
    "heads_of_8", "heads_of_5", "heads_of_80", "width_96", "tokens", "two_tokens", "odd_tokens",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "guided"])
@pytest.mark.parametrize("name", NAMES)
def test_close_to_float64_and_to_onnx_runtime(models, name, kind):
    model = models(name)
    noise, conditions = model.noise(7), model.conditions(7, kind)
    found = model.native(noise, conditions)
    np.testing.assert_allclose(found, model.exact(noise, conditions), rtol=0, atol=2e-5)
    if model.config.head_dim % 8 == 0:  # what ONNX Runtime's attention takes
        np.testing.assert_allclose(found, model.ort(noise, conditions), rtol=0, atol=4e-5)


@pytest.mark.parametrize("kind", ["plain", "guided"])
@pytest.mark.parametrize("name", ["class", "heads_of_8", "heads_of_5", "heads_of_80", "no_nvp", "odd_tokens"])
def test_bfloat16_weights_with_float32_activations(models, name, kind):
    model = models(name, "bfloat16")
    for batch in (1, 2, 9):
        noise, conditions = model.noise(batch), model.conditions(batch, kind)
        exact = model.exact(noise, conditions)
        np.testing.assert_allclose(model.native(noise, conditions), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["plain", "guided"])
@pytest.mark.parametrize("name", ["class", "heads_of_8", "heads_of_5", "heads_of_80", "no_nvp", "odd_tokens", "digits"])
def test_int8_weights_with_int8_activations(models, name, kind):
    model = models(name, "int8")
    noise, conditions = model.noise(9), model.conditions(9, kind)
    exact, native = model.exact(noise, conditions), model.native(noise, conditions)

    def error(found):
        return np.sqrt(np.mean((found - exact) ** 2))

    assert 0 < error(native) < 0.05
    if model.config.head_dim % 8 == 0:  # what ONNX Runtime's attention takes; it rounds activations the same way
        assert error(native) < 1.2 * error(model.ort(noise, conditions))


@pytest.mark.parametrize("kind", ["plain", "guided"])
def test_digits_are_at_least_as_exact_as_with_onnx_runtime(models, kind):
    model = models("digits")
    noise, conditions = model.noise(16), model.conditions(16, kind)
    exact, ort, native = model.exact(noise, conditions), model.ort(noise, conditions), model.native(noise, conditions)

    def error(found):  # the geometric mean over images: some amplify what is rounded a hundred times
        return np.exp(np.log(np.mean((found - exact) ** 2, axis=(1, 2))).mean() / 2)

    assert error(native) <= error(ort)
    assert np.abs(native - exact).max() < 2e-3  # guidance up to 2 amplifies; ONNX Runtime is as far


def test_digits_of_bfloat16_weights(models):
    model = models("digits", "bfloat16")
    noise, conditions = model.noise(4), model.conditions(4, "plain")
    np.testing.assert_allclose(model.native(noise, conditions), model.exact(noise, conditions), rtol=0, atol=5e-4)


def test_an_unguided_image_of_a_guided_batch_is_the_one_drawn_alone(models):
    model = models("digits")
    noise, conditions = model.noise(6), model.conditions(6, "guided")
    unguided = np.flatnonzero(~conditions.guidance.any(axis=(1, 2)))
    assert len(unguided)
    alone = model.native(noise[unguided], conditions.of(unguided, branches=1))
    assert np.array_equal(model.native(noise, conditions)[unguided], alone)


def test_fewer_steps_leave_the_noise(models):
    model = models("n16")
    noise, conditions = model.noise(3), model.conditions(3, "plain")
    block = model.blocks[0]
    whole = model.library.invert(block, noise, labels=conditions.labels)
    part = model.library.invert(block, noise, labels=conditions.labels, steps=5)
    assert np.array_equal(part[:, :6], whole[:, :6])
    assert np.array_equal(part[:, 6:], noise[:, 6:])


def test_the_result_may_take_the_place_of_the_noise(models):
    model = models("n16")
    noise, conditions = model.noise(3), model.conditions(3, "plain")
    expected = model.library.invert(model.blocks[0], noise, labels=conditions.labels)
    assert model.library.invert(model.blocks[0], noise, labels=conditions.labels, out=noise) is noise
    assert np.array_equal(noise, expected)


def test_an_overflowing_exponential_is_infinite_and_underflow_is_zero(models):
    model = models("two_tokens")
    noise, conditions = np.zeros((3, 2, 1), np.float32), model.conditions(3, "plain")
    noise[:, 0] = [[3e38], [-3e38], [np.nan]]  # the norms bound what follows: finite but for the NaN
    found = model.native(noise, conditions)
    assert np.isfinite(found[:2, 0]).all()
    assert np.isnan(found[2]).any()
