"""`cut`: how a batch is cut, be it into what memory holds, into what runs side by side, or for a line of progress."""

from __future__ import annotations

import itertools
import math
from typing import Final

BATCH_SIZE: Final = 64
"""Default number of images that run together. It bounds memory; engines split further where that is faster."""


def cut(images: int, most: int, *, parts: int = 1) -> list[slice]:
    """Slices of the images, in order, of equal size to within one: as few as have at most `most` images each.

    `parts` asks for more, as far as there are images: for threads, which then end together.

    >>> cut(10, 4)
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    >>> cut(3, 4, parts=2)
    [slice(0, 1, None), slice(1, 3, None)]
    """
    count = min(images, max(parts, math.ceil(images / most)))
    edges = [0, *(images * i // count for i in range(1, count + 1))]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
