"""Checkpoints: flat state dicts as safetensors (ours) or `.pth` (the original code's).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tarflow_sdk._model import TarFlow


def save_safetensors(model: TarFlow, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and configuration to one `.safetensors` file, atomically."""
    path = Path(path)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"tarflow_config": json.dumps(model.config.to_json())})
    partial.replace(path)
