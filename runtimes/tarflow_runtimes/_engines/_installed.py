"""`owners`: which installed distributions have written into the folder of a package; several overwrite each other."""

from __future__ import annotations

import importlib.metadata
from typing import Final

PROVIDERS: Final = {
    "onnxruntime": ("onnxruntime", "ort-"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
}
"""Packages that several distributions provide, and how the names of these begin."""


def owners(package: str) -> list[str]:
    """Installed distributions that own files of one of the PROVIDERS, as `name version`, sorted."""
    found = set()
    for distribution in importlib.metadata.distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if not name.startswith(PROVIDERS[package]):
            continue
        if any(file.parts[:2] == (package, "__init__.py") for file in distribution.files or ()):
            found.add(f"{name} {distribution.version}")
    return sorted(found)
