"""`Profile`: a range of shapes that an engine takes, in the axis letters of a bundle's graphs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """From `least` to `most` images with `branches` (G), `patches` (S) at a call; kernels are chosen for `most`.

    Forward and gradient graphs have one branch and take whole images: G = S = 1 stands for "does not matter".
    """

    least: int
    most: int
    branches: int = 1
    patches: int = 1

    def takes(self, images: int, branches: int, patches: int) -> bool:
        """Whether a call of these sizes is within the range."""
        return self.least <= images <= self.most and (self.branches, self.patches) == (branches, patches)

    def ranges(self, shape: Sequence[int | str], cache_entries: int) -> tuple[Shape, Shape, Shape]:
        """Least, usual and largest shape of an input whose axes are numbers or the letters of `sizes`."""
        least = shape_of(shape, self.sizes(self.least, 1))
        most = shape_of(shape, self.sizes(self.most, cache_entries))
        return least, most, most

    def sizes(self, images: int, kv_length: int) -> Mapping[str, int]:
        """The value of every axis letter for a batch, with L = `kv_length` cache entries read."""
        return {
            "B": images,
            "G": self.branches,
            "R": self.branches * images,
            "S": self.patches,
            "S + 1": self.patches + 1,
            "L": kv_length,
        }

    def __str__(self) -> str:
        images = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        return f"B {images}, G {self.branches}, S {self.patches}"


def shape_of(axes: Sequence[int | str], sizes: Mapping[str, int]) -> Shape:
    """The shape of a tensor whose axes are numbers or letters."""
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes)


def profiles_for(
    batches: Iterable[int], *, branches: Iterable[int] = (1,), windows: Iterable[int] = (1,)
) -> tuple[Profile, ...]:
    """Every batch up to the largest: 1, 8, 32 are the ranges 1, 2 to 8, 9 to 32, with these branches and windows."""
    edges = (0, *sorted(set(batches)))
    ranges = list(itertools.pairwise(edges))
    return tuple(
        Profile(least=below + 1, most=most, branches=g, patches=s)
        for g in sorted(set(branches))
        for s in sorted(set(windows))
        for below, most in ranges
    )


def uncovered(wanted: Iterable[Profile], have: Sequence[Profile]) -> list[Profile]:
    """Those of the wanted of which some shapes are in none of the others."""

    def is_covered(one: Profile) -> bool:
        # A gap begins where the range does, or after the end of another one.
        starts = {one.least, *(other.most + 1 for other in have if one.least <= other.most < one.most)}
        return all(any(other.takes(images, one.branches, one.patches) for other in have) for images in starts)

    return [one for one in wanted if not is_covered(one)]
