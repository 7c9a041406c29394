"""Tests of one engine share open flows of `ort-cpu`, the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

import tarflow_runtimes as tfr


@pytest.fixture(scope="session")
def flows(flows: Callable[..., tfr.Flow]) -> Callable[..., Any]:
    return functools.partial(flows, engine="ort-cpu")
