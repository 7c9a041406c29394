"""Every example of a docstring runs, and says what it says; those of the runtime on the model that ships."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import tarflow_export
import tarflow_runtimes
import tarflow_sdk
from tarflow_runtimes import Flow

FILES = [
    file.relative_to(Path(package.__file__).parents[1])
    for package in (tarflow_sdk, tarflow_export, tarflow_runtimes)
    for file in sorted(Path(package.__file__).parent.rglob("*.py"))
    if ">>>" in file.read_text("utf-8")
]
MODULES = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in FILES]

METHODS = [name for name, value in vars(Flow).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"close", "identity", "tuned_plans"}))
def test_every_method_of_a_flow_shows_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(getattr(Flow, name)) or "")
