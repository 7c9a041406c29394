"""Parallel decoding: the fixed point by itself on a map made of NumPy, then the engine against its sequential path."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tarflow_runtimes as tfr
from hard_cases import export_hard_model
from tarflow_runtimes.decode.parallel import settle


class Toy:
    """x_{i+1} = z_{i+1} exp(a) + b with a and b of a weighted sum of x_0 .. x_i, which a cache of inputs stands for.

    Every evaluation keeps what it read from the cache, so that a test can ask whether that was final.
    """

    def __init__(self, noise: np.ndarray, strength: float, *, blow_up: float = np.inf) -> None:
        self.noise, self.strength, self.blow_up = noise, strength, blow_up
        self.cache = np.full_like(noise, np.nan)
        self.read: list[np.ndarray] = []
        self.written = 0

    def evaluate(self, first: int, patches: np.ndarray) -> np.ndarray:
        assert first <= self.written, "reads a key that was never written"
        self.read.append(self.cache[:first].copy())
        stop = first + len(patches)
        self.cache[first:stop] = patches
        self.written = max(self.written, stop)
        return np.stack([self.following(self.cache[: i + 1], i) for i in range(first, stop)])

    def following(self, before: np.ndarray, i: int) -> np.ndarray:
        if np.abs(before).max() > self.blow_up:
            return np.full_like(self.noise[0], np.inf)
        decay = 0.5 ** np.arange(i, -1, -1, dtype=np.float32)
        mean = self.strength * (decay[:, None] * before).sum(axis=0)
        return (self.noise[i + 1] * np.exp(np.tanh(mean)) + np.sin(mean)).astype(np.float32)

    def sequential(self) -> np.ndarray:
        x = self.noise.copy()
        for i in range(len(x) - 1):
            x[i + 1] = self.following(x[: i + 1], i)
        return x


def draw(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 24),
    window=st.integers(0, 30),
    init=st.sampled_from(["noise", "zeros"]),
    strength=st.floats(0.0, 2.0),
    seed=st.integers(0, 99),
)
def test_tolerance_zero_is_the_sequential_answer_bit_for_bit(count, window, init, strength, seed):
    toy = Toy(draw(count, seed), strength)
    settled = settle(toy, toy.noise, tfr.Parallel(window=window, tolerance=0.0, init=init))
    np.testing.assert_array_equal(settled.patches, toy.sequential())
    assert sum(settled.accepted) == count - 1
    assert len(settled.accepted) <= count - 1
    assert settled.residual == 0.0


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 24),
    window=st.integers(0, 30),
    tolerance=st.sampled_from([1e-5, 1e-2]),
    seed=st.integers(0, 99),
)
def test_no_evaluation_reads_a_cache_that_is_not_final(count, window, tolerance, seed):
    toy = Toy(draw(count, seed), 0.7)
    settled = settle(toy, toy.noise, tfr.Parallel(window=window, tolerance=tolerance))
    for seen in toy.read:
        np.testing.assert_array_equal(seen, settled.patches[: len(seen)])
    x = settled.patches
    residual = max(np.abs(x[i + 1] - toy.following(x[: i + 1], i)).max() for i in range(count - 1))
    assert residual == settled.residual <= tolerance


def test_an_easy_map_takes_few_evaluations():
    toy = Toy(draw(64, 0), 0.05)
    settled = settle(toy, toy.noise, tfr.Parallel(tolerance=1e-4))
    assert len(settled.accepted) < 8
    assert sum(settled.accepted) == 63


def test_a_window_of_one_is_sequential():
    toy = Toy(draw(9, 0), 1.0)
    settled = settle(toy, toy.noise, tfr.Parallel(window=1))
    assert settled.accepted == (1,) * 8
    np.testing.assert_array_equal(settled.patches, toy.sequential())


def test_an_iteration_that_overflows_goes_on_sequentially():
    noise = draw(24, 0)
    finite = Toy(noise, 1.0).sequential()
    toy = Toy(noise, 1.0, blow_up=float(np.abs(finite).max()) + 1e-3)
    start = noise.copy()
    start[12:] *= 50.0  # the start, not the answer, is beyond what the map bears
    heard: list[int] = []
    settled = settle(toy, start, tfr.Parallel(tolerance=1e-5), heard.append)
    assert settled.overflowed
    np.testing.assert_array_equal(settled.patches, finite)
    assert sum(settled.accepted) == 23
    assert heard == sorted(heard)
    assert heard[-1] == 23


def test_progress_counts_the_settled_patches():
    toy = Toy(draw(16, 0), 0.3)
    heard: list[int] = []
    settled = settle(toy, toy.noise, tfr.Parallel(window=4), heard.append)
    assert heard == list(np.cumsum(settled.accepted))


MODELS = ["class", "class_n16", "unconditional", "three_blocks", "no_nvp", "no_nvp_unconditional", "one_head", "tokens"]
GUIDED = tfr.Guidance(weight=1.3, attention_temperature=0.7, anneal=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("guidance", [0.0, tfr.Guidance(weight=1.3, guide="a", attention_temperature=1.4), GUIDED])
@pytest.mark.parametrize("window", [0, 3])
def test_parallel_is_sequential_within_rounding(exported, flows, name, guidance, window):
    noise, labels, flow = exported(name).latents(3), exported(name).labels(3), flows(name)
    expected = flow.decode(noise, labels, guidance=guidance)
    found = flow.decode(noise, labels, plan=tfr.Parallel(window=window, tolerance=1e-6), guidance=guidance)
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_float16_bundles_decode_in_parallel(exported, flows):
    noise = exported("class", "float16").latents(2)
    flow = flows("class", "float16")
    np.testing.assert_allclose(flow.decode(noise, plan=tfr.Parallel(tolerance=1e-3)), flow.decode(noise), atol=2e-2)


@pytest.mark.parametrize("init", ["noise", "zeros"])
def test_an_image_does_not_depend_on_its_batch(flows, init):
    flow = flows("class_n16")
    plan = tfr.Parallel(window=5, tolerance=1e-3, init=init)
    together = flow.sample(5, seed=3, plan=plan)
    for index in range(5):
        alone = flow.sample(1, seed=3, first_index=index, plan=plan)
        np.testing.assert_array_equal(alone.images[0], together.images[index])
        for one, all_ in zip(alone.report.blocks, together.report.blocks, strict=True):
            assert one.calls[0] == all_.calls[index]
            assert one.accepted[0] == all_.accepted[index]


def test_the_report_says_how_each_block_went(flows):
    flow = flows("three_blocks")
    steps = flow.config.patches - 1
    parallel = tfr.Parallel(tolerance=1e-3)
    plan = tfr.Plan(blocks=(parallel, tfr.Sequential(), parallel))
    report = flow.sample(5, seed=0, plan=plan, batch_size=2).report
    assert [block.block for block in report.blocks] == [2, 1, 0]
    assert [block.strategy for block in report.blocks] == [parallel, tfr.Sequential(), parallel]
    assert report.blocks[1].calls == (steps,) * 5
    assert report.blocks[1].accepted == ()
    for block in (report.blocks[0], report.blocks[2]):
        assert len(block.calls) == 5
        assert [sum(one) for one in block.accepted] == [steps] * 5
        assert tuple(map(len, block.accepted)) == block.calls
        assert 0.0 <= block.residual <= 1e-3
    assert report.non_finite == ()
    assert flow.sample(1, seed=0).report.blocks[0].calls == (steps,)


def test_progress_is_that_of_all_blocks(flows):
    flow = flows("three_blocks")
    total = 3 * (flow.config.patches - 1)
    heard: list[tfr.Step] = []
    flow.sample(3, seed=0, plan=tfr.Parallel(), on_step=heard.append)
    assert [step.step for step in heard] == sorted(step.step for step in heard)
    assert heard[-1] == tfr.Step(block=0, step=total, total=total)


def test_cancelling_leaves_the_flow_usable(flows):
    flow = flows("class_n16")
    with pytest.raises(tfr.Cancelled):
        flow.sample(4, seed=0, plan=tfr.Parallel(), on_step=lambda _: False)
    assert np.isfinite(flow.sample(1, seed=0, plan=tfr.Parallel()).images).all()


def test_wrong_plans_are_refused(flows):
    flow = flows("class")
    with pytest.raises(tfr.InputError, match="1 strategies, the model 2 blocks"):
        flow.sample(1, plan=tfr.Plan(blocks=(tfr.Sequential(),)))
    with pytest.raises(tfr.InputError, match="plan must be None, 'auto'"):
        flow.sample(1, plan="fastest")
    with pytest.raises(tfr.InputError, match="window"):
        tfr.Parallel(window=-1)
    with pytest.raises(tfr.InputError, match="tolerance"):
        tfr.Parallel(tolerance=float("nan"))
    with pytest.raises(tfr.InputError, match="init"):
        tfr.Parallel(init="ones")


def test_nothing_is_said_when_all_went_well(flows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flows("class").sample(2, seed=0, plan=tfr.Parallel())


@pytest.fixture(scope="module")
def hard_flow(tmp_path_factory):
    with tfr.load(export_hard_model(tmp_path_factory.mktemp("hard") / "hard.tarflow")) as flow:
        yield flow


def test_hard_blocks_give_the_sequential_answer_and_say_so(hard_flow):
    with pytest.warns(tfr.DecodeWarning, match="the model overflowed"):
        expected = hard_flow.sample(8, seed=0, denoise=False)
    with pytest.warns(tfr.DecodeWarning) as caught:
        sample = hard_flow.sample(8, seed=0, denoise=False, plan=tfr.Parallel(tolerance=1e-5))
    finite = [i for i in range(8) if i not in expected.report.non_finite]
    assert finite
    assert set(finite) & set(sample.report.blocks[1].sequential_images)
    assert sample.report.non_finite == expected.report.non_finite
    scale = np.abs(expected.images[finite]).max()
    np.testing.assert_allclose(sample.images[finite], expected.images[finite], atol=1e-4 * scale)
    said = [str(warning.message) for warning in caught]
    assert sum("block 0: parallel decoding met values that are not finite" in one for one in said) == 1
    assert sum("images hold values that are not finite: the model overflowed" in one for one in said) == 1


def test_hard_blocks_are_still_inverted(hard_flow):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32)
    z, _ = hard_flow.encode(images, [0, 1, 2, 0])
    decoded = hard_flow.decode(z, [0, 1, 2, 0], plan=tfr.Parallel(tolerance=1e-6))
    np.testing.assert_allclose(decoded, images, atol=2e-3)
