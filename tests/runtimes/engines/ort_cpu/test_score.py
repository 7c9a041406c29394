"""The gradient on the run-ready halves of each block, against the portable graphs; and what memory it may take."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes.engines.ort_cpu.cpus import usable_cpus
from tarflow_runtimes.engines.ort_cpu.engine import Limits, OrtCpuEngine

MODELS = ["class", "class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "tokens"]


@contextlib.contextmanager
def engine_of(flow: Any, activations: int) -> Iterator[OrtCpuEngine]:
    """An engine of its own that may keep so many bytes; 1 is not enough for one image, so that it repeats all."""
    with contextlib.closing(OrtCpuEngine(flow.bundle, Limits(activations=activations))) as engine:
        yield engine


def score(flow: tfr.Flow, images: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """The gradient of log q."""
    return flow.denoise(images, labels, sigma=1.0) - images


def numbers(exported: Any, name: str, images: int) -> np.ndarray | None:
    classes = exported(name).config.classes
    return np.arange(images) % classes if classes else None


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_the_score_is_that_of_the_portable_graphs(exported, flows, name, images):
    flow, x, labels = flows(name), exported(name).images(images), numbers(exported, name, images)
    with engine_of(flow, activations=1) as portable:
        whole = score(tfr.Flow(flow.bundle, portable), x, labels)
    np.testing.assert_allclose(score(flow, x, labels), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(whole).max() > 0.1


@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 5e-3), ("int8", 1e-5)])
def test_the_score_of_rounded_bundles(exported, flows, precision, tolerance):
    """Both ways compute the same products; in float16 they round them at different places."""
    flow, x, labels = flows("class", precision), exported("class").images(3), numbers(exported, "class", 3)
    with engine_of(flow, activations=1) as portable:
        whole = score(tfr.Flow(flow.bundle, portable), x, labels)
    assert np.linalg.norm(score(flow, x, labels) - whole) < tolerance * np.linalg.norm(whole)


@pytest.mark.parametrize("activations", [1, 1 << 30])
def test_the_cotangent_is_asked_for_at_z(exported, flows, activations):
    flow, x, labels = flows("class_n16"), exported("class_n16").latents(5), numbers(exported, "class_n16", 5)
    expected = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)
    asked: dict[int, np.ndarray] = {}

    def cotangent(z: np.ndarray, images: slice) -> np.ndarray:
        asked.update(zip(range(*images.indices(len(x))), z, strict=True))
        return expected[images]

    with engine_of(flow, activations) as engine:
        z, gradient = engine.vjp([1], x, labels, cotangent)
        np.testing.assert_allclose(z, engine.forward(1, x, labels)[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal([asked[image] for image in range(len(x))], z)
        _, last = engine.vjp([1], x[4:], labels[4:], lambda _, __: expected[4:])
    np.testing.assert_allclose(last, gradient[4:], rtol=1e-5, atol=1e-5)


def test_a_batch_is_cut_to_what_may_be_kept(exported, flows):
    """Of all pieces that run side by side."""
    flow, x, labels = flows("class_n16"), exported("class_n16").latents(7), numbers(exported, "class_n16", 7)
    config, cpus = flow.config, usable_cpus()
    layer_bytes = 4 * config.patches * (config.heads * config.patches + 9 * config.width)
    image_bytes = cpus * config.blocks * config.layers * layer_bytes
    sizes: list[int] = []

    def cotangent(z: np.ndarray, _: slice) -> np.ndarray:
        sizes.append(len(z))
        return -z

    _, expected = flow.engine.vjp(range(config.blocks), x, labels, cotangent)
    assert (sum(sizes), max(sizes)) == (7, math.ceil(7 / cpus))
    for most in (1, 2):
        sizes.clear()
        with engine_of(flow, activations=most * image_bytes + 1) as engine:
            _, gradient = engine.vjp(range(config.blocks), x, labels, cotangent)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
        assert (sum(sizes), max(sizes)) == (7, min(most, math.ceil(7 / cpus)))
