"""The gradient on the run-ready halves of each block, against the portable graphs; and what memory it may take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tarflow_runtimes.engines.ort_cpu.engine import Limits, OrtCpuEngine

# What is compared is how an engine keeps or repeats the forward pass, which the front door does not tell apart.
from tarflow_runtimes.model.density import patchify, score

MODELS = ["class", "class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "tokens"]


@contextlib.contextmanager
def engine_of(flow: Any, activations: int) -> Iterator[OrtCpuEngine]:
    """An engine of its own that may keep so many bytes; 1 is not enough for one image, so that it repeats all."""
    with contextlib.closing(OrtCpuEngine(flow.bundle, Limits(activations=activations))) as engine:
        yield engine


def patches_and_labels(exported: Any, name: str, images: int) -> tuple[np.ndarray, np.ndarray | None]:
    model = exported(name)
    labels = np.arange(images) % (model.config.classes + 1) if model.config.classes else None
    return patchify(model.images(images), model.config), labels


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_the_score_is_that_of_the_portable_graphs(exported, flows, name, images):
    flow = flows(name)
    x, labels = patches_and_labels(exported, name, images)
    with engine_of(flow, activations=1) as portable:
        whole = score(portable, flow.bundle, x, labels)
    np.testing.assert_allclose(score(flow.engine, flow.bundle, x, labels), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(whole).max() > 0.1


@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 5e-3), ("int8", 1e-5)])
def test_the_score_of_rounded_bundles(exported, flows, precision, tolerance):
    """Both ways compute the same products; in float16 they round them at different places."""
    flow = flows("class", precision)
    x, labels = patches_and_labels(exported, "class", 3)
    with engine_of(flow, activations=1) as portable:
        whole = score(portable, flow.bundle, x, labels)
    difference = score(flow.engine, flow.bundle, x, labels) - whole
    assert np.linalg.norm(difference) < tolerance * np.linalg.norm(whole)


@pytest.mark.parametrize("activations", [1, 1 << 30])
def test_the_cotangent_is_asked_for_at_z(exported, flows, activations):
    flow = flows("class_n16")
    x, labels = patches_and_labels(exported, "class_n16", 5)
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
    flow, config = flows("class_n16"), flows("class_n16").config
    x, labels = patches_and_labels(exported, "class_n16", 7)
    expected = score(flow.engine, flow.bundle, x, labels)
    sizes: list[int] = []

    def cotangent(z: np.ndarray, _: slice) -> np.ndarray:
        sizes.append(len(z))
        return -z

    with engine_of(flow, activations=1 << 30) as engine:
        engine.vjp(range(config.blocks), x, labels, cotangent)
        image_bytes = (1 << 30) // engine._vjp_images(config.blocks)  # of all that run side by side
    assert sum(sizes) == 7
    sizes.clear()
    with engine_of(flow, activations=2 * image_bytes + 1) as engine:
        _, gradient = engine.vjp(range(config.blocks), x, labels, cotangent)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    assert sum(sizes) == 7
    assert max(sizes) <= 2
