"""Convert a PyTorch model to the configuration and weights of a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tarflow_export._weights import Floats
from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_sdk import FlowConfig, TarFlow


def bundle_config(config: FlowConfig) -> ModelConfig:
    """The model's configuration as that of a bundle: the same fields."""
    fields: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**fields)


def weights_of(model: TarFlow) -> Callable[[int, str], Floats]:
    """The float32 tensors of a model by block and name; `class_embed` gains a last row, the null class."""
    states = [block.state_dict() for block in model.flow_blocks]

    def weight(block: int, name: str) -> Floats:
        tensor = states[block][name].detach().to("cpu").float()
        if name == "class_embed":
            rows = tensor[:, 0]
            tensor = torch.cat([rows, rows.mean(dim=0, keepdim=True)])
        array: Floats = tensor.contiguous().numpy()
        return array

    return weight
