"""`--decode`, `--tolerance`, `--window`, `--plans`: convert options to the plan of a run; show warnings on stderr."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarflow_runtimes.cli.shell import note
from tarflow_runtimes.errors import DecodeWarning, InputError

if TYPE_CHECKING:
    from tarflow_runtimes.model.flow import Flow

MODES = ("sequential", "parallel", "auto")


def check_decode(decode: str, tolerance: float | None, window: int | None, plans: Path | None) -> None:
    """Refuse options that are out of range or contradict each other.

    Raises:
        InputError: for the first problem found.
    """
    if decode not in MODES:
        raise InputError(f"--decode must be one of {', '.join(MODES)}, got {decode!r}", hint="sequential is exact")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0.0):
        raise InputError(f"--tolerance must be finite and not negative, got {tolerance}", hint="0.00001 is the default")
    if tolerance is not None and decode == "sequential":
        raise InputError("--tolerance only applies to parallel decoding", hint="add --decode parallel or --decode auto")
    if window is not None and decode != "parallel":
        raise InputError("--window only applies to parallel decoding", hint="add --decode parallel")
    if plans is not None and decode != "auto":
        raise InputError("--plans only applies to --decode auto", hint="add --decode auto")
    if plans is not None and not plans.is_file():
        raise InputError(f"--plans {plans}: no such file", hint="tarflow tune -o FILE makes one")
    if window is not None and window < 1:
        raise InputError(f"--window must be at least 1, got {window}", hint="leave it out for the whole block")


def plan_of(flow: Flow, decode: str, tolerance: float | None, window: int | None, file: Path | None) -> Any:
    """The `plan` argument of `Flow.sample` and `Flow.decode`; reports on stderr when auto has no tuned plan."""
    from tarflow_runtimes.decode.plan import DEFAULT_TOLERANCE, Parallel

    if decode == "sequential":
        return None
    if decode == "parallel":
        return Parallel(window=window or 0, tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance)
    plans = flow.tuned_plans(file)
    if not plans.entries:
        note(f"--decode auto is sequential: {plans.reason}")
    return plans if tolerance is None else plans.with_tolerance(tolerance)


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """Print the library's warnings about decoding as lines on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DecodeWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, DecodeWarning):
            note(f"warning: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
