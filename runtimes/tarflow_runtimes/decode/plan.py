"""How each flow block is inverted: `Sequential`, `Parallel` and `Plan`; and `DecodeReport`, what came of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, Literal, TypeAlias, get_args

from tarflow_runtimes.errors import InputError

Init = Literal["noise", "zeros"]
INITS: Final = get_args(Init)

DEFAULT_TOLERANCE: Final = 1e-5
"""In units of the patches; how far images then are from sequential ones is measured in docs/DECODING.md."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sequential:
    """One patch after the other: N - 1 steps a block, exact."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Fixed-point iteration on a sliding window of patches, each image by itself.

    x_{i+1} <- z_{i+1} * exp(a_i) + b_i for `window` patches at once (0: all of them), each from the window's own last
    values, until each patch is what the settled patches before it yield, within `tolerance` (maximum norm). The patch
    right after the settled ones is exact whatever the window did, so that no image takes more than N - 1 calls.
    Patches start as the block's `noise` or as `zeros`.

    Raises:
        InputError: on a value out of range.
    """

    window: int = 0
    tolerance: float = DEFAULT_TOLERANCE
    init: Init = "noise"

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise InputError(f"window must be 0 (the whole block) or a number of patches, got {self.window!r}")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0.0):
            raise InputError(f"tolerance must be finite and at least 0, got {self.tolerance!r}")
        if self.init not in INITS:
            raise InputError(f"init must be {' or '.join(INITS)}, got {self.init!r}")


Strategy: TypeAlias = Sequential | Parallel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A strategy for each flow block; `blocks[k]` is that of block k, so that the last one runs first."""

    blocks: tuple[Strategy, ...]

    def with_tolerance(self, tolerance: float) -> Plan:
        """The plan with another tolerance wherever it is parallel."""
        return Plan(
            blocks=tuple(
                dataclasses.replace(one, tolerance=tolerance) if isinstance(one, Parallel) else one
                for one in self.blocks
            )
        )


def strategy_json(strategy: Strategy) -> dict[str, Any]:
    """A strategy as JSON values."""
    return {"decode": type(strategy).__name__.lower(), **dataclasses.asdict(strategy)}


def strategy_from_json(value: Any) -> Strategy:
    """The strategy that `strategy_json` described.

    Raises:
        InputError: when it describes none.
    """
    kinds = {"sequential": Sequential, "parallel": Parallel}
    if not isinstance(value, dict) or value.get("decode") not in kinds:
        raise InputError(f"not a decoding strategy: {value!r}")
    fields = {name: field for name, field in value.items() if name != "decode"}
    try:
        strategy: Strategy = kinds[value["decode"]](**fields)
    except TypeError as error:
        raise InputError(f"not a decoding strategy: {value!r}") from error
    return strategy


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockReport:
    """How one block was inverted.

    `calls[i]` is the number of evaluations of the block for image i, N - 1 when sequential; `accepted[i]` says how
    many patches each of them settled (empty when sequential, and on a device, which is not asked after each call);
    `residual` is the largest
    |x_{i+1} - (z_{i+1} * exp(a_i) + b_i)| over all images and patches, 0 when sequential; `sequential_images` are
    those that went on sequentially because the iteration met a value that is not finite.
    """

    block: int
    strategy: Strategy
    calls: tuple[int, ...]
    accepted: tuple[tuple[int, ...], ...] = ()
    residual: float = 0.0
    sequential_images: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeReport:
    """How the blocks were inverted, in the order in which they ran; `non_finite` are the images that overflowed."""

    blocks: tuple[BlockReport, ...] = ()
    non_finite: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        blocks = [dataclasses.asdict(block) | {"strategy": strategy_json(block.strategy)} for block in self.blocks]
        return {"blocks": blocks, "non_finite": list(self.non_finite)}

    def extended(self, other: DecodeReport, images: int) -> DecodeReport:
        """This report of the first `images` images, and that of the ones after them."""
        if not self.blocks:
            return other
        return DecodeReport(
            blocks=tuple(_joined(mine, theirs, images) for mine, theirs in zip(self.blocks, other.blocks, strict=True)),
            non_finite=self.non_finite + tuple(images + i for i in other.non_finite),
        )


def _joined(mine: BlockReport, theirs: BlockReport, images: int) -> BlockReport:
    return BlockReport(
        block=mine.block,
        strategy=mine.strategy,
        calls=mine.calls + theirs.calls,
        accepted=mine.accepted + theirs.accepted,
        residual=max(mine.residual, theirs.residual),
        sequential_images=mine.sequential_images + tuple(images + i for i in theirs.sequential_images),
    )
