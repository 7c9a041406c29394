"""`verify_graphs`: every graph of a bundle that is being made, compared with PyTorch's outputs in it.

Portable graphs on all blocks; run-ready graphs, whose bytes are the same in all blocks, on some of them where the model
is large. The whole model from end to end runs on the engine that will run it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from tarflow_export._runners import DecodeLoopRunner, PortableRunner
from tarflow_export._weights import block_shapes
from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.bundle.tolerances import Record
from tarflow_runtimes.engines.ort_cpu.engine import Limits, OrtCpuEngine
from tarflow_runtimes.measure.verify import verify

STEP_BUDGET = 4 * 10**9
"""Limit of weights read by the sequential steps of one pass over all blocks; this read bounds their time."""

PASS_BUDGET = 10**10
"""Multiply-adds of one image's pass through all blocks above which only one image is verified."""

MIN_STEPS = 8

SESSIONS_BYTES = 1 << 30
"""Limit of weights in the sessions that stay open while the engine is compared."""

SKIPPED: dict[str, Any] = {"status": "skipped", "engine": None, "extent": None, "floors": {}, "records": []}
"""The manifest's `verification` if nothing was compared."""

FLOOR_BLOCKS = 2
"""Blocks that float32 is measured against float64 on, where one image has to do: one of each order."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """The extent of the verification.

    `images` (B), `steps` of each block's inverse (P), `floor_blocks`: how many blocks the float32 floors are measured
    on, and run-ready graphs compared; `end_to_end`: whether whole samples are drawn.
    """

    images: int
    steps: int
    floor_blocks: int
    end_to_end: bool

    @property
    def some(self) -> range:
        """The blocks that stand for all."""
        return range(self.floor_blocks)

    @property
    def threads(self) -> int | None:
        """1 where operators are so small that waiting for other threads costs more; None is the library's choice."""
        return 1 if self.images > 1 else None

    def to_json(self) -> dict[str, Any]:
        """The fields and the rule that gave them."""
        rule = (
            f"images: 3, or 1 where a pass through the model takes more than {PASS_BUDGET:.0e} multiply-adds; "
            f"floor_blocks: all, or {FLOOR_BLOCKS} where images is 1; "
            f"steps: as many as read {STEP_BUDGET:.0e} weights over all blocks, at least {MIN_STEPS}, at most N - 1; "
            "end_to_end: where all N - 1 steps are taken"
        )
        return {**dataclasses.asdict(self), "rule": rule}


def extent_of(config: ModelConfig) -> Extent:
    """The extent that a model's size allows: minutes for the largest, everything for small ones."""
    block_weights = sum(math.prod(shape) for name, shape in block_shapes(config) if not name.endswith("_embed"))
    attention = 2 * config.patches**2 * config.width * config.layers
    one_pass = config.blocks * (config.patches * block_weights + attention)
    affordable = max(MIN_STEPS, STEP_BUDGET // (config.blocks * block_weights))
    steps = min(config.patches - 1, affordable)
    is_large = one_pass > PASS_BUDGET
    return Extent(
        images=1 if is_large else 3,
        steps=steps,
        floor_blocks=min(FLOOR_BLOCKS, config.blocks) if is_large else config.blocks,
        end_to_end=steps == config.patches - 1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """Every comparison with PyTorch, PyTorch's own float32 floors, and the engines that were compared."""

    engine: str
    extent: Extent
    floors: Mapping[str, float]
    records: tuple[Record, ...]

    def to_json(self) -> dict[str, Any]:
        """The manifest's `verification`."""
        return {
            "status": "passed" if all(record.passed for record in self.records) else "failed",
            "engine": self.engine,
            "extent": self.extent.to_json(),
            "floors": dict(self.floors),
            "records": [record.to_json() for record in self.records],
        }


def verify_graphs(bundle: Bundle, extent: Extent, on_block: Callable[[int], None]) -> Verified:
    """Compare every graph of a bundle whose manifest holds the floors."""
    records = list(verify(bundle, PortableRunner(bundle, threads=extent.threads), end_to_end=False, on_block=on_block))
    for provider in bundle.graphs:
        if provider == "ort-cpu":
            records += _ort_cpu(bundle, extent)
        else:
            runner = DecodeLoopRunner(bundle, provider, threads=extent.threads)
            records += verify(bundle, runner, blocks=extent.some, stages=("inverse", "window"), end_to_end=False)
    return Verified(
        engine=", ".join(("portable", *bundle.graphs)),
        extent=extent,
        floors=bundle.manifest["verification"]["floors"],
        records=tuple(records),
    )


def _ort_cpu(bundle: Bundle, extent: Extent) -> tuple[Record, ...]:
    """The engine itself, set to run the halves of the gradient at any memory cost and to keep few sessions open."""
    limits = Limits(activations=1 << 40, sessions=SESSIONS_BYTES)
    records: list[Record] = []
    for block in extent.some:
        with contextlib.closing(OrtCpuEngine(bundle, limits)) as engine:
            records += verify(
                bundle, engine, blocks=[block], stages=("gradient", "inverse", "window"), end_to_end=False
            )
    with contextlib.closing(OrtCpuEngine(bundle, Limits(sessions=SESSIONS_BYTES))) as engine:
        return (*records, *verify(bundle, engine, blocks=(), end_to_end=True))
