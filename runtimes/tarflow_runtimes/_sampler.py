"""The sampler: the loop over blocks and patches that turns noise into patches. It owns no buffers; engines do.

x_0 = z_0;  x_{i+1} = z_{i+1} * exp(a_i) + b_i for i = 0 .. N-2, block by block from the last to the first.

Source: Zhai et al. 2024 (arXiv 2412.06329), equations 4 to 9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._crew import Crew
from tarflow_runtimes._engine import Engine, Floats, HostEngine, Integers, Turn
from tarflow_runtimes._errors import Cancelled
from tarflow_runtimes._parallel import inverse_block_parallel
from tarflow_runtimes._plan import BlockReport, DecodeReport, Plan, Sequential


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Progress of a call: `step` of `total` steps are done, the last in flow block `block` (K-1 first, 0 last)."""

    block: int
    step: int
    total: int


OnStep = Callable[[Step], object]
"""Called in the caller's thread as steps finish; returning False cancels. Steps may be reported several at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Guidance of the inverse: a += g_i (a - a_u) and b += g_i (b - b_u), where (a_u, b_u) are the null class's.

    g_i = `weight`, or weight * (i + 1) / (N - 1) when `anneal`; `guide` says whether a, b or both are guided.
    The attention logits of the second branch are divided by `temperature`.
    """

    weight: float = 0.0
    guide: str = "ab"
    temperature: float = 1.0
    anneal: bool = False

    @property
    def branches(self) -> int:
        """G: 2 when there is guidance, else 1."""
        return 2 if self.weight > 0.0 else 1

    def weights(self, patches: int) -> Floats:
        """The weights g for a and for b, float32 [2, N]; column i belongs to the step that yields patch i + 1."""
        g = np.full(patches, self.weight)
        if self.anneal:
            g = g * np.arange(1, patches + 1) / (patches - 1)
        return np.stack([g * ("a" in self.guide), g * ("b" in self.guide)]).astype(np.float32)

    def inverse_temperature(self) -> Floats:
        """1/tau of each branch, float32 [G]."""
        return np.array([1.0, 1.0 / self.temperature][: self.branches], np.float32)


def decode_patches(  # noqa: PLR0917 - mathematics, called with names where it helps
    engine: Engine,
    bundle: Bundle,
    u: Floats,
    labels: Integers | None,
    guidance: Guidance,
    on_done: Callable[[int, int], None] | None = None,
    plan: Plan | None = None,
) -> tuple[Floats, DecodeReport]:
    """Standard normal latents u [B, N, D], labels [B] (null = classes) -> patches of the image [B, N, D], and how.

    `on_done(block, steps)` hears how many of the K * (N - 1) steps are done; an error that it raises ends the run.
    Without a plan every block is sequential.
    """
    config = bundle.config
    x = u if bundle.prior is None else u * np.sqrt(bundle.prior)
    branch_labels = None
    if labels is not None:
        branch_labels = np.stack([labels, np.full_like(labels, config.classes)][: guidance.branches])
    weights, inverse_temperature = guidance.weights(config.patches), guidance.inverse_temperature()
    steps = config.patches - 1
    strategies = (Sequential(),) * config.blocks if plan is None else plan.blocks
    order = tuple(reversed(range(config.blocks)))
    if engine.decoder is not None:
        x, made = engine.decoder.decode(
            [Turn(block=block, strategy=strategies[block]) for block in order],
            noise=x,
            labels=branch_labels,
            guidance=weights,
            inverse_temperature=inverse_temperature,
            on_step=None if on_done is None else lambda turn, done: on_done(order[turn], turn * steps + done),
        )
        return x, DecodeReport(blocks=made, non_finite=_overflowed(x))
    reports = []
    for turn, block in enumerate(order):

        def on_step(done: int, block: int = block, before: int = turn * steps) -> None:
            if on_done is not None:
                on_done(block, before + done)

        strategy = strategies[block]
        given = (engine, block, x, branch_labels, weights, inverse_temperature)
        if isinstance(strategy, Sequential):
            x = inverse_block(*given, on_step=on_step)
            reports.append(BlockReport(block=block, strategy=strategy, calls=(steps,) * len(x)))
        else:
            is_reversed = bundle.blocks[block].order == "reversed"
            x, report = inverse_block_parallel(*given, strategy=strategy, is_reversed=is_reversed, on_step=on_step)
            reports.append(report)
    return x, DecodeReport(blocks=tuple(reports), non_finite=_overflowed(x))


def _overflowed(x: Floats) -> tuple[int, ...]:
    """Images [B, N, D] that hold values which are not finite."""
    return tuple(map(int, np.flatnonzero(~np.isfinite(x).all(axis=(1, 2)))))


def inverse_block(  # noqa: PLR0917 - the same
    engine: Engine,
    block: int,
    z: Floats,
    labels: Integers | None,
    guidance: Floats,
    inverse_temperature: Floats,
    *,
    steps: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Floats:
    """Invert one block: z [B, N, D], labels [G, B], guidance [2, N], inverse_temperature [G] -> x [B, N, D].

    `steps` < N - 1 stops after the first steps + 1 patches in block order; the others then hold their z. Both z and x
    are in image order. `on_step` hears the number of steps done, growing; an error that it raises ends the run.
    """
    steps = z.shape[1] - 1 if steps is None else min(steps, z.shape[1] - 1)
    if engine.decoder is not None:
        x, _ = engine.decoder.decode(
            [Turn(block=block, strategy=Sequential(), steps=steps)],
            noise=z,
            labels=labels,
            guidance=guidance,
            inverse_temperature=inverse_temperature,
            on_step=None if on_step is None else lambda _, done: on_step(done),
        )
        return x
    host = cast("HostEngine", engine)
    parts = host.parts(len(z), len(inverse_temperature))
    crew = Crew(len(parts), on_step)

    def run(index: int) -> None:
        part = parts[index]
        stepper = host.stepper(
            block,
            noise=z[part],
            labels=None if labels is None else labels[:, part],
            guidance=guidance,
            inverse_temperature=inverse_temperature,
            alone=len(parts) == 1,
        )
        for done in range(steps):
            stepper.advance()
            if crew.stop:
                return
            crew.report(index, done + 1)
        results[index] = stepper.result()

    results: list[Floats] = [z] * len(parts)
    crew.work(run, workers=min(engine.workers, len(parts)))
    return results[0] if len(parts) == 1 else np.concatenate(results)


def progress(on_step: OnStep | None, *, chunk: int, chunks: int, steps: int) -> Callable[[int, int], None] | None:
    """`on_done` of `decode_patches` for one chunk of a call: counts over all chunks, and cancels.

    Raises:
        Cancelled: from the returned function, when `on_step` returns False.
    """
    if on_step is None:
        return None

    def on_done(block: int, done: int) -> None:
        if on_step(Step(block=block, step=chunk * steps + done, total=chunks * steps)) is False:
            raise Cancelled("cancelled by on_step")

    return on_done
