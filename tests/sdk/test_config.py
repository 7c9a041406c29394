"""`FlowConfig`: which fields make a model, what follows from them, and what is refused in which words."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tarflow_sdk import ConfigError, FlowConfig
from tarflow_sdk.testing import tiny_config, tiny_token_config

LAYERS = {"width": 128, "blocks": 4, "layers": 4}
IMAGE = {"image_size": 28, "image_channels": 1, "patch_size": 4}
TOKENS = {"tokens": 33, "token_values": 3}

GOOD: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    # the fields and what follows: data, shape, N, D, dims, heads and the name
    "digits": (IMAGE | {"noise_std": 0.1}, ("image", (1, 28, 28), 49, 16, 784, 2, "4-128-4-4-0.10")),
    "rgb": (IMAGE | {"image_channels": 3}, ("image", (3, 28, 28), 49, 48, 2352, 2, "4-128-4-4-0.00")),
    "uniform": (IMAGE | {"noise": "uniform"}, ("image", (1, 28, 28), 49, 16, 784, 2, "4-128-4-4-uniform")),
    "molecule": (TOKENS, ("tokens", (33, 3), 33, 3, 99, 2, "33x3-128-4-4-0.00")),
    "two numbers": (
        {"tokens": 2, "token_values": 1, "head_dim": 128, "noise_std": 0.25},
        ("tokens", (2, 1), 2, 1, 2, 1, "2x1-128-4-4-0.25"),
    ),
    "tokens with classes": (
        TOKENS | {"classes": 2, "labels": ("left", "right"), "nvp": False},
        ("tokens", (33, 3), 33, 3, 99, 2, "33x3-128-4-4-0.00"),
    ),
}


@pytest.mark.parametrize(("fields", "expected"), GOOD.values(), ids=GOOD)
def test_what_follows_from_the_fields(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    config = FlowConfig(**LAYERS, **fields)
    found = (
        config.data, config.shape, config.patches, config.patch_values, config.dims, config.heads, config.name,
    )  # fmt: skip
    assert found == expected


@pytest.mark.parametrize("fields", [fields for fields, _ in GOOD.values()], ids=GOOD)
def test_json_is_flat_and_comes_back(fields: dict[str, Any], tmp_path: Path) -> None:
    config = FlowConfig(**LAYERS, **fields)
    data = config.to_json()
    assert data["schema_version"] == 1
    for name in IMAGE.keys() | TOKENS.keys():
        assert data[name] == fields.get(name)
    assert FlowConfig.from_json(json.loads(json.dumps(data))) == config
    assert FlowConfig.from_json({name: value for name, value in data.items() if value is not None}) == config
    config.to_file(tmp_path / "config.json")
    assert FlowConfig.from_file(tmp_path / "config.json") == config


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({}, "does not say what the data are"),
    "both": (IMAGE | TOKENS, "images or tokens, not both: got image_size, image_channels, patch_size, tokens, token_v"),
    "both, in part": ({"image_channels": 3, "tokens": 33}, "images or tokens, not both: got image_channels, tokens"),
    "image in part": ({"image_size": 8, "patch_size": 4}, "incomplete: image_size, patch_size without image_channels"),
    "tokens in part": ({"tokens": 33}, "incomplete: tokens without token_values"),
    "values in part": ({"token_values": 3}, "incomplete: token_values without tokens"),
    "no tokens": (TOKENS | {"tokens": 0}, "tokens must be an integer >= 1, got 0"),
    "one token": (TOKENS | {"tokens": 1}, "tokens must be an integer >= 2, got 1"),
    "half a token": (TOKENS | {"tokens": 1.5}, "tokens must be an integer >= 1, got 1.5"),
    "true token": (TOKENS | {"tokens": True}, "tokens must be an integer >= 1, got True"),
    "no values": (TOKENS | {"token_values": 0}, "token_values must be an integer >= 1, got 0"),
    "one patch": (IMAGE | {"patch_size": 28}, "patch_size 28 leaves one patch of a 28 pixel image"),
    "patch size": (IMAGE | {"patch_size": 3}, "image_size 28 is not a multiple of patch_size 3"),
    "no patch": (IMAGE | {"patch_size": 0}, "patch_size must be an integer >= 1, got 0"),
    "heads": (TOKENS | {"head_dim": 48}, "width 128 is not a multiple of head_dim 48"),
    "uniform tokens": (TOKENS | {"noise": "uniform"}, "uniform noise dequantises 8-bit images"),
    "sigma": (TOKENS | {"noise_std": 0.0}, r"noise_std must be a number in \(0, 10\)"),
    "labels": (TOKENS | {"labels": ("a",)}, "1 label names for 0 classes"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowConfig(**LAYERS, **fields)


@pytest.mark.parametrize("fields", [{}, IMAGE | TOKENS, {"tokens": 33}])
def test_the_hint_lists_both_kinds(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        FlowConfig(**LAYERS, **fields)
    assert caught.value.hint == "give image_size, image_channels, patch_size (image) or tokens, token_values (tokens)"


def test_json_that_does_not_fit() -> None:
    data = tiny_token_config().to_json()
    for change, message in [
        ({"schema_version": 2}, "schema_version 2, this version reads 1"),
        ({"colour": "red"}, "unknown fields: colour"),
        ({"image_size": 8}, "not both"),
        ({"tokens": None}, "incomplete"),
    ]:
        with pytest.raises(ConfigError, match=message):
            FlowConfig.from_json(data | change)
    del data["width"]
    with pytest.raises(ConfigError, match=r"incomplete: .*width"):
        FlowConfig.from_json(data)


def test_tiny_configs_take_overrides() -> None:
    assert tiny_token_config(tokens=7, classes=3).shape == (7, 3)
    with pytest.raises(ConfigError, match="not both"):
        tiny_config(tokens=7)


def test_the_configuration_does_not_load_torch() -> None:
    code = "import sys; from tarflow_sdk import FlowConfig; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
