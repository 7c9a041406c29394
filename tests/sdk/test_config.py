"""`FlowConfig` as JSON; its rules and those of the runtime's class are in tests/project/test_config_rules.py."""

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


@pytest.mark.parametrize("fields", [IMAGE | {"noise_std": 0.1}, TOKENS | {"classes": 2, "labels": ("left", "right")}])
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
