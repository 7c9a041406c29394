"""`Backend`: the maps of each block as plain functions, which is what the verification compares with PyTorch's."""

from __future__ import annotations

import dataclasses

from tarflow_runtimes._engine import Engine, Floats, Integers
from tarflow_runtimes._sampler import inverse_block


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """An engine seen as functions of arrays; patches are in image order, labels 0 .. classes (null = classes)."""

    engine: Engine

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.engine.name

    def forward(self, block: int, patches: Floats, labels: Integers | None) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> z [B, N, D], log|det| [B]."""
        return self.engine.forward(block, patches, labels)

    def gradient(self, block: int, patches: Floats, cotangent: Floats, labels: Integers | None) -> Floats:
        """Derivative of (cotangent . z + log|det|) with respect to the patches, [B, N, D]."""
        return self.engine.gradient(block, patches, cotangent, labels)

    def inverse(  # noqa: PLR0917 - what a `_verify.Subject` has
        self, block: int, z: Floats, labels: Integers | None, guidance: Floats, inverse_temperature: Floats, steps: int
    ) -> Floats:
        """The first `steps` of the sequential inverse of z [B, N, D]; labels [G, B], guidance [2, N]."""
        return inverse_block(self.engine, block, z, labels, guidance, inverse_temperature, steps=steps)

    def window(self, block: int, patches: Floats, noise: Floats, labels: Integers | None) -> Floats:
        """Patches 1 .. N-1 in block order, [B, N-1, D], by one call of the step graph on the patches before each."""
        return self.engine.window(block, patches, noise, labels)
