"""Decoding strategies for each flow block, `Sequential`, `Parallel` and `Plan`, and the statistics, `DecodeReport`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, Literal, TypeAlias, get_args

from tarflow_runtimes.errors import InputError

Init = Literal["noise", "zeros"]
INITS: Final = get_args(Init)

DEFAULT_TOLERANCE: Final = 1e-5
"""In units of patch values; docs/DECODING.md measures the resulting distance from sequentially decoded images."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sequential:
    """One patch after the other: N - 1 steps a block, exact."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Fixed-point iteration on a sliding window of patches, each image by itself.

    x_{i+1} <- z_{i+1} * exp(a_i) + b_i for `window` patches at once (0: all of them), from their last values, until
    each patch agrees with the value computed from the settled patches before it, within `tolerance` (maximum norm). The
    patch right after the settled ones is always exact, so that no image takes more than N - 1 calls. The initial guess
    is the block's `noise` or `zeros`.

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
    """A strategy for each flow block; `blocks[k]` is that of block k, so the last one runs first."""

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
    """The inverse of `strategy_json`.

    Raises:
        InputError: when the value does not describe a strategy.
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
    """Statistics of the inverse of one block.

    `calls[i]` is the number of evaluations of the block for image i, N - 1 when sequential. `accepted[i]` has the
    number of patches that each of them settled; it is empty when sequential, and on a device, which does not report
    each call. `residual` is the largest |x_{i+1} - (z_{i+1} * exp(a_i) + b_i)| over all images and patches, 0 when
    sequential. `sequential_images` are those that continued sequentially because the iteration met a value that is not
    finite.
    """

    block: int
    strategy: Strategy
    calls: tuple[int, ...]
    accepted: tuple[tuple[int, ...], ...] = ()
    residual: float = 0.0
    sequential_images: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeReport:
    """Statistics of all blocks, in the order in which they ran; `non_finite` are the images that overflowed."""

    blocks: tuple[BlockReport, ...] = ()
    non_finite: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        blocks = [dataclasses.asdict(block) | {"strategy": strategy_json(block.strategy)} for block in self.blocks]
        return {"blocks": blocks, "non_finite": list(self.non_finite)}

    def extended(self, other: DecodeReport, images: int) -> DecodeReport:
        """Append the report of further images; this one covers the first `images` images."""
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
