"""What tests of several engines do with a bundle: one that is hard to invert, and one that is closed while it runs."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

import tarflow_runtimes as tfr
from tarflow_export import export_bundle
from tarflow_sdk.testing import random_model, tiny_config

__all__ = ["closed_while_sampling", "export_hard_model"]


def export_hard_model(path: Path) -> Path:
    """A model on whose iterates exp(a) overflows, also for an image that the sequential path draws."""
    model = random_model(tiny_config(patch_size=2), seed=0)
    with torch.no_grad():
        for block in model.flow_blocks:
            block.proj_out.weight.mul_(6.0)
    export_bundle(model, path, verify=False)
    return path


def closed_while_sampling(flow: tfr.Flow) -> list[object]:
    """Close a flow while another thread samples: the images or the EngineError of that thread."""
    started = threading.Event()
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(flow.sample(4, seed=0, on_step=lambda _: started.set()).images)
        except tfr.EngineError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    flow.close()
    thread.join(60)
    assert not thread.is_alive()
    return outcome
