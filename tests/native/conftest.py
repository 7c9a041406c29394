"""The library, built in build/native of the repository; bundles of tiny models; jobs for runner.cpp and runner.mjs."""

from __future__ import annotations

import dataclasses
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tarflow_runtimes as tfr
from rooms import Bundle, Conditions, Turn, open_bundle
from tarflow_export import convert_bundle, export_bundle
from tarflow_runtimes.engines.native.library import Block, Library  # what is tested
from tarflow_sdk import FlowConfig, TarFlow
from tarflow_sdk.testing import random_model, tiny_config, tiny_token_config

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "runtimes" / "native"
BUILD = ROOT / "build" / "native"
DIGITS = ROOT / "examples" / "01_train_mnist" / "mnist_model_4_128_4_4_0.10.safetensors"
sys.path.insert(0, str(NATIVE))

from bench.native_step import forward_blocks, invert_blocks  # noqa: E402
from native_build import build, compiler  # noqa: E402

CONFIGS: dict[str, FlowConfig] = {
    "class": tiny_config(labels=("cat", "dog", "wild")),
    "n16": tiny_config(patch_size=2),
    "n64": tiny_config(patch_size=1, layers=1),
    "unconditional": tiny_config(classes=0, patch_size=2),
    "three_blocks": tiny_config(blocks=3, layers=1, image_channels=3),
    "no_nvp": tiny_config(nvp=False, image_channels=2),
    "no_nvp_unconditional": tiny_config(nvp=False, classes=0, noise="uniform", noise_std=None),
    "one_head": tiny_config(blocks=1, head_dim=64),
    "heads_of_16": tiny_config(patch_size=2, head_dim=16),
    "heads_of_8": tiny_config(patch_size=2, width=72, head_dim=8),
    "heads_of_5": tiny_config(patch_size=2, width=35, head_dim=5),
    "heads_of_80": tiny_config(width=160, head_dim=80),
    "width_96": tiny_config(width=96),
    "tokens": tiny_token_config(),
    "two_tokens": tiny_token_config(tokens=2, token_values=1),
    "odd_tokens": tiny_token_config(tokens=37, token_values=17, width=33, head_dim=11, layers=3),
}
"""Widths that are no multiple of 32, head sizes that are no multiple of 16, and the usual ones."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A bundle with everything that computes both directions; `precise` is the model of its weights in float64."""

    bundle: Bundle
    blocks: list[Block]
    precise: TarFlow
    library: Library

    @property
    def config(self) -> Any:
        return self.bundle.config

    def noise(self, batch: int, seed: int = 0) -> np.ndarray[Any, Any]:
        shape = (batch, self.config.patches, self.config.patch_values)
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)

    def conditions(self, batch: int, kind: str, seed: int = 0) -> Conditions:
        """`plain`: one branch. `guided`: two, each image with its own label, guidance of a and b, and temperature."""
        rng, branches = np.random.default_rng(seed), 1 if kind == "plain" else 2
        labels = None
        if self.config.classes:
            own = rng.integers(0, self.config.classes + 1, batch)
            labels = np.stack([own, np.full(batch, self.config.classes)])[:branches]
        guidance = rng.uniform(0, 2, (batch, 2, self.config.patches)).astype(np.float32)
        guidance[batch // 2 :: 3] = 0.0
        inverse_temperature = np.ones((branches, batch), np.float32)
        if branches == 2:
            inverse_temperature[1] = rng.uniform(0.5, 1.5, batch)
        return Conditions(labels=labels, guidance=guidance, inverse_temperature=inverse_temperature)

    def native(self, noise: np.ndarray[Any, Any], conditions: Conditions, **options: Any) -> np.ndarray[Any, Any]:
        return invert_blocks(self.library, self.blocks, self.bundle, noise, conditions, **options)

    def ort(self, noise: np.ndarray[Any, Any], conditions: Conditions) -> np.ndarray[Any, Any]:
        turns = [Turn(block=block, strategy=tfr.Sequential()) for block in reversed(range(self.config.blocks))]
        with tfr.load(self.bundle.path, engine="ort-cpu") as flow:
            return flow.engine.invert(turns, noise, conditions)[0]

    def patches(self, batch: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """Patches [B, N, D] and labels [B] of all classes and the null class."""
        labels = self.conditions(batch, "plain", seed).labels
        return self.noise(batch, seed), None if labels is None else labels[0]

    def forward(self, patches: Any, labels: Any, **options: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Z and log|det| of all blocks."""
        return forward_blocks(self.library, self.blocks, self.bundle, patches, labels, **options)

    def ort_forward(self, patches: Any, labels: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        x, log_det = patches, np.zeros(len(patches))
        with tfr.load(self.bundle.path, engine="ort-cpu") as flow:
            for block in range(self.config.blocks):
                x, own = flow.engine.forward(block, x, labels)
                log_det += own
        return x, log_det

    @torch.no_grad()
    def exact_forward(self, patches: Any, labels: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """In float64."""
        numbers = None if labels is None else torch.from_numpy(np.where(labels == self.config.classes, -1, labels))
        x, log_det = torch.from_numpy(patches).double(), 0.0
        for block in self.precise.flow_blocks:
            x, own = block(x, numbers)
            log_det = log_det + own
        return x.numpy(), log_det.numpy()

    @torch.no_grad()
    def exact(self, noise: np.ndarray[Any, Any], conditions: Conditions) -> np.ndarray[Any, Any]:
        """In float64, by the definition: each step runs the whole model over the patches that are finished."""
        x = torch.from_numpy(noise).double()
        tau = torch.from_numpy(conditions.inverse_temperature).double()
        guidance = torch.from_numpy(conditions.guidance).double()
        for block in reversed(self.precise.flow_blocks):
            x = _exact_block(block, x, conditions.labels, guidance, tau)
        return x.numpy()


def _exact_block(block: Any, z: Any, labels: Any, guidance: Any, inverse_temperature: Any) -> Any:
    """Inverse of one block in float64 by `tarflow_sdk._inverse.step`, with guidance and temperature of each image."""
    from tarflow_sdk._inverse import empty_caches, step  # the public decode guides all images alike

    z = block.in_order(z)
    branches, (batch, patches, _) = len(inverse_temperature), z.shape
    class_rows = None
    if labels is not None:
        table = block.class_embed.reshape(-1, block.class_embed.shape[-1])
        rows = torch.cat([table, table.mean(0, keepdim=True)])
        class_rows = rows[torch.from_numpy(labels.reshape(-1))][:, None]
    caches = empty_caches(block, branches * batch, patches, z)
    x = [z[:, :1]]
    for i in range(patches - 1):
        a, b, caches = step(
            block,
            x[-1].repeat(branches, 1, 1),
            i,
            class_rows=class_rows,
            temperature=1 / inverse_temperature.reshape(-1),
            caches=caches,
        )
        g_a, g_b = guidance[:, 0, i, None, None], guidance[:, 1, i, None, None]
        a = a[:batch] + g_a * (a[:batch] - a[-batch:])
        b = b[:batch] + g_b * (b[:batch] - b[-batch:])
        x.append(z[:, i + 1 : i + 2] * torch.exp(a) + b)
    return block.in_order(torch.cat(x, dim=1))


def _tensor(bundle: Bundle, block: int, name: str) -> torch.Tensor:
    """A tensor of the model as float64, whatever the bundle keeps it in."""
    if name in bundle.tensors:
        array = bundle.tensor(block, name)
        if bundle.tensors[name].dtype == "bfloat16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return torch.from_numpy(array.astype(np.float64))
    integers, scale = bundle.tensor(block, f"{name}.int8"), bundle.tensor(block, f"{name}.scale")
    columns = bundle.config.width * (4 if "main.2" in name else 1)
    whole = (integers.astype(np.float64) - 128) * scale[:, :, None].astype(np.float64)
    return torch.from_numpy(whole.reshape(len(whole), -1)[:, :columns])


def _precise(bundle: Bundle, config: FlowConfig) -> TarFlow:
    model = TarFlow(config).double()
    state = {}
    for key, old in model.state_dict().items():
        if key == "var":
            state[key] = old
            continue
        _, block, name = key.split(".", 2)
        tensor = _tensor(bundle, int(block), name)
        state[key] = (tensor[:-1] if name == "class_embed" else tensor).reshape(old.shape)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="session")
def cxx() -> str:
    found = compiler()
    if found is None:
        pytest.skip("no C++ compiler: install g++ or clang++, or set CXX")
    return found


@pytest.fixture(scope="session")
def library(cxx: str) -> Library:
    return Library(build(BUILD, cxx=cxx))


@pytest.fixture(scope="session")
def models(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """`models(name, precision)`: a model of CONFIGS, or `digits`, the checkpoint that comes with the package."""
    made: dict[tuple[str, str], Model] = {}
    folder = tmp_path_factory.mktemp("bundles")

    def path_of(name: str, precision: str) -> Path:
        path = folder / f"{name}-{precision}.tarflow"
        if precision == "float32":
            if not path.exists():
                source = DIGITS if name == "digits" else random_model(CONFIGS[name], seed=list(CONFIGS).index(name))
                export_bundle(source, path, verify=False)
        elif not path.exists():
            convert_bundle(path_of(name, "float32"), path, precision=precision, verify=False)
        return path

    def get(name: str, precision: str = "float32") -> Model:
        if (name, precision) not in made:
            bundle = open_bundle(path_of(name, precision))
            own = bundle.config
            config = CONFIGS.get(name) or FlowConfig(
                image_size=own.image_size, image_channels=own.image_channels, patch_size=own.patch_size,
                width=own.width, blocks=own.blocks, layers=own.layers, head_dim=own.head_dim, classes=own.classes,
            )  # fmt: skip
            blocks = [library.pack(bundle, block) for block in range(own.blocks)]
            made[name, precision] = Model(bundle, blocks, _precise(bundle, config), library)
        return made[name, precision]

    return get


def write_job(path: Path, model: Model, block: int, noise: np.ndarray[Any, Any], conditions: Conditions) -> None:
    """One block's inverse as a file: int64 numbers; texts and arrays as their bytes after the count of these."""
    config, bundle = model.config, model.bundle

    def sized(data: bytes) -> bytes:
        return struct.pack("<q", len(data)) + data

    def array(values: Any, dtype: str) -> bytes:
        return sized(b"" if values is None else np.ascontiguousarray(values, dtype).tobytes())

    sizes = (config.patches, config.patch_values, config.width, config.layers, config.head_dim)
    counts = (len(noise), conditions.branches, config.patches - 1, len(bundle.tensors))
    parts = [struct.pack("<11q", *sizes, config.classes, config.nvp, *counts), sized(bundle.precision.encode())]
    for name, tensor in bundle.tensors.items():
        parts += [sized(name.encode()), sized(tensor.dtype.encode()), array(tensor.shape, "<i8")]
        parts.append(struct.pack("<q", tensor.offset))
    parts += [
        sized(bundle.blocks[block].weights.read_bytes()),
        array(noise, "<f4"),
        array(conditions.labels, "<i8"),
        array(conditions.guidance, "<f4"),
        array(conditions.inverse_temperature, "<f4"),
    ]
    path.write_bytes(b"".join(parts))


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """`job(model, block, noise, conditions)`: a file for a runner."""

    def write(model: Model, block: int, noise: np.ndarray[Any, Any], conditions: Conditions) -> Path:
        path = tmp_path / "job"
        write_job(path, model, block, noise, conditions)
        return path

    return write


def command(*names: str, why: str) -> str:
    """The first of these programs that is there, or a skip that says what is missing."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"{names[0]} is missing: {why}")
    return found


def run(*words: str | Path) -> str:
    """Run a program; its output, or a failure that shows what it wrote."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tools() -> Any:
    """`command` and `run`, for the tests."""
    return command, run
