"""The tuner: what is measured and what it takes."""

from __future__ import annotations

import time

import numpy as np
import pytest

import tarflow_runtimes as tfr


@pytest.fixture
def flow(flows):
    return flows("class_n16")


def test_tune_measures_every_block_and_its_plan_decodes(flow):
    found = []
    plans = tfr.tune(flow, batches=(1, 3), guidance=(0.0, 1.5), draws=2, on_block=found.append)
    assert [(one.batch, one.branches) for one in plans.entries] == [(1, 1), (3, 1), (1, 2), (3, 2)]
    assert [one.block for one in found] == [1, 0] * 4
    for one in plans.entries:
        assert 0.0 < one.seconds <= one.sequential_seconds
        assert one.identity == flow.identity()
    expected = flow.sample(3, labels=[0, 1, 2], seed=0, guidance=1.5).images
    drawn = flow.sample(3, labels=[0, 1, 2], seed=0, guidance=1.5, plan=plans).images
    np.testing.assert_allclose(drawn, expected, atol=1e-3)


def test_tune_takes_a_window_only_where_it_is_faster(flow, monkeypatch):
    """The clock is made of evaluations: a step costs 1 sequentially, a window 1 whatever its size, or 100."""
    for cost, strategy in ((1.0, tfr.Parallel), (100.0, tfr.Sequential)):
        clock = Clock()
        monkeypatch.setattr(time, "perf_counter", clock.read)
        plans = tfr.tune(tfr.Flow(flow.bundle, Charged(flow.engine, clock, cost)), batches=(1,), draws=2)
        assert {type(one) for one in plans.entries[0].plan.blocks} == {strategy}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now


class Charged:
    """An engine whose steps and evaluations move a clock."""

    def __init__(self, engine, clock, cost) -> None:
        self.engine, self.clock, self.cost = engine, clock, cost

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def invert(self, *given):
        made, reports = self.engine.invert(*given)
        for one in reports:
            cost = 1.0 if isinstance(one.strategy, tfr.Sequential) else self.cost
            self.clock.now += cost * max(one.calls)
        return made, reports


def test_wrong_arguments_are_refused(flow):
    for options in ({"batches": ()}, {"batches": (0,)}, {"guidance": (-1.0,)}, {"draws": 0}, {"tolerance": -1.0}):
        with pytest.raises(tfr.InputError):
            tfr.tune(flow, **options)
