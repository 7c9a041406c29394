"""One error base class, so that a caller can catch everything this package raises on purpose."""

from __future__ import annotations


class TarFlowError(Exception):
    """Bad input, or a state from which the program cannot continue; `hint` says how to fix it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(TarFlowError):
    """A configuration that is incomplete or contradicts itself."""


class CheckpointError(TarFlowError):
    """A checkpoint that is missing, damaged, of another format, or does not fit its configuration."""


class DataError(TarFlowError):
    """Training data that cannot be read or does not fit the model."""
