"""Caches that pass from one inverse to the next: same images whatever they hold, never shared, bounded."""

from __future__ import annotations

import numpy as np
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes.engines.ort_cpu import caches
from tarflow_runtimes.engines.ort_cpu.caches import CachePool

SHAPE = (2, 1, 4, 8)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_cache_held_before_does_not_matter(flows, monkeypatch, dtype, guidance):
    flow = flows("class_n16", dtype)
    given = {"labels": [0, 1, 2], "seed": 0, "guidance": guidance, "denoise": False}
    expected = flow.sample(3, **given).images
    taken = []

    def poisoned(_: CachePool, shape: tuple[int, ...], kind: str) -> np.ndarray:
        taken.append(np.full(shape, np.nan, kind))
        return taken[-1]

    monkeypatch.setattr(CachePool, "take", poisoned)
    np.testing.assert_array_equal(flow.sample(3, **given).images, expected)
    assert len(taken) >= 2 * flow.config.layers * flow.config.blocks


def test_an_inverse_leaves_its_caches_to_the_next(exported, monkeypatch):
    given: list[list[np.ndarray]] = []
    give = CachePool.give
    monkeypatch.setattr(CachePool, "give", lambda pool, arrays: (given.append(list(arrays)), give(pool, given[-1])))
    with tfr.load(exported("class_n16").path, "ort-cpu") as flow:
        for seed in (0, 1):
            flow.sample(1, seed=seed)
        assert len(given) == 2 * flow.config.blocks
        assert len({id(array) for arrays in given for array in arrays}) == 2 * flow.config.layers


def test_nobody_gets_what_another_holds():
    pool = CachePool()
    first, second = pool.take(SHAPE, "float32"), pool.take(SHAPE, "float32")
    assert first is not second
    pool.give([first])
    assert pool.take((1, *SHAPE[1:]), "float32") is not first
    assert pool.take(SHAPE, "float16") is not first
    assert pool.take(SHAPE, "float32") is first
    assert pool.take(SHAPE, "float32") is not first


def test_the_pool_is_bounded(monkeypatch):
    pool, arrays = CachePool(), [np.zeros(SHAPE, np.float32) for _ in range(3)]
    monkeypatch.setattr(caches, "POOL_BYTES", 2 * arrays[0].nbytes)
    for kept in (arrays[1:], []):
        pool.give(arrays)
        if not kept:
            pool.clear()
        taken = {id(pool.take(SHAPE, np.float32)) for _ in range(3)}
        assert {id(array) for array in arrays} & taken == {id(array) for array in kept}
