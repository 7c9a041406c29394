"""Argument checks: labels, numbers and arrays are converted to what the sampler needs, or one clear error is raised."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.decode.turn import Floats, Integers
from tarflow_runtimes.errors import InputError
from tarflow_runtimes.model.guidance import Guidance, real

NULL: Final = -1
"""The null class in a list of labels; None means the same."""

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
    guidance: float | Guidance | Sequence[float | Guidance], n: int, labels: Integers | None, config: ModelConfig
) -> tuple[Guidance, ...]:
    """The guidance of each of n images; a number is a weight.

    Raises:
        InputError: on a value out of range, a wrong number of values, or guidance between two identical branches.
    """
    each = [guidance] * n if isinstance(guidance, Guidance) or np.ndim(guidance) == 0 else list(guidance)  # type: ignore[arg-type]
    if len(each) != n:
        raise InputError(f"{len(each)} guidance values for {n} images", hint="give one for all, or one per image")
    known: dict[object, Guidance] = {}
    for one in each:
        if one not in known:
            known[one] = one if isinstance(one, Guidance) else Guidance(weight=real("guidance", one))
    made = tuple(known[one] for one in each)
    null = np.full(n, True) if labels is None else labels == config.classes
    guided = [
        (one.attention_temperature, same) for one, same in zip(made, null.tolist(), strict=True) if one.weight > 0
    ]
    if guided and all(temperature == 1.0 and same for temperature, same in guided):
        what = "every label is the null class" if config.classes else "the model has no classes"
        hint = "set attention_temperature to another value than 1" + (", or give labels" if config.classes else "")
        raise InputError(f"guidance has nothing to compare: {what} and attention_temperature is 1", hint=hint)
    return made


def seeds_of(seed: int | Sequence[int], n: int, first_index: int) -> int | tuple[int, ...]:
    """Check seeds: one for all n images, or one per image.

    Raises:
        InputError: on a value out of range, or a wrong number of them.
    """
    if np.ndim(seed) == 0:
        return integer("seed", seed, below=2**64)
    seeds = tuple(integer("seed", one, below=2**64) for one in seed)  # type: ignore[union-attr]
    if len(seeds) != n:
        raise InputError(f"{len(seeds)} seeds for {n} images", hint="give one for all, or one per image")
    if first_index:
        raise InputError("first_index counts images of one seed, but one was given per image", hint="leave it out")
    return seeds
