"""One error base class, so that a caller can catch everything this package raises on purpose."""

from __future__ import annotations


class TarFlowError(Exception):
    """Bad input or a state that cannot go on; `hint` says how to mend it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(TarFlowError):
    """A configuration whose fields contradict each other or lack something."""


class CheckpointError(TarFlowError):
    """A checkpoint that is missing, damaged, foreign or does not fit its configuration."""


class DataError(TarFlowError):
    """Training data that cannot be read or does not fit the model."""
