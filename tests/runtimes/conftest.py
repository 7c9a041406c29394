"""Bundles of tiny models, written once per session by the exporter, and the PyTorch models they came from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tarflow_runtimes as tfr
from tarflow_export import convert_bundle, export_bundle
from tarflow_sdk import FlowConfig, TarFlow
from tarflow_sdk.testing import random_model, tiny_config, tiny_token_config

CONFIGS: dict[str, FlowConfig] = {
    "class": tiny_config(labels=("cat", "dog", "wild")),
    "class_n16": tiny_config(patch_size=2),
    "unconditional": tiny_config(classes=0, patch_size=2),
    "three_blocks": tiny_config(blocks=3, layers=1, image_channels=3),
    "no_nvp": tiny_config(nvp=False, image_channels=2),
    "no_nvp_unconditional": tiny_config(nvp=False, classes=0, noise="uniform", noise_std=None),
    "one_head": tiny_config(blocks=1, head_dim=64),
    "tokens": tiny_token_config(),
}
"""The matrix of models."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model and its bundle."""

    model: TarFlow
    path: Path

    @property
    def config(self) -> FlowConfig:
        return self.model.config

    def latents(self, n: int, seed: int = 0) -> np.ndarray[Any, Any]:
        shape = (n, self.config.patches, self.config.patch_values)
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)

    def images(self, n: int, seed: int = 0) -> np.ndarray[Any, Any]:
        return np.random.default_rng(seed).uniform(-1, 1, (n, *self.config.shape)).astype(np.float32)

    def labels(self, n: int) -> list[int | None] | None:
        """Every way to write a label, the null class among them; None for models without classes."""
        return [[0, None, 2, -1, 1][i % 5] for i in range(n)] if self.config.classes else None

    def torch_labels(self, n: int) -> torch.Tensor | None:
        labels = self.labels(n)
        return None if labels is None else torch.tensor([-1 if label is None else label for label in labels])


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """`exported(name, precision)`: the bundle of a model of CONFIGS."""
    made: dict[tuple[str, str], Exported] = {}

    def get(name: str, precision: str = "float32") -> Exported:
        if (name, precision) not in made:
            path = tmp_path_factory.mktemp("bundles") / f"{name}.tarflow"
            if precision == "float32":
                model = random_model(CONFIGS[name], seed=list(CONFIGS).index(name))
                export_bundle(model, path, verify=False)
            else:
                source = get(name)
                model = source.model
                convert_bundle(source.path, path, precision=precision, verify=False)
            made[name, precision] = Exported(model, path)
        return made[name, precision]

    return get


@pytest.fixture(scope="session")
def flows(exported: Callable[..., Exported]) -> Iterator[Callable[..., tfr.Flow]]:
    """`flows(name, precision, engine)`: an open flow that the tests share."""
    opened: dict[tuple[str, str, str], tfr.Flow] = {}

    def get(name: str, precision: str = "float32", engine: str = "cpu") -> tfr.Flow:
        if (name, precision, engine) not in opened:
            opened[name, precision, engine] = tfr.load(exported(name, precision).path, engine)
        return opened[name, precision, engine]

    yield get
    for flow in opened.values():
        flow.close()


@pytest.fixture
def copied(exported: Callable[..., Exported], tmp_path: Path) -> Path:
    """A bundle of its own, to damage."""
    return Path(shutil.copytree(exported("class").path, tmp_path / "copy.tarflow"))


@pytest.fixture
def edit_manifest(copied: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Change the manifest of `copied` in place."""

    def edit(change: Callable[[dict[str, Any]], object]) -> Path:
        path = copied / "manifest.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return copied

    return edit
