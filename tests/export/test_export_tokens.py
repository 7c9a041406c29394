"""A molecular TarFlow at its published size, from a Lightning checkpoint to samples and back."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import tarflow_runtimes as tfr
from tarflow_export import export_bundle
from tarflow_sdk import FlowConfig, TarFlow, decode, save_checkpoint
from tarflow_sdk.testing import random_model

MOLECULE = FlowConfig(tokens=33, token_values=3, width=256, blocks=6, layers=6, head_dim=64)


def save_molecule(model: TarFlow, path: Path) -> None:
    """As such modules save it: under `net.`, a dropout in the MLP, no `var`."""
    save_checkpoint(model, path)
    state = torch.load(path, weights_only=True)
    del state["var"]
    torch.save({"net." + name.replace("mlp.main.2", "mlp.main.3"): tensor for name, tensor in state.items()}, path)


@pytest.mark.parametrize("verified", [True, False], ids=["small, verified", "published size"])
def test_a_molecular_checkpoint_is_exported_sampled_and_encoded(tmp_path: Path, verified: bool) -> None:
    """The verification takes a quarter of a minute at the published size; sampling and encoding are compared here."""
    model = random_model(dataclasses.replace(MOLECULE, blocks=2, layers=2) if verified else MOLECULE)
    save_molecule(model, tmp_path / "molecule.pth")
    report = export_bundle(tmp_path / "molecule.pth", tmp_path / "x.tarflow", tokens=True, verify=verified)
    assert report.verification["status"] == ("passed" if verified else "skipped")
    noise = torch.randn(4, 33, 3, generator=torch.Generator().manual_seed(0))
    x = decode(model, noise)
    with torch.no_grad():
        z, log_det = model(x)
    with tfr.load(report.path) as flow:
        sample = flow.sample(4, noise=noise.numpy(), denoise=False).images
        u, found = flow.encode(x.numpy())
    np.testing.assert_allclose(sample, x.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(u, z.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(u, noise.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found, log_det.numpy(), rtol=1e-5, atol=1e-4)
