"""Guidance by itself: weights, annealing, the null branch, the temperature; and what each does to a picture."""

from __future__ import annotations

import numpy as np
import pytest

import tarflow_runtimes as tfr


def test_annealed_weights_end_at_the_weight():
    """g_i = w (i + 1) / (N - 1) at the step that yields patch i + 1: the last of N - 1 steps has w itself."""
    weights = tfr.Guidance(weight=3.0, anneal=True).weights(4)
    np.testing.assert_allclose(weights[:, :3], [[1.0, 2.0, 3.0]] * 2)
    np.testing.assert_array_equal(tfr.Guidance(weight=3.0).weights(4), np.full((2, 4), 3.0))


@pytest.mark.parametrize(("guide", "expected"), [("a", [2.0, 0.0]), ("b", [0.0, 2.0]), ("ab", [2.0, 2.0])])
def test_guide_chooses_scales_and_shifts(guide, expected):
    np.testing.assert_array_equal(tfr.Guidance(weight=2.0, guide=guide).weights(5)[:, 0], expected)


def test_guidance_is_a_value():
    assert tfr.Guidance(weight=2) == tfr.Guidance(weight=2.0)
    assert hash(tfr.Guidance(weight=2)) == hash(tfr.Guidance(weight=2.0))
    with pytest.raises(AttributeError):
        tfr.Guidance().weight = 1.0


def drawn(flow: tfr.Flow, labels: list[int | None], guidance: float | tfr.Guidance) -> np.ndarray:
    return flow.sample(len(labels), labels=labels, seed=0, guidance=guidance, denoise=False).images


def test_guidance_moves_away_from_the_null_class(flows):
    """x(w) - x(0) points from the null class's picture to the class's, first of all in the second patch."""
    flow = flows("class")
    plain, null, guided = (drawn(flow, *case) for case in (([0], 0.0), ([None], 0.0), ([0], 0.5)))
    second = (slice(None), slice(None), slice(0, 4), slice(4, 8))  # block 0 ends with the order of the image
    assert np.vdot(guided[second] - plain[second], plain[second] - null[second]) > 0


def test_the_null_class_has_nothing_to_be_guided_from(flows):
    flow = flows("class")
    mixed = drawn(flow, [0, None], 2.0)
    np.testing.assert_allclose(mixed[1], drawn(flow, [None, None], 0.0)[1], rtol=0, atol=1e-6)
    assert np.abs(mixed[0] - drawn(flow, [0, None], 0.0)[0]).max() > 1e-3


def test_the_temperature_is_that_of_the_second_branch(flows):
    """Without guidance it does nothing; with it, even the null class is guided."""
    flow = flows("class")
    plain = drawn(flow, [0, None], 0.0)
    np.testing.assert_array_equal(drawn(flow, [0, None], tfr.Guidance(attention_temperature=0.5)), plain)
    tempered = drawn(flow, [0, None], tfr.Guidance(weight=2.0, attention_temperature=0.5))
    assert np.abs(tempered[1] - plain[1]).max() > 1e-4
    assert np.abs(tempered[0] - drawn(flow, [0, None], 2.0)[0]).max() > 1e-4


def test_annealing_is_a_guidance_of_its_own(flows):
    flow = flows("class")
    annealed = drawn(flow, [0], tfr.Guidance(weight=2.0, anneal=True))
    assert np.abs(annealed - drawn(flow, [0], 2.0)).max() > 1e-3
