"""`Engine`: the one protocol between a bundle on some runtime and everything that samples, encodes or measures.

Whether an engine's loop runs in host steps, on a device or in a kernel of its own is its own affair: nothing above it
asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from tarflow_runtimes.decode.plan import BlockReport
from tarflow_runtimes.decode.turn import Conditions, Doubles, Floats, Integers, OnTurn, Turn
from tarflow_runtimes.engines.gpu.array import DeviceArray

Cotangent = Callable[[Floats, slice], Floats]
"""The derivative of something with respect to z, given the z [., N, D] of some images and which they are."""


class Passes(Protocol):
    """The passes through the blocks of one bundle, which can be verified. Patches [B, N, D] come in the data's order.

    Labels are int64, 0 .. classes - 1 or `classes`, the null class; None on models without classes.
    """

    @property
    def name(self) -> str:
        """The engine's name, which with `precision` picks its line of the table of tolerances."""

    @property
    def provider(self) -> str:
        """The provider whose run-ready graphs it runs, as in the bundle."""

    @property
    def precision(self) -> str:
        """What it computes linear layers in: the bundle's, or tf32."""

    def invert(
        self, turns: Sequence[Turn], noise: Floats, conditions: Conditions, on_step: OnTurn | None = None
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """Invert blocks one after the other, each from what the one before made: noise -> patches, and how."""

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Floats | Doubles]:
        """Patches, labels [B] -> (z, log|det| [B], nats) of one block."""

    def vjp(
        self, blocks: Sequence[int], patches: Floats, labels: Integers | None, cotangent: Cotangent
    ) -> tuple[Floats, Floats]:
        """Patches -> (z after these blocks, d/d patches of (c . z + sum of log|det|)) with c = `cotangent`(z).

        `cotangent` is called with some images at a time, in any order and from any thread.
        """


class Engine(Passes, Protocol):
    """Runs the graphs of one bundle.

    Every method but `close` may be called from several threads at once.

    Raises:
        EngineError: from any method, when a graph cannot be opened or run, or after `close`.
    """

    @property
    def to_device(self) -> Callable[[npt.NDArray[Any]], DeviceArray] | None:
        """Copies an array to the engine's device, for others to take; None where the engine computes on the host."""

    def to_host(self, given: object) -> object:
        """A copy on the host of an array in a device's memory; anything else comes back as it is."""

    def require_vjp(self) -> None:
        """Raise now what `vjp` would for want of a package or a graph: before a long decode that ends with it."""

    def report(self) -> Mapping[str, Any]:
        """What runs where: versions, threads, device. JSON values."""

    def close(self) -> None:
        """Free what the engine holds; calls that are running end as they would have, or raise EngineError."""


def vjp_recomputed(  # noqa: PLR0917 - what an engine's `vjp` has, and its two graphs
    forward: Callable[[int, Floats, Integers | None], tuple[Floats, Floats | Doubles]],
    gradient: Callable[[int, Floats, Floats, Integers | None], Floats],
    blocks: Sequence[int],
    patches: Floats,
    labels: Integers | None,
    cotangent: Cotangent,
) -> tuple[Floats, Floats]:
    """`Engine.vjp` where nothing but the blocks' inputs can be kept: each gradient repeats its block's forward pass."""
    x, inputs = patches, []
    for block in blocks:
        inputs.append(x)
        x, _ = forward(block, x, labels)
    g = cotangent(x, slice(0, len(x)))
    for block in reversed(blocks):
        g = gradient(block, inputs.pop(), g, labels)
    return x, g
