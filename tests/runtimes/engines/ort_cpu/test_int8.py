"""int8 bundles: how far their images are from float32 ones, and what they report."""

from __future__ import annotations

import numpy as np
import pytest

import tarflow_runtimes as tfr

GUIDANCE = {"plain": 0.0, "guided": 1.0, "tempered": tfr.Guidance(weight=1.0, attention_temperature=0.5)}


CASES = [
    (name, kind)
    for name in ("class_n16", "unconditional", "no_nvp")
    for kind in GUIDANCE
    if (name, kind) != ("unconditional", "guided")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_images_are_close_to_those_of_float32_and_others(flows, name, kind):
    whole, rounded = flows(name), flows(name, "int8")
    labels = [0, 1, None] if whole.config.classes else None
    options = {"labels": labels, "seed": 1, "guidance": GUIDANCE[kind], "denoise": False}
    found, expected = rounded.sample(3, **options).images, whole.sample(3, **options).images
    difference = np.abs(found - expected)
    assert difference.max() > 1e-4
    assert np.sqrt(np.mean(difference**2)) < 0.02 * expected.std()


def test_windows_take_the_int8_weights_too(flows):
    # not within the tolerance of the windows: rounded activations jump where real ones move a little
    rounded, whole = flows("class_n16", "int8"), flows("class_n16")
    options = {"labels": [0, 1], "seed": 0, "denoise": False}
    one_by_one = rounded.sample(2, **options).images
    windows = rounded.sample(2, **options, plan=tfr.Parallel(window=5, tolerance=1e-6)).images
    expected = whole.sample(2, **options).images
    assert np.abs(windows - one_by_one).mean() < 0.2 * np.abs(expected - one_by_one).mean()


def test_the_density_is_that_of_the_rounded_weights(exported, flows):
    source, rounded = exported("class"), flows("class", "int8")
    images, labels = source.images(3), [0, 1, None]
    difference = rounded.log_prob(images, labels) - flows("class").log_prob(images, labels)
    assert 1e-3 < np.abs(difference).max() < 1.0
    z, _ = rounded.encode(images, labels)
    np.testing.assert_allclose(rounded.decode(z, labels), images, rtol=0, atol=0.1)
    moved = rounded.denoise(images, labels) - images
    expected = flows("class").denoise(images, labels) - images
    assert np.linalg.norm(moved - expected) < 0.02 * np.linalg.norm(expected)


def test_the_report_and_the_sample_name_the_precision(flows):
    for precision in ("float32", "float16", "int8"):
        flow = flows("class", precision)
        assert flow.engine_report["weights"] == flow.bundle.precision == precision
        assert flow.sample(1, seed=0, denoise=False).metadata["precision"] == precision


def test_the_plan_of_one_precision_is_not_that_of_another(flows):
    assert flows("class").identity() != flows("class", "int8").identity()
