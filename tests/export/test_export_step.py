"""The step graph walks PyTorch's inverse: guided or not, alone or as a window, whatever the caches held before."""

import itertools
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tarflow_sdk import Guidance, inverse_block

GUIDANCES = {
    "unguided": None,
    "a": Guidance(weight=1.5, guide="a"),
    "b": Guidance(weight=1.5, guide="b"),
    "ab": Guidance(weight=0.7, guide="ab"),
    "annealed": Guidance(weight=2.0, guide="ab", anneal=True),
    "temperature": Guidance(weight=1.0, guide="ab", attention_temperature=0.5),
    "everything": Guidance(weight=2.0, guide="a", anneal=True, attention_temperature=1.5),
}


class Walk:
    """One inverse of one block through its step graph, S patches at a time."""

    def __init__(self, tiny: Any, block: int, z: np.ndarray, fed: dict[str, Any], guidance: Guidance | None) -> None:
        self.config, self.order = tiny.config, tiny.order(block)
        self.session = tiny.session(block, "step")
        guidance = guidance or Guidance()
        branches = 2 if guidance.active else 1
        temperatures = np.array([1.0, 1.0 / guidance.attention_temperature], np.float32)[:branches]
        self.fixed = {
            "noise": z,
            "guidance": np.stack([guidance.weights(self.config.patches).float().numpy()] * len(z)),
            "inverse_temperature": np.repeat(temperatures[:, None], len(z), axis=1),
        }
        if fed:
            labels = fed["labels"]
            self.fixed["labels"] = np.stack([labels, np.full_like(labels, self.config.classes)])[:branches]
        self.caches = tiny.caches(branches * len(z), fill=5.0)  # what lies in a cache beforehand must not matter

    def step(self, patches: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Patches [B, S, D] at block positions position, position + 1, ... -> the S patches after each."""
        names = ["next", *(f"next_{name}" for name in self.caches)]
        arrays = {"patches": patches, "position": position, **self.fixed, **self.caches}
        following, *caches = self.session.run(names, arrays)
        self.caches = dict(zip(self.caches, caches, strict=True))
        return following

    def inverse(self) -> np.ndarray:
        z = self.fixed["noise"]
        x = np.zeros_like(z)
        x[:, self.order[0]] = z[:, self.order[0]]
        for i in range(self.config.patches - 1):
            following = self.step(x[:, self.order[i], None], np.full(len(z), i))
            x[:, self.order[i + 1]] = following[:, 0]
        return x


def expected_inverse(tiny: Any, block: int, z: np.ndarray, labels: Any, guidance: Guidance | None) -> np.ndarray:
    return inverse_block(tiny.model.flow_blocks[block], torch.from_numpy(z), labels, guidance).numpy()


@pytest.mark.parametrize("images", [1, 3, 17])
def test_single_steps_equal_the_inverse(tiny: Any, images: int) -> None:
    for k in range(tiny.config.blocks):
        labels, fed = tiny.labels(images)
        z = tiny.patches(images, seed=k).numpy()
        x = Walk(tiny, k, z, fed, None).inverse()
        np.testing.assert_allclose(x, expected_inverse(tiny, k, z, labels, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["class", "unconditional", "no_nvp", "five_channels"])
@pytest.mark.parametrize("how", GUIDANCES)
def test_guided_steps_equal_the_guided_inverse(exported: Any, name: str, how: str) -> None:
    tiny, guidance = exported(name), GUIDANCES[how]
    for k in range(tiny.config.blocks):
        labels, fed = tiny.labels(3)
        z = tiny.patches(3, seed=k).numpy()
        x = Walk(tiny, k, z, fed, guidance).inverse()
        np.testing.assert_allclose(x, expected_inverse(tiny, k, z, labels, guidance), rtol=0, atol=2e-5)


def test_guidance_matters_in_these_models(exported: Any) -> None:
    tiny = exported("class")
    _, fed = tiny.labels(2, "classes")
    z = tiny.patches(2).numpy()
    results = [Walk(tiny, 0, z, fed, guidance).inverse() for guidance in GUIDANCES.values()]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("how", ["unguided", "everything"])
def test_a_window_equals_its_steps(exported: Any, how: str) -> None:
    tiny, guidance = exported("class"), GUIDANCES[how]
    _, fed = tiny.labels(2)
    z = tiny.patches(2).numpy()
    x = Walk(tiny, 1, z, fed, guidance).inverse()[:, tiny.order(1)]
    last = tiny.config.patches - 1
    for cuts in ([0, last], [0, 1, 4, 9, last], [0, 7, 8, last]):
        walk = Walk(tiny, 1, z, fed, guidance)
        windows = [walk.step(x[:, i:j], np.full(2, i)) for i, j in itertools.pairwise(cuts)]
        np.testing.assert_allclose(np.concatenate(windows, axis=1), x[:, 1:], rtol=0, atol=1e-5)


def test_finished_patches_are_a_fixed_point(tiny: Any) -> None:
    for k, block in enumerate(tiny.model.flow_blocks):
        labels, fed = tiny.labels(3)
        x = tiny.patches(3, seed=k)
        with torch.no_grad():
            z, _ = block(x, labels)
        in_order = x.numpy()[:, tiny.order(k)]
        following = Walk(tiny, k, z.numpy(), fed, None).step(in_order[:, :-1], np.zeros(3, np.int64))
        np.testing.assert_allclose(following, in_order[:, 1:], rtol=0, atol=1e-5)


def test_images_may_stand_at_different_positions(exported: Any) -> None:
    for name in ("class", "unconditional"):
        tiny, guidance = exported(name), GUIDANCES["everything"]
        for k in range(tiny.config.blocks):
            _, fed = tiny.labels(3)
            z = tiny.patches(3).numpy()
            x = Walk(tiny, k, z, fed, guidance).inverse()[:, tiny.order(k)]
            walk = Walk(tiny, k, z, fed, guidance)
            starts = np.array([0, 2, 5])
            # All caches filled to position 5 (later entries are written again), then each image from its own place.
            walk.step(x[:, :6], np.zeros(3, np.int64))
            window = np.stack([x[b, start : start + 3] for b, start in enumerate(starts)])
            following = walk.step(window, starts)
            expected = np.stack([x[b, start + 1 : start + 4] for b, start in enumerate(starts)])
            np.testing.assert_allclose(following, expected, rtol=0, atol=1e-5)


def test_images_may_have_their_own_guidance(exported: Any) -> None:
    tiny = exported("class")
    _, fed = tiny.labels(3)
    z = tiny.patches(3).numpy()
    how = [GUIDANCES["ab"], GUIDANCES["everything"], GUIDANCES["b"]]
    walks = [Walk(tiny, 0, z, fed, guidance) for guidance in how]
    mixed = Walk(tiny, 0, z, fed, how[0])
    for name, axis in (("guidance", 0), ("inverse_temperature", 1)):
        mixed.fixed[name] = np.stack([walk.fixed[name].take(b, axis) for b, walk in enumerate(walks)], axis)
    x = mixed.inverse()
    for b, walk in enumerate(walks):
        np.testing.assert_allclose(x[b], walk.inverse()[b], rtol=0, atol=1e-6)


def test_stale_caches_do_not_leak(exported: Any) -> None:
    tiny = exported("class")
    _, fed = tiny.labels(2)
    z = tiny.patches(2).numpy()
    results = []
    for fill in (0.0, 1e4):
        walk = Walk(tiny, 0, z, fed, GUIDANCES["ab"])
        walk.caches = tiny.caches(4, fill=fill)
        results.append(walk.inverse())
    np.testing.assert_array_equal(*results)


def test_a_step_depends_on_its_position(exported: Any) -> None:
    tiny = exported("class")
    _, fed = tiny.labels(1)
    z = tiny.patches(1).numpy()
    first, second = (
        Walk(tiny, 0, np.ones_like(z), fed, None).step(z[:, :1], np.array([position])) for position in (0, 1)
    )
    assert np.abs(first - second).max() > 1e-3


def test_a_batch_equals_its_images(exported: Any) -> None:
    tiny = exported("class")
    _, fed = tiny.labels(3)
    z = tiny.patches(3).numpy()
    whole = Walk(tiny, 1, z, fed, GUIDANCES["everything"]).inverse()
    for b in range(3):
        alone = Walk(tiny, 1, z[b : b + 1], {"labels": fed["labels"][b : b + 1]}, GUIDANCES["everything"]).inverse()
        np.testing.assert_allclose(alone, whole[b : b + 1], rtol=0, atol=1e-5)


def test_float16_caches_are_halves_and_the_inverse_stays_close(exported: Any) -> None:
    tiny = exported("class", "float16")
    labels, fed = tiny.labels(3)
    z = tiny.patches(3).numpy()
    walk = Walk(tiny, 0, z, fed, GUIDANCES["everything"])
    x = walk.inverse()
    assert {cache.dtype for cache in walk.caches.values()} == {np.dtype("float16")}
    expected = expected_inverse(tiny, 0, z, labels, GUIDANCES["everything"])
    assert np.linalg.norm(x - expected) / np.linalg.norm(expected) < 5e-3


class ReadyWalk:
    """The inverse of a `Walk` through the graphs of `ort-cpu`, fed as docs/BUNDLE.md says and by nothing else."""

    def __init__(self, tiny: Any, block: int, walk: Walk, *, form: str, window: bool) -> None:
        self.tiny, self.block, self.walk, self.window = tiny, block, walk, window
        self.session = tiny.run_ready(block, ("window" if window else "step") + form)
        inputs = {value.name: value for value in self.session.get_inputs()}
        rows = walk.fixed["inverse_temperature"].size
        self.caches = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.full([1 if window else rows, *value.shape[1:]], 7, dtype))
            for name, value in inputs.items()
            if name.startswith(("key_", "value_"))
            for dtype in [tiny.manifest["cache"]["dtype"]]
        }
        self.names = [name for name in inputs if name not in self.caches]

    def step(self, patches: np.ndarray, i: int) -> np.ndarray:
        """Patches [B, S, D] at block positions i, i + 1, ...: S is 1, or B is 1 where it takes windows."""
        config, order, fixed = self.tiny.config, self.tiny.order(self.block), self.walk.fixed
        (batch, size), branches = patches.shape[:2], len(fixed["inverse_temperature"])
        places, width = np.arange(i, i + size), config.width
        embedding = np.broadcast_to(
            self.tiny.tensor(self.block, "pos_embed")[order[places]], (branches, batch, size, width)
        )
        if config.classes:
            embedding = embedding + self.tiny.tensor(self.block, "class_embed")[fixed["labels"]][:, :, None]
        g = fixed["guidance"][:, :, places].transpose(0, 2, 1)  # (B, S, 2)
        temperatures = np.repeat(fixed["inverse_temperature"].ravel(), size)[:, None]
        query_factor = np.concatenate([np.tile(temperatures, width), np.ones((len(temperatures), 2 * width))], axis=1)
        given = {
            "rows": np.tile(patches.reshape(-1, config.patch_values), (branches, 1)),
            "embedding": embedding.reshape(-1, width),
            "query_factor": query_factor.astype(self.tiny.manifest["cache"]["dtype"]),
            "z": fixed["noise"][:, order[places + 1]].reshape(-1, config.patch_values),
            "g": np.repeat(g if config.nvp else g[..., 1:], config.patch_values, axis=2).reshape(batch * size, -1),
            "lengths": np.full(1 if self.window else len(temperatures), i + size - 1, np.int32),
            "total": np.array([i + size], np.int32),
        }
        bound = self.session.io_binding()
        for name in self.names:
            bound.bind_cpu_input(name, np.ascontiguousarray(given[name]))
        for name, cache in self.caches.items():  # written in place
            bound.bind_ortvalue_input(name, cache)
            bound.bind_ortvalue_output(f"next_{name}", cache)
        bound.bind_output("next")
        self.session.run_with_iobinding(bound)
        return bound.get_outputs()[-1].numpy().reshape(patches.shape)


FORMS = {"": "unguided", "_guided": "annealed", "_tempered": "everything"}
"""How the names of the graphs of `ort-cpu` end, and guidance that takes them."""

CLOSE = {"float32": 1e-6, "float16": 1e-3, "int8": 5e-2}
"""From the portable step: sums in another order; halves that round apart; products of which int8's graphs of `ort-cpu`
round the activations to 8 bits, too."""


def far_apart(tiny: Any, form: str, *, window: bool) -> float:
    """The largest distance, relative from 1 on, of what a graph of `ort-cpu` and the portable step yield."""
    images = 1 if window else 3
    largest = 0.0
    for k in range(tiny.config.blocks):
        _, fed = tiny.labels(images)
        x, z = (tiny.patches(images, seed=seed).numpy() for seed in (k, 50 + k))
        x = x[:, tiny.order(k)]
        walk = Walk(tiny, k, z, fed, GUIDANCES[FORMS[form]])
        ready = ReadyWalk(tiny, k, walk, form=form, window=window)
        last = tiny.config.patches - 1
        # Windows of many lengths; one that goes back writes its entries again.
        places = [(0, last), (1, 2), (0, 1), (1, last)] if window else [(i, i + 1) for i in range(last)]
        for i, j in places:
            expected = walk.step(x[:, i:j], np.full(images, i))
            difference = np.abs(ready.step(x[:, i:j], i) - expected) / np.maximum(1.0, np.abs(expected))
            largest = max(largest, float(difference.max()))
    return largest


@pytest.mark.parametrize("window", [False, True], ids=["step", "window"])
@pytest.mark.parametrize("form", FORMS)
def test_the_graphs_of_the_cpu_equal_the_portable_step(tiny: Any, form: str, window: bool) -> None:
    assert far_apart(tiny, form, window=window) <= CLOSE["float32"]


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("window", [False, True], ids=["step", "window"])
@pytest.mark.parametrize("form", FORMS)
def test_the_graphs_of_the_cpu_stay_close_when_rounded(exported: Any, form: str, window: bool, precision: str) -> None:
    for name in ("class", "no_nvp_unconditional", "tokens"):
        assert far_apart(exported(name, precision), form, window=window) <= CLOSE[precision]
