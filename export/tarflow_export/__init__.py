"""Verified bundles of ONNX graphs: `export_bundle` makes one from a checkpoint, `convert_bundle` changes its precision.

The bundle is specified in docs/BUNDLE.md; `tarflow_runtimes` runs it without PyTorch.

>>> import tempfile
>>> from tarflow_export import export_bundle
>>> from tarflow_sdk.testing import random_model, tiny_config
>>> with tempfile.TemporaryDirectory() as folder:
...     report = export_bundle(random_model(tiny_config()), f"{folder}/tiny.tarflow")
>>> report.verification["status"]
'passed'
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from tarflow_export._convert import convert_bundle
    from tarflow_export._errors import ExportError
    from tarflow_export._export import export_bundle
    from tarflow_export._report import ExportReport

__all__ = ["ExportError", "ExportReport", "convert_bundle", "export_bundle"]

# Names are imported on first use, so that `tarflow-export --help` does not load PyTorch.
_HOMES = {
    "_convert": ("convert_bundle",),
    "_errors": ("ExportError",),
    "_export": ("export_bundle",),
    "_report": ("ExportReport",),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(_importlib.import_module(f"tarflow_export.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tarflow_export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
