"""One error base class, so that a caller can catch everything this package raises on purpose."""

from __future__ import annotations


class TarFlowError(Exception):
    """Bad input, or a state from which the program cannot continue; `hint` says how to fix it."""

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
    """The progress callback cancelled the call; the object stays usable."""


class VerificationError(TarFlowError):
    """A comparison with the reference outputs that misses its tolerance."""


class DecodeWarning(UserWarning):
    """A block was decoded sequentially instead of in parallel, or images have values that are not finite."""
