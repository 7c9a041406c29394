"""What an engine is: `Engine` opens a bundle's blocks; how they are inverted differs between the host and a device.

On the host the sampler owns the loop and the engine the buffers: `HostEngine`, `Stepper`, `Windows`. On a device with
memory of its own nothing may cross per step, so that there the engine's `Decoder` owns both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._device.array import DeviceArray
from tarflow_runtimes._plan import BlockReport, Strategy

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class Stepper(Protocol):
    """One inverse of one block for B images: it starts with the patch at block position 0, which is the noise's own."""

    def advance(self) -> None:
        """Finish the next patch: x_{i+1} = z_{i+1} * exp(a_i) + b_i, i = 0 at first. At most N - 1 times."""

    def result(self) -> Floats:
        """The patches [B, N, D] in image order; those not finished yet hold their noise."""


class Windows(Protocol):
    """The state of one inverse of one block for one image that is evaluated on windows of patches."""

    def evaluate(self, first: int, patches: Floats) -> Floats:
        """Patches first .. first + S - 1 in block order, [S, D] -> the patches one further, [S, D].

        Writes their keys and values, and reads those of the patches before them, which must have been written.
        """


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One block's turn in a run; `steps` ends a sequential one after so many of its N - 1 steps."""

    block: int
    strategy: Strategy
    steps: int | None = None


OnTurn = Callable[[int, int], object]
"""Hears the number of a turn, from 0, and how many of its steps are done; an error that it raises ends the run."""


class Decoder(Protocol):
    """Inverts blocks one after the other on a device: noise goes there once, and patches come back once."""

    def decode(
        self,
        turns: Sequence[Turn],
        *,
        noise: Floats,
        labels: Integers | None,
        guidance: Floats,
        inverse_temperature: Floats,
        on_step: OnTurn | None = None,
    ) -> tuple[Floats, tuple[BlockReport, ...]]:
        """Noise [B, N, D], labels [G, B], guidance [2, N], inverse_temperature [G] -> patches [B, N, D], and how.

        Noise and patches are in image order; each turn starts from what the one before made.
        """

    @property
    def to_device(self) -> Callable[[npt.NDArray[Any]], DeviceArray]:
        """Copies an array to the device, for others to take; it holds the device and nothing of the engine."""

    def to_host(self, given: object) -> object:
        """A copy on the host of an array in the device's memory, whoever's; anything else comes back as it is."""


class Engine(Protocol):
    """Runs the graphs of one bundle. An engine without a `decoder` is a `HostEngine`.

    Labels are int64, 0 .. classes - 1 or `classes`, the null class; None on models without classes.
    Every method but `close` may be called from several threads at once.

    Raises:
        EngineError: from any method, when a graph cannot be opened or run, or after `close`.
    """

    name: str
    workers: int
    """Parts of a batch that the engine runs faster side by side, each in a thread of its own; 1 where it does not."""

    @property
    def decoder(self) -> Decoder | None:
        """What inverts blocks on the engine's device; None where the sampler takes the steps."""

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> (z [B, N, D], log|det| [B], nats) of one block."""

    def gradient(self, block: int, patches: Floats, cotangent: Floats, labels: Integers | None) -> Floats:
        """Derivative of (cotangent . z + log|det|) of one block with respect to its `patches`, [B, N, D]."""

    def vjp_images(self) -> int:
        """Images that `vjp` may take so that what it keeps of all blocks fits; 0 where `gradient` is to be used."""

    def vjp(
        self, block: int, patches: Floats, labels: Integers | None, *, alone: bool
    ) -> tuple[Floats, Callable[[Floats], Floats]]:
        """Patches [B, N, D] -> z [B, N, D] and the way back: cotangent -> `gradient` of these patches, once.

        What the way back needs is kept until it is dropped. `alone`: no other call runs meanwhile.
        """

    def window(self, block: int, patches: Floats, noise: Floats, labels: Integers | None) -> Floats:
        """One call of the step graph on finished patches [B, N, D] -> patches 1 .. N-1 in block order, [B, N-1, D]."""

    def report(self) -> Mapping[str, Any]:
        """What runs where: versions, threads, rewrites taken or declined. JSON values."""

    def close(self) -> None:
        """Free the sessions; calls that are running end as they would have."""


class HostEngine(Engine, Protocol):
    """An engine whose memory is the host's: the sampler takes the steps, and cuts the batch as `parts` says."""

    def parts(self, images: int, branches: int) -> Sequence[slice]:
        """How to cut a batch for `stepper`: slices of the images, in order."""

    def stepper(
        self,
        block: int,
        *,
        noise: Floats,
        labels: Integers | None,
        guidance: Floats,
        inverse_temperature: Floats,
        alone: bool,
    ) -> Stepper:
        """Start an inverse: noise [B, N, D], labels [G, B], guidance [2, N], inverse_temperature [G].

        `alone`: no other part runs meanwhile, so that this one may have all threads.
        """

    def windows(
        self,
        block: int,
        *,
        noise: Floats,
        labels: Integers | None,
        guidance: Floats,
        inverse_temperature: Floats,
        alone: bool,
    ) -> Windows:
        """Start an inverse by windows of one image: noise [N, D] in block order, labels [G], the others as above."""
