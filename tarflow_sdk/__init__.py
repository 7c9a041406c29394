"""TarFlow in PyTorch: a `TarFlow` model, and functions that sample, score, denoise and classify with it.

A model maps images, or tokens [N, D] such as the coordinates of N atoms, to standard normal noise and back, block by
block (`encode`, `decode`). This gives it an exact density (`log_prob`, `bits_per_dim`). `load_checkpoint` reads
checkpoints of the original code, of its descendants for molecules, and of `tarflow-train`.

>>> import torch
>>> from tarflow_sdk import decode
>>> from tarflow_sdk.testing import random_model, tiny_config
>>> model = random_model(tiny_config())
>>> images = decode(model, torch.randn(2, model.config.patches, model.config.patch_values))
>>> images.shape
torch.Size([2, 1, 8, 8])
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from tarflow_sdk._checkpoint import load_checkpoint, save_checkpoint
    from tarflow_sdk._config import FlowConfig
    from tarflow_sdk._errors import CheckpointError, ConfigError, DataError, TarFlowError
    from tarflow_sdk._inverse import Guidance, decode, inverse_block
    from tarflow_sdk._likelihood import bits_per_dim, classify, denoise, encode, log_prob
    from tarflow_sdk._model import NULL_LABEL, FlowBlock, TarFlow

__all__ = [
    "NULL_LABEL",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FlowBlock",
    "FlowConfig",
    "Guidance",
    "TarFlow",
    "TarFlowError",
    "bits_per_dim",
    "classify",
    "decode",
    "denoise",
    "encode",
    "inverse_block",
    "load_checkpoint",
    "log_prob",
    "save_checkpoint",
]

# Names are imported on first use, so that `tarflow-train --help` and `import tarflow_sdk` do not load PyTorch.
_HOMES = {
    "_checkpoint": ("load_checkpoint", "save_checkpoint"),
    "_config": ("FlowConfig",),
    "_errors": ("CheckpointError", "ConfigError", "DataError", "TarFlowError"),
    "_inverse": ("Guidance", "decode", "inverse_block"),
    "_likelihood": ("bits_per_dim", "classify", "denoise", "encode", "log_prob"),
    "_model": ("NULL_LABEL", "FlowBlock", "TarFlow"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(_importlib.import_module(f"tarflow_sdk.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tarflow_sdk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
