"""The two configuration classes, of the training core and of the runtime, by one table: neither imports the other."""

import dataclasses
from typing import Any

import pytest

from tarflow_runtimes import InputError, ModelConfig
from tarflow_sdk import ConfigError, FlowConfig

COMMON: dict[str, Any] = {
    "width": 128, "blocks": 4, "layers": 4, "head_dim": 64, "classes": 0, "nvp": True, "noise": "gaussian",
    "noise_std": None, "labels": None,
}  # fmt: skip
IMAGE = {"image_size": 28, "image_channels": 1, "patch_size": 4}
TOKENS = {"tokens": 33, "token_values": 3}

GOOD: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    # the fields and what follows: data, shape, N, D, dims, heads
    "digits": (IMAGE | {"noise_std": 0.1}, ("image", (1, 28, 28), 49, 16, 784, 2)),
    "rgb": (IMAGE | {"image_channels": 3}, ("image", (3, 28, 28), 49, 48, 2352, 2)),
    "uniform": (IMAGE | {"noise": "uniform"}, ("image", (1, 28, 28), 49, 16, 784, 2)),
    "four patches": (IMAGE | {"patch_size": 14, "head_dim": 32}, ("image", (1, 28, 28), 4, 196, 784, 4)),
    "molecule": (TOKENS, ("tokens", (33, 3), 33, 3, 99, 2)),
    "two numbers": (
        {"tokens": 2, "token_values": 1, "head_dim": 128, "noise_std": 0.25},
        ("tokens", (2, 1), 2, 1, 2, 1),
    ),
    "tokens with classes": (
        TOKENS | {"classes": 2, "labels": ("left", "right"), "nvp": False},
        ("tokens", (33, 3), 33, 3, 99, 2),
    ),
    "as large as can be": (
        {"tokens": 1 << 15, "token_values": 1 << 16, "width": 1 << 14, "blocks": 1, "layers": 1},
        ("tokens", (1 << 15, 1 << 16), 1 << 15, 1 << 16, 1 << 31, 256),
    ),
}

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
    "width": (TOKENS | {"width": "128"}, "width must be an integer >= 1, got '128'"),
    "no blocks": (TOKENS | {"blocks": 0}, "blocks must be an integer >= 1, got 0"),
    "no layers": (TOKENS | {"layers": None}, "layers must be an integer >= 1, got None"),
    "classes": (TOKENS | {"classes": -1}, "classes must be an integer >= 0, got -1"),
    "heads": (TOKENS | {"head_dim": 48}, "width 128 is not a multiple of head_dim 48"),
    "nvp": (TOKENS | {"nvp": 1}, "nvp must be true or false, got 1"),
    "model too large": (TOKENS | {"tokens": 1 << 20}, "the model is too large"),
    "image too large": (TOKENS | {"tokens": 2, "token_values": (1 << 30) + 1}, "the data are too large"),
    "noise": (TOKENS | {"noise": "salt"}, "noise must be 'gaussian' or 'uniform', got 'salt'"),
    "uniform tokens": (TOKENS | {"noise": "uniform"}, "uniform noise dequantises 8-bit images"),
    "uniform sigma": (IMAGE | {"noise": "uniform", "noise_std": 0.1}, "noise_std has no meaning"),
    "sigma": (TOKENS | {"noise_std": 0.0}, "noise_std must be a number in (0, 10), got 0.0"),
    "sigma not a number": (TOKENS | {"noise_std": float("nan")}, "noise_std must be a number in (0, 10), got nan"),
    "true sigma": (TOKENS | {"noise_std": True}, "noise_std must be a number in (0, 10), got True"),
    "labels": (TOKENS | {"labels": ("a",)}, "1 label names for 0 classes"),
    "labels of no kind": (TOKENS | {"classes": 2, "labels": ("a", 1)}, "label names must be a tuple of non-empty"),
    "empty label": (TOKENS | {"classes": 2, "labels": ("a", "")}, "label names must be a tuple of non-empty"),
    "same labels": (TOKENS | {"classes": 2, "labels": ("a", "a")}, "label names are not unique"),
}


@pytest.mark.parametrize("kind", [FlowConfig, ModelConfig])
@pytest.mark.parametrize(("fields", "expected"), GOOD.values(), ids=GOOD)
def test_what_follows_from_the_fields(kind: Any, fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    config = kind(**COMMON | fields)
    found = (config.data, config.shape, config.patches, config.patch_values, config.dims, config.heads)
    assert found == expected


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_what_is_refused_in_the_same_words(fields: dict[str, Any], message: str) -> None:
    said = set()
    for kind, error in ((FlowConfig, ConfigError), (ModelConfig, InputError)):
        with pytest.raises(error) as caught:
            kind(**COMMON | fields)
        assert message in str(caught.value)
        said.add(str(caught.value))
    assert len(said) == 1


def test_the_fields_are_the_same() -> None:
    assert [field.name for field in dataclasses.fields(FlowConfig)] == [
        field.name for field in dataclasses.fields(ModelConfig)
    ]


def test_the_literature_s_name() -> None:
    for fields, name in [
        (IMAGE | {"noise_std": 0.1}, "4-128-4-4-0.10"),
        (IMAGE, "4-128-4-4-0.00"),
        (IMAGE | {"noise": "uniform"}, "4-128-4-4-uniform"),
        (TOKENS, "33x3-128-4-4-0.00"),
    ]:
        assert FlowConfig(**COMMON | fields).name == name
