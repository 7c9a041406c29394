"""Our model beside the original code: the same weights, the same numbers but for the deviations of the design.

Runs where TARFLOW_REFERENCE names the folder of the original `transformer_flow.py`.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tarflow_sdk import FlowConfig, Guidance, TarFlow, decode, denoise, encode, load_checkpoint, save_checkpoint
from tarflow_sdk.testing import random_model, tiny_config

FOLDER = os.environ.get("TARFLOW_REFERENCE", "")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(not FOLDER, reason="TARFLOW_REFERENCE does not name the folder of the original code"),
]

# The original builds its heads of 64 channels; everything else may vary.
CONFIGS = {
    "unconditional": tiny_config(classes=0, head_dim=64),
    "classes": tiny_config(width=128, head_dim=64),
    "three blocks, rgb, patch 2": tiny_config(blocks=3, layers=1, image_channels=3, patch_size=2, head_dim=64),
    "volume preserving": tiny_config(nvp=False, head_dim=64),
    "volume preserving, unconditional": tiny_config(nvp=False, classes=0, head_dim=64),
    "mnist shape": tiny_config(image_size=28, width=128, blocks=4, layers=4, classes=10, head_dim=64),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

GUIDANCES = {
    "none": Guidance(),
    "ab": Guidance(weight=1.5),
    "a": Guidance(weight=1.5, guide="a"),
    "b": Guidance(weight=1.5, guide="b"),
    "annealed": Guidance(weight=1.5, anneal=True),
    "temperature": Guidance(weight=1.0, attention_temperature=0.7),
}


@pytest.fixture(scope="module")
def original() -> ModuleType:
    spec = importlib.util.spec_from_file_location("original_flow", Path(FOLDER) / "transformer_flow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(original: ModuleType, config: FlowConfig) -> Any:
    return original.Model(
        in_channels=config.image_channels,
        img_size=config.image_size,
        patch_size=config.patch_size,
        channels=config.width,
        num_blocks=config.blocks,
        layers_per_block=config.layers,
        nvp=config.nvp,
        num_classes=config.classes,
    )


def pair(original: ModuleType, config: FlowConfig, folder: Path) -> tuple[TarFlow, Any]:
    """Our random model, and the original with the same weights by way of a file, which it must load strictly."""
    ours = random_model(config)
    save_checkpoint(ours, folder / "model.pth")
    theirs = build(original, config)
    theirs.load_state_dict(torch.load(folder / "model.pth", weights_only=True), strict=True)
    return ours, theirs.eval()


def inputs(config: FlowConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, config.image_channels, config.image_size, config.image_size)
    images = torch.rand(shape, generator=generator) * 2 - 1
    return images, torch.randn(3, config.patches, config.patch_values, generator=generator)


def labelings(config: FlowConfig) -> list[Tensor | None]:
    """No labels, labels, and labels with null classes between them (-1 in both codes when encoding)."""
    return [None, torch.tensor([0, 2, 1]), torch.tensor([1, -1, 2])] if config.classes else [None]


@every_config
def test_forward(original: ModuleType, config: FlowConfig, tmp_path: Path) -> None:
    ours, theirs = pair(original, config, tmp_path)
    images, _ = inputs(config)
    for labels in labelings(config):
        with torch.no_grad():
            u, log_det = encode(ours, images, labels)
            z, _, mean_log_det = theirs(images, labels)
        # The original's forward ends before the prior's scaling and averages over the dims.
        torch.testing.assert_close(u * ours.var.sqrt(), z, atol=1e-4, rtol=0)
        expected = mean_log_det * config.dims - 0.5 * ours.var.log().sum()
        torch.testing.assert_close(log_det, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@every_config
def test_reverse(original: ModuleType, config: FlowConfig, guidance: Guidance, tmp_path: Path) -> None:
    ours, theirs = pair(original, config, tmp_path)
    _, z = inputs(config)
    for labels in labelings(config)[:2]:  # the original's sampler takes -1 for the last class
        with torch.no_grad():
            expected = theirs.reverse(
                z,
                labels,
                guidance=guidance.weight,
                guide_what=guidance.guide,
                attn_temp=guidance.attention_temperature,
                annealed_guidance=guidance.anneal,
            )
        torch.testing.assert_close(decode(ours, z, labels, guidance), expected, atol=1e-4, rtol=1e-5)


def test_the_label_minus_one_deviates_on_purpose(original: ModuleType, tmp_path: Path) -> None:
    config = CONFIGS["classes"]
    ours, theirs = pair(original, config, tmp_path)
    _, z = inputs(config)
    minus_one, last = torch.full((3,), -1), torch.full((3,), config.classes - 1)
    with torch.no_grad():
        of_minus_one, of_null = theirs.reverse(z, minus_one), theirs.reverse(z, None)
    torch.testing.assert_close(of_minus_one, decode(ours, z, last), atol=1e-4, rtol=0)
    torch.testing.assert_close(of_null, decode(ours, z, minus_one), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.nvp])
def test_denoise(original: ModuleType, name: str, tmp_path: Path) -> None:
    """The original's recipe: a gradient step on its training loss, scaled to the log-density. It ignores `var`."""
    config = CONFIGS[name]
    ours, theirs = pair(original, config, tmp_path)
    images, _ = inputs(config)
    for labels in labelings(config):
        x = images.clone().requires_grad_()
        z, _, mean_log_det = theirs(x, labels)
        log_density = -0.5 * z.square().sum() + mean_log_det.sum() * config.dims
        (score,) = torch.autograd.grad(log_density, x)
        found = (denoise(ours, images, labels, noise_std=1.0) - images).flatten()
        assert float((found - score.flatten()).norm() / score.norm()) < 1e-5


@every_config
def test_the_loss_is_the_originals(original: ModuleType, config: FlowConfig, tmp_path: Path) -> None:
    ours, theirs = pair(original, config, tmp_path)
    images, _ = inputs(config)
    with torch.no_grad():
        z, log_det = ours(images)
        expected_z, _, mean_log_det = theirs(images)
        expected = theirs.get_loss(expected_z, mean_log_det)
    torch.testing.assert_close(0.5 * z.square().mean() - log_det.mean() / config.dims, expected, atol=1e-5, rtol=1e-5)


@every_config
def test_we_load_what_the_original_saves(original: ModuleType, config: FlowConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = build(original, config)
    name = f"data_model_{config.patch_size}_{config.width}_{config.blocks}_{config.layers}_0.10.pth"
    torch.save(theirs.state_dict(), tmp_path / name)
    ours = load_checkpoint(tmp_path / name)
    assert ours.config == config
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
