"""Checks of what callers pass: labels, numbers and arrays become what the sampler needs, or one clear error."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._engine import Floats, Integers
from tarflow_runtimes._errors import InputError
from tarflow_runtimes._sampler import Guidance

NULL: Final = -1
"""The null class in a list of labels; None is another way to write it."""

NAMES_SHOWN: Final = 20

Label = int | str | None


def integer(name: str, value: object, *, minimum: int = 0, below: int | None = None) -> int:
    """`value` as an int in [minimum, below)."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # any object may come in; this is the check
    except TypeError:
        raise InputError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool | np.bool_) or number < minimum or (below is not None and number >= below):
        upper = "" if below is None else f" and below 2^{below.bit_length() - 1}"
        raise InputError(f"{name} must be an integer of at least {minimum}{upper}, got {value!r}")
    return number


def real(name: str, value: object, *, positive: bool = False) -> float:
    """`value` as a finite float >= 0, or > 0 when `positive`."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number) or number < 0.0 or (positive and number == 0.0):
        raise InputError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value!r}")
    return number


def class_numbers(labels: Sequence[Label] | npt.NDArray[Any] | None, n: int, config: ModelConfig) -> Integers | None:
    """Labels of n images -> int64 [n], the null class written as `classes`; None for models without classes.

    A label is a class number, a name where the bundle has names, or -1 or None for the null class; `labels=None` is
    the null class for every image.

    Raises:
        InputError: on a model without classes, a wrong number of labels, or one that the model does not have.
    """
    if labels is None:
        return np.full(n, config.classes, np.int64) if config.classes else None
    if not config.classes:
        raise InputError("labels were given, but the model has no classes", hint="leave labels out")
    if isinstance(labels, str | bytes) or not hasattr(labels, "__len__"):
        raise InputError(
            f"labels must be a list with one label per image, got {labels!r}", hint=f"labels=[{labels!r}] * n"
        )
    given = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if len(given) != n:
        raise InputError(f"{len(given)} labels for {n} images", hint="give one label per image")
    return np.array([_class_number(label, config) for label in given], np.int64)


def _class_number(label: object, config: ModelConfig) -> int:
    if label is None:
        return config.classes
    if isinstance(label, str):
        if config.labels is None:
            raise InputError(
                f"label {label!r}: the bundle has no label names", hint=f"use class numbers 0 to {config.classes - 1}"
            )
        if label not in config.labels:
            more = ", ..." if len(config.labels) > NAMES_SHOWN else ""
            raise InputError(
                f"unknown label {label!r}", hint=f"valid are {', '.join(config.labels[:NAMES_SHOWN])}{more}"
            )
        return config.labels.index(label)
    try:
        number = operator.index(label)  # type: ignore[arg-type]
    except TypeError:
        number = -2
    if isinstance(label, bool) or not NULL <= number < config.classes:
        raise InputError(
            f"label {label!r} is not a class of the model",
            hint=f"valid are 0 to {config.classes - 1}, and -1 or None for the null class",
        )
    return config.classes if number == NULL else number


def float_array(name: str, value: object, shape: Sequence[int | str]) -> Floats:
    """`value` as a finite float32 array; letters in `shape` are axes of any length >= 1.

    Raises:
        InputError: on another type, dtype or shape, or a value that is not finite.
    """
    if not isinstance(value, np.ndarray):
        raise InputError(f"{name} must be a float32 NumPy array, got {type(value).__name__}")
    if value.dtype != np.float32:
        raise InputError(f"{name} must be float32, got {value.dtype}", hint=f"{name}.astype(numpy.float32)")
    fits = value.ndim == len(shape) and all(
        length >= 1 if isinstance(size, str) else length == size
        for length, size in zip(value.shape, shape, strict=False)
    )
    if not fits:
        raise InputError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(value.shape)}")
    if not np.isfinite(value).all():
        raise InputError(f"{name} holds values that are not finite")
    return value


def guidance_of(
    weight: object, guide: object, temperature: object, anneal: object, *, labels: Integers | None, config: ModelConfig
) -> Guidance:
    """The guidance that the arguments describe.

    Raises:
        InputError: on a value out of range, or on guidance between two branches that are the same.
    """
    w = real("guidance", weight)
    tau = real("attention_temperature", temperature, positive=True)
    if guide not in ("a", "b", "ab"):
        raise InputError(f"guide must be 'a', 'b' or 'ab', got {guide!r}")
    same = labels is None or bool(np.all(labels == config.classes))
    if w > 0.0 and tau == 1.0 and same:
        what = "every label is the null class" if config.classes else "the model has no classes"
        hint = "set attention_temperature to another value than 1" + (", or give labels" if config.classes else "")
        raise InputError(f"guidance has nothing to compare: {what} and attention_temperature is 1", hint=hint)
    return Guidance(weight=w, guide=str(guide), temperature=tau, anneal=bool(anneal))
