"""The decoders of benchmarks/ that others publish, and the compiled one: the sequential answer at tight settings."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tarflow_sdk import FlowConfig, Guidance, TarFlow, decode
from tarflow_sdk.testing import random_model, tiny_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _compiled import StaticSampler
from _published import (
    GS_JACOBI_CLAMP,
    Segments,
    Stop,
    gs_jacobi,
    gs_jacobi_measured_strategy,
    gs_jacobi_strategy,
    selective_jacobi,
)

CONFIGS = {
    "classes": tiny_config(patch_size=2),
    "unconditional": tiny_config(patch_size=2, classes=0, blocks=3),
    "volume preserving": tiny_config(patch_size=2, nvp=False),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

GUIDANCES = {
    "none": Guidance(),
    "ab": Guidance(weight=1.5),
    "a, annealed": Guidance(weight=1.5, guide="a", anneal=True),
    "temperature": Guidance(weight=1.0, attention_temperature=0.7),
}
every_guidance = pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)

NEVER = Stop(norm="max", bound=-1.0)


def work(config: FlowConfig) -> tuple[TarFlow, Tensor, Tensor | None]:
    z = torch.randn(3, config.patches, config.patch_values, generator=torch.Generator().manual_seed(0))
    return random_model(config), z, torch.tensor([0, 2, -1]) if config.classes else None


def close(images: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(images, expected, atol=2e-5, rtol=0)


@every_config
@every_guidance
@pytest.mark.parametrize("count", [1, 3, 4, 16], ids="{} segments".format)
@pytest.mark.parametrize("zeros", [False, True], ids=["noise", "zeros"])
def test_gs_jacobi(config: FlowConfig, guidance: Guidance, count: int, zeros: bool) -> None:
    model, z, labels = work(config)
    expected = decode(model, z, labels, guidance)
    strategy = [Segments(count=count, cap=99, zeros=zeros)] * config.blocks
    images, iterations = gs_jacobi(
        model, z, labels, guidance, strategy=strategy, stop=Stop(norm="frobenius", bound=1e-7), clamp=None
    )
    close(images, expected)
    assert len(iterations) == config.blocks
    assert all(0 < n <= config.patches - 1 for n in iterations)


@every_config
@every_guidance
def test_selective_jacobi(config: FlowConfig, guidance: Guidance) -> None:
    model, z, labels = work(config)
    images, iterations = selective_jacobi(model, z, labels, guidance, stop=Stop(norm="max", bound=1e-6))
    close(images, decode(model, z, labels, guidance))
    assert iterations[-1] == config.patches - 1
    assert max(iterations[:-1]) < config.patches - 1


def test_never_stopping_is_exact_after_as_many_iterations_as_patches() -> None:
    model, z, labels = work(CONFIGS["classes"])
    expected = decode(model, z, labels)
    images, iterations = selective_jacobi(model, z, labels, stop=NEVER)
    close(images, expected)
    assert iterations == [15, 15]
    images, iterations = gs_jacobi(model, z, labels, strategy=[Segments(count=4, cap=99)] * 2, stop=NEVER, clamp=None)
    close(images, expected)
    assert iterations == [15, 15]


def test_the_published_settings_are_those_of_the_papers() -> None:
    """At the published tolerance an answer is near, not equal; GS-Jacobi's clamp bounds every value."""
    model, z, labels = work(CONFIGS["classes"])
    expected = decode(model, z, labels)
    images, iterations = selective_jacobi(model, z, labels)
    assert 1e-5 < float((images - expected).abs().max()) < 0.5
    assert iterations[0] < 5
    wide = 3 * z
    assert float(decode(model, wide, labels).abs().max()) > GS_JACOBI_CLAMP + 1
    images, _ = gs_jacobi(model, wide, labels, strategy=[Segments()] * 2)
    free = torch.ones(images.shape, dtype=torch.bool)
    free[:, :, :2, :2] = False  # the first patch of an even block is copied, not clamped
    assert float(images[free].abs().max()) == GS_JACOBI_CLAMP


def test_caps_end_an_iteration() -> None:
    model, z, labels = work(CONFIGS["classes"])
    _, iterations = gs_jacobi(
        model, z, labels, strategy=[Segments(count=4, cap=2), Segments(cap=3)], stop=NEVER, clamp=None
    )
    assert iterations == [8, 3]


def test_a_change_that_is_not_finite_is_no_convergence() -> None:
    for stop in (Stop(norm="max", bound=1.0), Stop(norm="frobenius", bound=1.0)):
        assert stop.reached(torch.zeros(2, 3, 4))
        assert not stop.reached(torch.full((2, 3, 4), torch.nan))
    ones = torch.ones(2, 4, 2)  # sqrt(16) / (2 * 2) = 1
    assert Stop(norm="frobenius", bound=1.0).reached(ones)
    assert not Stop(norm="frobenius", bound=0.99).reached(ones)


def test_strategy_ranks_the_block_with_the_large_last_layer_as_tough() -> None:
    config = tiny_config(patch_size=2, blocks=3)
    model = random_model(config)
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        model.flow_blocks[1].proj_out.weight *= 20
    strategy = gs_jacobi_strategy(model, images)
    assert [segments.count for segments in strategy] == [1, 8, 1]
    assert [segments.cap for segments in strategy] == [10, 32, 10]


def test_measured_strategy_takes_the_slow_block_for_tough() -> None:
    """The metric ranks block 0 first, for its large last layer; but it reads no patch, and converges at once."""
    config = tiny_config(patch_size=2, blocks=3)
    model, z, labels = work(config)
    with torch.no_grad():
        model.flow_blocks[0].proj_in.weight.zero_()
        model.flow_blocks[0].proj_out.weight[config.patch_values :] *= 20
        model.flow_blocks[2].proj_out.weight *= 2
    images = decode(model, z, labels)
    assert [segments.count for segments in gs_jacobi_strategy(model, images)] == [8, 1, 1]
    measured = gs_jacobi_measured_strategy(model, images, z, labels, stop=Stop(norm="max", bound=1e-4))
    assert [segments.count for segments in measured] == [1, 1, 8]
    assert {segments.cap for segments in measured} == {config.patches}
    found, _ = gs_jacobi(model, z, labels, strategy=measured, stop=Stop(norm="max", bound=1e-6), clamp=None)
    torch.testing.assert_close(found, images, atol=1e-4, rtol=1e-5)


@every_config
@every_guidance
def test_static_sampler(config: FlowConfig, guidance: Guidance) -> None:
    model, z, labels = work(config)
    close(StaticSampler(model)(z, labels, guidance), decode(model, z, labels, guidance))
