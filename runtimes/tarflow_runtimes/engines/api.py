"""`Engine`: the protocol between a bundle on some runtime and the code that samples, encodes or measures.

Whether the decoding loop runs in host steps, on a device or in a native kernel is up to the engine: callers do not need
to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from tarflow_runtimes.decode.plan import BlockReport
from tarflow_runtimes.decode.turn import Conditions, Doubles, Floats, Integers, OnTurn, Turn
from tarflow_runtimes.engines.gpu.array import DeviceArray

Cotangent = Callable[[Floats, slice], Floats]
"""Returns the derivative of some function with respect to z, given z [., N, D] and the indices of these images."""


class Passes(Protocol):
    """The passes through the blocks of one bundle, which can be verified. Patches [B, N, D] are in the data's order.

    Labels are int64, 0 .. classes - 1 or `classes`, the null class; None for models without classes.
    """

    @property
    def name(self) -> str:
        """The engine's name, which together with `precision` selects its row in the table of tolerances."""

    @property
    def provider(self) -> str:
        """The provider whose run-ready graphs it runs, as in the bundle."""

    @property
    def precision(self) -> str:
        """The precision of linear layers: that of the bundle, or tf32."""

    def invert(
        self, turns: Sequence[Turn], noise: Floats, conditions: Conditions, on_step: OnTurn | None = None
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """Invert blocks one after another, each from the result of the one before: noise -> patches, and reports."""

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
        """Copies an array to the engine's device, for other libraries; None if the engine computes on the host."""

    def to_host(self, given: object) -> object:
        """Copy an array in a device's memory to the host; anything else is returned unchanged."""

    def require_vjp(self) -> None:
        """Raise now what `vjp` would for want of a package or a graph: before a long decode that ends with it."""

    def report(self) -> Mapping[str, Any]:
        """The versions, threads and device, as JSON values."""

    def close(self) -> None:
        """Free the engine's resources; running calls finish normally, or raise EngineError."""


def vjp_recomputed(  # noqa: PLR0917 - what an engine's `vjp` has, and its two graphs
    forward: Callable[[int, Floats, Integers | None], tuple[Floats, Floats | Doubles]],
    gradient: Callable[[int, Floats, Floats, Integers | None], Floats],
    blocks: Sequence[int],
    patches: Floats,
    labels: Integers | None,
    cotangent: Cotangent,
) -> tuple[Floats, Floats]:
    """`Engine.vjp` that only keeps the inputs of the blocks: each gradient repeats the forward pass of its block."""
    x, inputs = patches, []
    for block in blocks:
        inputs.append(x)
        x, _ = forward(block, x, labels)
    g = cotangent(x, slice(0, len(x)))
    for block in reversed(blocks):
        g = gradient(block, inputs.pop(), g, labels)
    return x, g
