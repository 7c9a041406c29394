"""`--labels`: convert names and numbers on the command line to class numbers."""

from __future__ import annotations

from collections.abc import Sequence

from tarflow_runtimes.errors import InputError

NULL_WORDS = ("null", "-1")
"""The items of a list of labels that mean the null class."""

SHOWN = 20
"""The most labels that an error lists."""


def parse_labels(text: str | None, *, classes: int, names: Sequence[str] | None) -> list[int] | None:
    """Class numbers of a comma-separated list; -1 is the null class.

    An item is a name in the bundle, a class number, or `null`; `all` alone means every class in turn. Names that are
    numbers have priority: with the classes `1`, `2`, `3`, the label 1 is the first class.

    Raises:
        InputError: on an unknown label; the hint lists the valid ones.

    >>> parse_labels("cat,2,null", classes=3, names=["cat", "dog", "wild"])
    [0, 2, -1]
    """
    if text is None:
        return None
    if classes == 0:
        raise InputError("--labels was given, but the model has no classes", hint="leave --labels out")
    if text.strip() == "all":
        return list(range(classes))
    numbers = {name: index for index, name in enumerate(names or ())}
    if not any(name.isdecimal() for name in numbers):
        numbers = {str(index): index for index in range(classes)} | numbers
    numbers |= dict.fromkeys(NULL_WORDS, -1)
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if item not in numbers:
            raise InputError(
                f"--labels: the model has no class {item!r}", hint=f"valid are {_valid(classes, names)}, null, all"
            )
    return [numbers[item] for item in items]


def _valid(classes: int, names: Sequence[str] | None) -> str:
    if names is None or list(names) == [str(index) for index in range(classes)]:
        return f"0 to {classes - 1}"
    more = f" ... ({classes} in all, tarflow inspect lists them)" if classes > SHOWN else ""
    listed = ", ".join(names[:SHOWN]) + more
    return listed if any(name.isdecimal() for name in names) else f"{listed}; or 0 to {classes - 1}"


def spread(labels: Sequence[int] | None, n: int, *, first_index: int = 0) -> list[int] | None:
    """The labels of n images: that of the image with number i is labels[i mod len(labels)]."""
    return None if labels is None else [labels[(first_index + place) % len(labels)] for place in range(n)]


def check_labels(labels: Sequence[int] | None, n: int) -> None:
    """Refuse more labels than there are images.

    Raises:
        InputError: when there are more labels.
    """
    if labels is not None and len(labels) > n:
        raise InputError(
            f"--labels names {len(labels)} labels for {n} image{'s' * (n != 1)}",
            hint="give at most one label per image",
        )


def label_name(label: int, names: Sequence[str] | None) -> str:
    """The name of a class number, the number itself if the bundle has no names, or `null`."""
    if label < 0:
        return "null"
    return str(label) if names is None else names[label]
