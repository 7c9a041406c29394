"""Errors of the exporter; a missed tolerance raises `tarflow_runtimes.VerificationError`."""

from __future__ import annotations

from tarflow_sdk import TarFlowError


class ExportError(TarFlowError):
    """An export that cannot start or finish: a target that may not be written, options that do not fit."""
