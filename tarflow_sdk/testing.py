"""Small models with non-trivial weights, for tests of this project and of projects that use it.

`tiny_config` and `tiny_token_config` describe models that run in milliseconds; `random_model` fills any configuration
with weights from a seed, which are the same for all versions of PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tarflow_sdk._config import FlowConfig
from tarflow_sdk._model import TarFlow

__all__ = ["random_model", "tiny_config", "tiny_token_config"]

# Standard deviation of a weight matrix times sqrt(fan in). The first and the last layer are damped: they close the
# loop patch -> (a, b) -> next patch of the inverse, which must not amplify over many patches, blocks and guidance.
_GAINS = {"proj_in": 0.4, "proj_out": 0.1}


def tiny_config(**overrides: Any) -> FlowConfig:
    """The configuration of a class model of 8x8 grey images: N = 4, D = 16, W = 64, two heads, K = 2, L = 2, 3 classes.

    `overrides` are fields of `FlowConfig`.

    Raises:
        ConfigError: when the overrides contradict each other or the rest.

    >>> tiny_config(patch_size=2, classes=0).patches
    16
    """
    fields: dict[str, Any] = {
        "image_size": 8,
        "image_channels": 1,
        "patch_size": 4,
        "width": 64,
        "blocks": 2,
        "layers": 2,
        "head_dim": 32,
        "classes": 3,
        "noise_std": 0.1,
    }
    return FlowConfig(**{**fields, **overrides})


def tiny_token_config(**overrides: Any) -> FlowConfig:
    """The configuration of a model of tokens without classes: N = 5, D = 3, W = 64, two heads, K = 2, L = 2.

    `overrides` are fields of `FlowConfig`.

    Raises:
        ConfigError: when the overrides contradict each other or the rest.

    >>> tiny_token_config(tokens=7).shape
    (7, 3)
    """
    fields: dict[str, Any] = {
        "tokens": 5,
        "token_values": 3,
        "width": 64,
        "blocks": 2,
        "layers": 2,
        "head_dim": 32,
        "noise_std": 0.1,
    }
    return FlowConfig(**{**fields, **overrides})


def random_model(config: FlowConfig, *, seed: int = 0) -> TarFlow:
    """A model with random tensors throughout: norms, biases, embeddings, and `var` if `nvp=False`.

    No two tensors are equal, and samples stay finite: |a| is about 0.1 to 0.5. Float32, on the CPU.

    >>> model = random_model(tiny_config(), seed=1)
    >>> bool((model.var == 1).all())
    True
    """
    rng = np.random.default_rng(seed)
    with torch.device("meta"):
        model = TarFlow(config)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        if name == "var":
            return torch.ones(shape) if config.nvp else (0.3 * values).exp_()
        owner, kind = name.split(".")[-2:]
        if kind == "weight" and len(shape) == 2:
            return values.mul_(_GAINS.get(owner, 1.0) / shape[1] ** 0.5)
        if kind == "weight":  # of a norm
            return values.mul_(0.1).add_(1.0)
        return values.mul_(0.3 if kind.endswith("_embed") else 0.05)

    state = {name: draw(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model
