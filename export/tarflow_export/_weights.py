"""`WeightLayout`: where each tensor of a block lies in its `weights.bin`, the same for every block of a model.

The names are those of the state dict within the block, except that `class_embed` has gained a last row, the null
class, and lost its axis of length one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tarflow_sdk._config import MLP_EXPANSION, FlowConfig
from tarflow_sdk._model import FlowBlock

Dtype = Literal["float32", "float16"]
"""Of linear weights, their activations and the caches."""

WEIGHTS_FILE = "weights.bin"

ALIGNMENT = 64
"""Bytes; a cache line, so that vector loads from a mapped file are aligned. Pages would cost small models 10 %."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WeightEntry:
    """One tensor of weights.bin: where it lies (bytes) and what it is."""

    shape: tuple[int, ...]
    dtype: Dtype
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WeightLayout:
    """Every tensor of a block by name, in file order, and the file's size in bytes."""

    dtype: Dtype
    entries: Mapping[str, WeightEntry]
    nbytes: int


def block_shapes(config: FlowConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight of a block, in the state dict's order."""
    width, hidden = config.width, MLP_EXPANSION * config.width
    outputs = config.patch_values * (2 if config.nvp else 1)
    yield "pos_embed", (config.patches, width)
    if config.classes:
        yield "class_embed", (config.classes + 1, width)
    yield from _linear("proj_in", config.patch_values, width)
    for layer in range(config.layers):
        prefix = f"attn_blocks.{layer}"
        yield from _norm(f"{prefix}.attention.norm", width)
        yield from _linear(f"{prefix}.attention.qkv", width, 3 * width)
        yield from _linear(f"{prefix}.attention.proj", width, width)
        yield from _norm(f"{prefix}.mlp.norm", width)
        yield from _linear(f"{prefix}.mlp.main.0", width, hidden)
        yield from _linear(f"{prefix}.mlp.main.2", hidden, width)
    yield from _linear("proj_out", width, outputs)


def weight_layout(config: FlowConfig, dtype: Dtype) -> WeightLayout:
    """Lay the weights of one block of `config` out, each at a multiple of ALIGNMENT."""
    entries: dict[str, WeightEntry] = {}
    end = 0
    for name, shape in block_shapes(config):
        entry_dtype: Dtype = dtype if is_linear(name) else "float32"
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        nbytes = math.prod(shape) * np.dtype(entry_dtype).itemsize
        entries[name] = WeightEntry(shape=shape, dtype=entry_dtype, offset=offset, nbytes=nbytes)
        end = offset + nbytes
    return WeightLayout(dtype=dtype, entries=entries, nbytes=end)


def is_linear(name: str) -> bool:
    """Whether the tensor belongs to a linear layer; norms, embeddings and the prior stay in float32 always."""
    return name.endswith((".weight", ".bias")) and ".norm." not in name


def block_tensors(block: FlowBlock, layout: WeightLayout) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and contents of each tensor of `block`, in the layout's order and dtypes; one at a time."""
    state = block.state_dict()
    for name, entry in layout.entries.items():
        tensor: Tensor = state[name]
        if name == "class_embed":
            rows = tensor[:, 0]
            tensor = torch.cat([rows, rows.mean(dim=0, keepdim=True)])
        array = tensor.detach().to("cpu").float().contiguous().numpy()
        yield name, array.astype(entry.dtype, copy=False)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
