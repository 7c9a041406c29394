"""Tiny models, their graphs run straight through ONNX Runtime, and the PyTorch side of each comparison."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tarflow_export import _export, _plan, _write, convert_bundle, export_bundle
from tarflow_sdk import FlowConfig, TarFlow
from tarflow_sdk.testing import random_model, tiny_config, tiny_token_config

CONFIGS: dict[str, FlowConfig] = {
    "unconditional": tiny_config(classes=0, patch_size=2),
    "class": tiny_config(patch_size=2),
    "no_nvp": tiny_config(nvp=False),
    "no_nvp_unconditional": tiny_config(nvp=False, classes=0, noise="uniform", noise_std=None),
    "three_blocks": tiny_config(blocks=3, layers=1),
    "one_block_one_head": tiny_config(blocks=1, head_dim=64),
    "two_channels": tiny_config(image_channels=2),
    "five_channels": tiny_config(image_channels=5, patch_size=2),
    "tokens": tiny_token_config(),
}
"""The matrix of models that every graph is compared on."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model and its bundle, not verified."""

    model: TarFlow
    folder: Path

    @property
    def config(self) -> FlowConfig:
        return self.model.config

    def order(self, block: int) -> np.ndarray[Any, Any]:
        """Block order to the order of the data."""
        order = np.arange(self.config.patches)
        return order[::-1].copy() if block % 2 else order

    def session(self, block: int, kind: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        path = self.folder / f"block_{block:02d}" / f"{kind}.onnx"
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run_ready(self, block: int, kind: str) -> onnxruntime.InferenceSession:
        """A graph of `ort-cpu` on the weights of a block."""
        options = onnxruntime.SessionOptions()
        folder = str(self.folder / f"block_{block:02d}")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        model = (self.folder / "graphs" / "ort-cpu" / f"{kind}.onnx").read_bytes()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "manifest.json").read_text()))

    def tensor(self, block: int, name: str) -> np.ndarray[Any, Any]:
        """A tensor of a block, read where the manifest says; bfloat16 as its bits."""
        entry = self.manifest["tensors"][name]
        raw = (self.folder / f"block_{block:02d}" / "weights.bin").read_bytes()[entry["offset"] :][: entry["bytes"]]
        return np.frombuffer(raw, entry["dtype"].replace("bfloat16", "uint16")).reshape(entry["shape"])

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
        return {name: np.full(shape, fill, self.manifest["cache"]["dtype"]) for name in names}


Export = Callable[..., Exported]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The bundle of a model of `CONFIGS` in a precision, written once."""
    done: dict[tuple[str, str], Exported] = {}

    def export(name: str, precision: Any = "float32") -> Exported:
        if (name, precision) not in done:
            folder = tmp_path_factory.mktemp(f"{name}_{precision}") / "x.tarflow"
            if precision == "float32":
                model = random_model(CONFIGS[name])
                export_bundle(model, folder, verify=False)
            else:
                model = export(name).model
                convert_bundle(export(name).folder, folder, precision=precision, verify=False)
            done[name, precision] = Exported(model, folder)
        return done[name, precision]

    return export


@pytest.fixture(params=list(CONFIGS))
def tiny(request: pytest.FixtureRequest, exported: Export) -> Exported:
    """Every model of the matrix in turn, float32."""
    return exported(request.param)


@pytest.fixture
def wrong_weight(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the exporter write wrong numbers into the tensor of that name of every block."""
    original = _write.block_tensors

    def plant(name: str) -> None:
        def tensors(*args: Any, **options: Any) -> Any:
            for tensor, array in original(*args, **options):
                if tensor == "order" == name:
                    array = array[::-1].copy()  # noqa: PLW2901
                elif tensor == name:
                    array = array.copy()  # noqa: PLW2901
                    array.flat[array.size // 2] += 0.5
                yield tensor, array

        monkeypatch.setattr(_write, "block_tensors", tensors)

    return plant


@pytest.fixture
def wrong_graph(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`wrong_graph(provider, kind, change)`: let the exporter write one graph with that change."""
    original = _plan._plan_graph

    def plant(provider: str, kind: str, change: Callable[[onnx.ModelProto], None]) -> None:
        def planted(*given: Any) -> Any:
            plan = original(*given)
            if (plan.provider, plan.kind) != (provider, kind):
                return plan
            model = onnx.load_from_string(plan.serialized)
            change(model)
            return dataclasses.replace(plan, serialized=model.SerializeToString())

        monkeypatch.setattr(_plan, "_plan_graph", planted)

    return plant


@pytest.fixture
def wrong_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exporter write a prior that is wide by a hundredth."""
    original = _export.load

    def load(*given: Any, **options: Any) -> Any:
        loaded = original(*given, **options)
        prior = loaded.contents.prior * np.float32(1.01)
        return dataclasses.replace(loaded, contents=dataclasses.replace(loaded.contents, prior=prior))

    monkeypatch.setattr(_export, "load", load)
