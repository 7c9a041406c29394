"""Tiny models, their graphs run straight through ONNX Runtime, and the PyTorch side of each comparison."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tarflow_export._plan import Plan, block_order, plan_export
from tarflow_export._write import Source, write_blocks, write_manifest
from tarflow_sdk import FlowConfig, TarFlow
from tarflow_sdk.testing import random_model, tiny_config

CONFIGS: dict[str, FlowConfig] = {
    "unconditional": tiny_config(classes=0, patch_size=2),
    "class": tiny_config(patch_size=2),
    "no_nvp": tiny_config(nvp=False),
    "no_nvp_unconditional": tiny_config(nvp=False, classes=0, noise="uniform", noise_std=None),
    "three_blocks": tiny_config(blocks=3, layers=1),
    "one_block_one_head": tiny_config(blocks=1, head_dim=64),
    "two_channels": tiny_config(image_channels=2),
    "five_channels": tiny_config(image_channels=5, patch_size=2),
}
"""The matrix of models that every graph is compared on."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model and the folder with its graphs and weights."""

    model: TarFlow
    plan: Plan
    folder: Path

    @property
    def config(self) -> FlowConfig:
        return self.model.config

    def order(self, block: int) -> np.ndarray[Any, Any]:
        """Block order to image order."""
        order = np.arange(self.config.patches)
        return order if block_order(block) == "identity" else order[::-1].copy()

    def session(self, block: int, kind: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        path = self.folder / f"block_{block:02d}" / f"{kind}.onnx"
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def labels(self, images: int, kind: str = "mixed") -> tuple[torch.Tensor | None, dict[str, Any]]:
        """PyTorch's labels (null -1), and the graphs' input (null `classes`); nothing for models without classes."""
        if not self.config.classes:
            return None, {}
        labels = torch.arange(images) % self.config.classes
        if kind == "mixed":
            labels[1::2] = -1
        elif kind == "null":
            labels[:] = -1
        return labels, {"labels": np.where(labels < 0, self.config.classes, labels).astype(np.int64)}

    def patches(self, images: int, seed: int = 0) -> torch.Tensor:
        """Random patches [B, N, D]."""
        shape = (images, self.config.patches, self.config.patch_values)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def caches(self, rows: int, fill: float = 0.0) -> dict[str, np.ndarray[Any, Any]]:
        config = self.config
        shape = (rows, config.heads, config.patches, config.head_dim)
        names = [f"{kind}_{layer}" for layer in range(config.layers) for kind in ("key", "value")]
        return {name: np.full(shape, fill, self.plan.layout.dtype) for name in names}


Export = Callable[..., Exported]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Graphs and weights of a model of `CONFIGS`, written once."""
    done: dict[tuple[str, str], Exported] = {}

    def export(name: str, dtype: Any = "float32") -> Exported:
        if (name, dtype) not in done:
            model = random_model(CONFIGS[name])
            folder = tmp_path_factory.mktemp(f"{name}_{dtype}")
            plan = plan_export(model.config, dtype)
            files = write_blocks(folder, plan, model)
            write_manifest(folder, plan, model, source=Source(), files=files, verification={"status": "skipped"})
            done[name, dtype] = Exported(model, plan, folder)
        return done[name, dtype]

    return export


@pytest.fixture(params=list(CONFIGS))
def tiny(request: pytest.FixtureRequest, exported: Export) -> Exported:
    """Every model of the matrix in turn, float32."""
    return exported(request.param)
