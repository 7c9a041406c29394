"""The model against stored outputs: it must not change unnoticed (written by `tests/goldens/make_model.py`)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tarflow_sdk import FlowConfig, Guidance, TarFlow, classify, decode, denoise, encode, log_prob

GOLDENS = Path(__file__).parents[1] / "goldens"

# float64 leaves room for another order of summation; float32 is compared at the project's 1e-4 and 1e-5 bounds.
TOLERANCES = {torch.float64: (1e-11, 1e-11), torch.float32: (1e-4, 1e-5)}


def read(name: str) -> tuple[TarFlow, dict[str, Tensor], Guidance]:
    with np.load(GOLDENS / f"model_{name}.npz") as file:
        arrays = dict(file)
    model = TarFlow(FlowConfig.from_json(json.loads(str(arrays.pop("config")))))
    guidance = Guidance(**json.loads(str(arrays.pop("guidance"))))
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    model.load_state_dict({k.removeprefix("weights/"): t.float() for k, t in tensors.items() if "/" in k})
    return model, tensors, guidance


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["nvp", "vp"])
def test_the_model_is_the_one_it_was(name: str, dtype: torch.dtype) -> None:
    model, stored, guidance = read(name)
    model.to(dtype)
    images, latents, labels = stored["images"].to(dtype), stored["latents"].to(dtype), stored.get("labels")
    with torch.no_grad():
        u, log_det = encode(model, images, labels)
        found = {
            "u": u,
            "log_det": log_det,
            "log_prob": log_prob(model, images, labels),
            "denoised": denoise(model, images, labels),
            "decoded": decode(model, latents, labels),
            "guided": decode(model, latents, labels, guidance),
        }
        if "log_posteriors" in stored:
            found["log_posteriors"] = classify(model, images)
    absolute, relative = TOLERANCES[dtype]
    for key, tensor in found.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(
            tensor.double(), stored[key], atol=absolute, rtol=relative, msg=lambda m, k=key: f"{k}: {m}"
        )
