"""Options that take a list, such as `--batch 1,16`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from tarflow_runtimes.errors import InputError

T = TypeVar("T", int, float, str)


def items(option: str, text: str, read: Callable[[str], T]) -> list[T]:
    """The items of a comma-separated list, without duplicates.

    Raises:
        InputError: when one is empty, or `read` raises ValueError for it.
    """
    found = []
    for item in text.split(","):
        try:
            found.append(read(item.strip()))
        except ValueError as error:
            raise InputError(
                f"{option} {text}: {error}", hint=f"numbers separated by commas, as {option} 1,16"
            ) from None
        if not item.strip():
            raise InputError(f"{option} {text!r}: an item is empty", hint="separate items by commas")
    return list(dict.fromkeys(found))


def count(text: str) -> int:
    """Parse a number of images or patches."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def weight(text: str) -> float:
    """Parse a guidance weight."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0.0:
        raise ValueError(f"{text!r} is not a guidance weight (a finite number, not negative)")
    return value


def size(text: str) -> int:
    """Parse a number of bytes: 20G, 512M, 1000."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, shift = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 0)
    if not number.isdecimal():
        raise ValueError(f"{text!r} is not a size such as 20G or 512M")
    return int(number) << shift
