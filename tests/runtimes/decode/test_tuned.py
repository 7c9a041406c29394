"""The file of tuned plans: what holds where, and what `plan="auto"` makes of it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes.decode.plan import strategy_from_json, strategy_json
from tarflow_runtimes.decode.tuned import plans_path, read_plans, write_plans

PARALLEL = tfr.Parallel(window=3, tolerance=1e-3, init="zeros")


@pytest.fixture
def flow(exported, tmp_path):
    """A flow on a copy of a bundle, so that a file may lie beside it."""
    path = shutil.copytree(exported("class_n16").path, tmp_path / "own.tarflow")
    with tfr.load(path) as opened:
        yield opened


def entry(flow, *, batch=4, branches=1, strategy=PARALLEL, **changes):
    made = tfr.TunedPlan(
        identity=flow.identity(),
        batch=batch,
        branches=branches,
        plan=tfr.Plan(blocks=(strategy,) * flow.config.blocks),
        seconds=1.0,
        sequential_seconds=2.0,
    )
    return dataclasses.replace(made, **changes)


def test_auto_without_plans_is_sequential(flow):
    plans = flow.tuned_plans()
    assert plans.entries == ()
    assert "own.plans.json does not exist" in plans.reason
    report = flow.sample(2, seed=0, plan="auto").report
    assert {block.strategy for block in report.blocks} == {tfr.Sequential()}


def test_auto_takes_the_plan_of_the_next_larger_batch(flow):
    write_plans(plans_path(flow.bundle.path), (entry(flow), entry(flow, batch=16, strategy=tfr.Sequential())))
    for batch, strategy in ((1, PARALLEL), (4, PARALLEL), (5, tfr.Sequential()), (17, tfr.Sequential())):
        report = flow.sample(batch, seed=0, plan="auto").report
        assert {block.strategy for block in report.blocks} == {strategy}, batch
    guided = flow.sample(1, labels=[0], guidance=1.0, seed=0, plan="auto").report
    assert {block.strategy for block in guided.blocks} == {tfr.Sequential()}


def test_plans_of_another_machine_do_not_hold_but_stay(flow):
    path = plans_path(flow.bundle.path)
    other = entry(flow, identity={**flow.identity(), "device": "another, 64 CPUs"})
    write_plans(path, (other,))
    assert flow.tuned_plans().entries == ()
    assert "another device" in flow.tuned_plans().reason
    write_plans(path, (entry(flow), entry(flow, batch=1)))
    write_plans(path, (entry(flow, seconds=0.5),))
    assert len(json.loads(path.read_text())["plans"]) == 3
    assert sorted(one.seconds for one in flow.tuned_plans().entries) == [0.5, 1.0]
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


def test_the_tolerance_of_plans_can_be_changed(flow):
    plans = tfr.TunedPlans(entries=(entry(flow),)).with_tolerance(1e-6)
    assert plans.plan(1, 1, 2).blocks[0] == dataclasses.replace(PARALLEL, tolerance=1e-6)
    assert flow.sample(1, seed=0, plan=plans).report.blocks[0].residual <= 1e-6


@pytest.mark.parametrize("strategy", [tfr.Sequential(), PARALLEL])
def test_strategies_survive_json(strategy):
    assert strategy_from_json(json.loads(json.dumps(strategy_json(strategy)))) == strategy


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema_version": 9, "plans": []}', '{"schema_version": 1, "plans": [{}]}', '{"plans": 1}']
)
def test_a_damaged_file_is_refused(flow, text):
    path = plans_path(flow.bundle.path)
    path.write_text(text)
    with pytest.raises(tfr.InputError, match="not a file of tuned plans"):
        flow.sample(1, seed=0, plan="auto")
    with pytest.raises(tfr.InputError, match="not a file of tuned plans"):
        write_plans(path, (entry(flow),))
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_is_one_error(flow, tmp_path):
    with pytest.raises(tfr.InputError, match="cannot write the plans"):
        write_plans(tmp_path / "nowhere" / "x.plans.json", (entry(flow),))
    assert read_plans(tmp_path / "x.plans.json", flow.identity()).entries == ()
