"""One error base class, so that a caller can catch everything this package raises on purpose."""

from __future__ import annotations


class TarFlowError(Exception):
    """Bad input or a state that cannot go on; `hint` says how to mend it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class BundleError(TarFlowError):
    """A bundle that is missing, damaged, unsafe or of a version this package does not read."""


class EngineError(TarFlowError):
    """An engine that is unknown, not installed, closed, or that cannot run this bundle."""


class InputError(TarFlowError):
    """An argument that is out of range, of the wrong shape or dtype, or contradicts another."""


class Cancelled(TarFlowError):  # noqa: N818 - a request, not a fault
    """The progress callback asked to stop; the object that was running stays usable."""


class VerificationError(TarFlowError):
    """A comparison with the reference outputs that misses its tolerance."""


class DecodeWarning(UserWarning):
    """A block that went on sequentially, or images that hold values which are not finite."""
