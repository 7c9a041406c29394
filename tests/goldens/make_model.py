"""Write `model_nvp.npz` and `model_vp.npz`: weights, inputs and float64 outputs of two small models.

The weights are stored, so that no version of a random generator matters, in float16, which they fit exactly.
Run `python tests/goldens/make_model.py` only when the model itself is meant to change.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tarflow_sdk import Guidance, classify, decode, denoise, encode, log_prob
from tarflow_sdk.testing import random_model, tiny_config

CONFIGS = {
    "nvp": tiny_config(width=32, head_dim=16, layers=1, blocks=3),
    "vp": tiny_config(width=32, head_dim=16, layers=1, blocks=2, nvp=False, classes=0, image_channels=3, patch_size=2),
}
GUIDANCE: dict[str, Any] = {"weight": 1.5, "guide": "ab", "attention_temperature": 0.8, "anneal": True}


def golden(name: str) -> dict[str, np.ndarray]:
    """Everything that the test reads."""
    config = CONFIGS[name]
    model = random_model(config, seed=7)
    half = {key: tensor.half() for key, tensor in model.state_dict().items()}
    model.load_state_dict({key: tensor.float() for key, tensor in half.items()})
    model.double()
    rng = np.random.default_rng(7)
    shape = (4, config.image_channels, config.image_size, config.image_size)
    images = torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32))
    latents = torch.from_numpy(rng.standard_normal((4, config.patches, config.patch_values), dtype=np.float32))
    labels = torch.tensor([0, 2, -1, 1]) if config.classes else None
    with torch.no_grad():
        u, log_det = encode(model, images.double(), labels)
        outputs = {
            "u": u,
            "log_det": log_det,
            "log_prob": log_prob(model, images.double(), labels),
            "denoised": denoise(model, images.double(), labels),
            "decoded": decode(model, latents.double(), labels),
            "guided": decode(model, latents.double(), labels, Guidance(**GUIDANCE)),
        }
        if config.classes:
            outputs["log_posteriors"] = classify(model, images.double())
    inputs = {"images": images, "latents": latents, **({} if labels is None else {"labels": labels})}
    arrays = {**inputs, **outputs, **{f"weights/{key}": tensor for key, tensor in half.items()}}
    return {
        "config": np.array(json.dumps(config.to_json())),
        "guidance": np.array(json.dumps(GUIDANCE)),
        **{key: tensor.detach().numpy() for key, tensor in arrays.items()},
    }


if __name__ == "__main__":
    for name in CONFIGS:
        np.savez_compressed(Path(__file__).with_name(f"model_{name}.npz"), **golden(name))
