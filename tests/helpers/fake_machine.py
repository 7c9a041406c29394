"""A machine as the doctor might find it."""

import dataclasses
import functools
from collections.abc import Callable

import pytest

from tarflow_runtimes import doctor
from tarflow_runtimes.doctor.facts import Driver, Facts, Gpu, Library, Module, Native, Provider

__all__ = ["Driver", "Gpu", "Library", "Module", "Provider", "finding", "here"]


@functools.cache
def here() -> Facts:
    """This machine as if the native kernel had not been built."""
    return dataclasses.replace(doctor.gather(), native=Native())


def finding(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What lets the doctor find this machine with other facts: drivers, GPUs, modules, libraries."""
    return lambda **facts: monkeypatch.setattr(doctor, "gather", lambda: dataclasses.replace(here(), **facts))
