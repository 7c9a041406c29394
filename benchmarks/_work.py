"""`Work`: the inputs of all samplers of a comparison, in one folder: weights, bundle, noise, labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

CHECKPOINTS = {
    "mnist": ROOT / "examples" / "01_train_mnist" / "mnist_model_4_128_4_4_0.10.safetensors",
    "photos": ROOT / "examples" / "04_train_photos" / "photos_model_2_192_4_4_0.07.safetensors",
}
"""The trained models of this repository."""

SHAPES: dict[str, dict[str, int]] = {
    "mnist": {
        "image_size": 28,
        "image_channels": 1,
        "patch_size": 4,
        "width": 128,
        "blocks": 4,
        "layers": 4,
        "classes": 10,
    },
    "photos": {
        "image_size": 32,
        "image_channels": 3,
        "patch_size": 2,
        "width": 256,
        "blocks": 4,
        "layers": 4,
        "classes": 0,
    },
    "imagenet64": {
        "image_size": 64,
        "image_channels": 3,
        "patch_size": 2,
        "width": 768,
        "blocks": 8,
        "layers": 8,
        "classes": 1000,
    },
    "afhq": {
        "image_size": 256,
        "image_channels": 3,
        "patch_size": 8,
        "width": 768,
        "blocks": 8,
        "layers": 8,
        "classes": 3,
    },
    "tiny": {
        "image_size": 8,
        "image_channels": 1,
        "patch_size": 2,
        "width": 64,
        "blocks": 2,
        "layers": 1,
        "classes": 3,
    },
}
"""Models with random weights: enough to time sequential steps, but not the convergence of iterations."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A model in three forms, in `folder`: checkpoint of the original code, bundle, and configuration."""

    folder: Path
    model: str
    config: dict[str, Any]

    @classmethod
    def prepare(cls, model: str, checkpoint: str | Path | None, folder: Path, *, blocks: int | None = None) -> Self:
        """Write the model of this checkpoint, or with random weights, into `folder`; existing files are reused.

        `blocks` is the number of blocks with random weights, by default that of the shape.

        Raises:
            SystemExit: when the folder holds another model.
        """
        name = model if checkpoint is None else Path(checkpoint).name
        if blocks is not None:
            name += f", {blocks} of {SHAPES[model]['blocks']} blocks"
        if checkpoint is not None:
            name += " " + hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()[:12]
        if (folder / "work.json").exists():
            work = cls.open(folder)
            if work.model != name:
                raise SystemExit(f"{folder} holds {work.model}, not {name}: choose another folder")
            return work

        from tarflow_export import export_bundle
        from tarflow_sdk import FlowConfig, load_checkpoint, save_checkpoint
        from tarflow_sdk.testing import random_model

        shape = SHAPES.get(model, {}) | ({} if blocks is None else {"blocks": blocks})
        flow = load_checkpoint(checkpoint) if checkpoint else random_model(FlowConfig(**shape, noise_std=0.1))
        work = cls(folder=folder, model=name, config=flow.config.to_json())
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(flow, work.weights)
        export_bundle(flow, work.bundle, verify=False, overwrite=True)
        (folder / "work.json").write_text(json.dumps({"model": name, "config": work.config}))
        return work

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a folder that `prepare` wrote."""
        return cls(folder=Path(folder), **json.loads((Path(folder) / "work.json").read_text()))

    @property
    def weights(self) -> Path:
        """The checkpoint in the original's format."""
        return self.folder / "model.pth"

    @property
    def bundle(self) -> Path:
        """Path of the bundle."""
        return self.folder / "model.tarflow"

    @property
    def patches(self) -> int:
        """N, the number of patches."""
        return int((self.config["image_size"] // self.config["patch_size"]) ** 2)

    @property
    def steps(self) -> int:
        """Steps of a sequential decode."""
        return int(self.config["blocks"] * (self.patches - 1))

    def noise(self, images: int, seed: int) -> np.ndarray:
        """Standard normal latents, float32 [images, N, D]."""
        values = self.config["image_channels"] * self.config["patch_size"] ** 2
        return np.random.default_rng(seed).standard_normal((images, self.patches, values), dtype=np.float32)

    def labels(self, images: int) -> list[int] | None:
        """Class numbers in turn, None on models without classes."""
        return [i % self.config["classes"] for i in range(images)] if self.config["classes"] else None

    def request(self, batch: int, guidance: float) -> dict[str, Any]:
        """One call of a sampler; the noise is written into the folder."""
        path = self.folder / "noise.npy"
        np.save(path, self.noise(batch, seed=batch))
        return {"noise": str(path), "labels": self.labels(batch), "guidance": guidance}

    def original_shape(self) -> dict[str, Any]:
        """Arguments of the original code's constructor."""
        return {
            "in_channels": self.config["image_channels"],
            "img_size": self.config["image_size"],
            "patch_size": self.config["patch_size"],
            "channels": self.config["width"],
            "num_blocks": self.config["blocks"],
            "layers_per_block": self.config["layers"],
            "nvp": self.config["nvp"],
            "num_classes": self.config["classes"],
        }


def header(**facts: Any) -> dict[str, Any]:
    """Date, commit, machine and versions, and `facts`: the head of every result file."""
    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git.stdout.strip() or "unknown",
        "machine": f"{platform.machine()} {_processor()}, {len(os.sched_getaffinity(0))} CPUs",
        "versions": {name: _version(name) for name in ("tarflow-sdk", "torch", "onnxruntime", "numpy")},
        **facts,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def ceilings() -> dict[str, Any] | None:
    """The machine's own limits: GEMM GFLOP/s, GEMV and copy GB/s, on one thread and on all."""
    from tarflow_runtimes.measure.ceilings import measure_ceilings

    return dataclasses.asdict(measure_ceilings())


def write_json(path: str | Path, document: dict[str, Any]) -> None:
    """Write a result file atomically: an interrupted run leaves the last complete one."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(document, indent=2) + "\n")
    partial.replace(path)
