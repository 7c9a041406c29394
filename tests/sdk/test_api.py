"""The public face of the package: names, documentation, and what importing it costs."""

import inspect
import pkgutil
from types import ModuleType

import pytest

import command_line
import tarflow_sdk
import tarflow_sdk.testing

MODULES = [f"tarflow_sdk.{module.name}" for module in pkgutil.iter_modules(tarflow_sdk.__path__)]


def test_public_names_are_exactly_all() -> None:
    expected = {
        "FlowConfig", "TarFlow", "FlowBlock", "Guidance", "decode", "inverse_block", "encode", "log_prob",
        "bits_per_dim", "denoise", "classify", "load_checkpoint", "save_checkpoint", "NULL_LABEL", "TarFlowError",
        "ConfigError", "CheckpointError", "DataError",
    }  # fmt: skip
    assert set(tarflow_sdk.__all__) == expected
    for name in expected:
        getattr(tarflow_sdk, name)
    public = {name for name, value in vars(tarflow_sdk).items() if not name.startswith("_")}
    assert {name for name in public if not isinstance(getattr(tarflow_sdk, name), ModuleType)} == expected
    assert expected <= set(dir(tarflow_sdk))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tarflow_sdk.nothing


def test_implementation_files_are_private() -> None:
    assert [name for name in MODULES if not name.startswith("tarflow_sdk._")] == ["tarflow_sdk.testing"]
    assert set(tarflow_sdk.testing.__all__) == {"random_model", "tiny_config", "tiny_token_config"}


@pytest.mark.parametrize("name", [n for n in tarflow_sdk.__all__ if n != "NULL_LABEL"])
def test_public_names_are_documented(name: str) -> None:
    value = getattr(tarflow_sdk, name)
    text = inspect.getdoc(value) or ""
    assert text.splitlines()[0].endswith((".", ":"))
    if not name.endswith("Error"):
        assert ">>>" in text, f"{name} shows no example"


def test_help_and_import_do_not_load_torch() -> None:
    loaded = command_line.loaded_by("tarflow-train", "--help")
    assert "tarflow_sdk" in loaded
    assert not {"torch", "numpy"} & loaded
