"""The results of `tarflow bench`: `Case`, `CaseResult` and the rest of its JSON file, and operation counts, `Work`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.measure.ceilings import Ceilings

SCHEMA: Final = "tarflow-bench"
SCHEMA_VERSION: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One cell of the sweep; `decode` is `sequential`, `auto`, `parallel` or `parallel:WINDOW`."""

    engine: str
    guidance: float
    batch: int
    decode: str

    def same_work(self, other: Case) -> bool:
        """Whether the other case differs only in the decoding strategy."""
        return dataclasses.replace(self, decode=other.decode) == other


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockResult:
    """One flow block of a case.

    `ms` is the median time of a batch in this block, `strategy` how it was inverted, `calls_mean` and `calls_max` the
    evaluations of the block that an image took, `settled[j]` the mean number of patches that were final after j calls
    (empty when sequential), `residual` the largest move of a value that a settled patch was computed from,
    `sequential_images` how many images of all rounds continued sequentially, `step_us[i]` the time of step i of a batch
    (empty unless sequential), between two progress reports: the first includes the start of the block, and if parts of
    a batch wait for others, each is a step of their mean progress.
    """

    block: int
    ms: float
    strategy: Mapping[str, Any]
    calls_mean: float
    calls_max: int
    settled: tuple[float, ...]
    residual: float
    sequential_images: int
    step_us: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """The results of one case: times of one batch, without drawing the noise and without denoising.

    `first_ms` is the first call of the case with all sessions that it opens; `p50_ms` and `p95_ms` are percentiles of
    the rounds; `speedup` is the median over the rounds of the time of the first way of decoding over that of this one;
    `max_difference` compares its images with those. `step_us` is p50 by the K * (N - 1) steps, `slope_us` the growth of
    a step from one index to the next. `gflops` and `gbs` (see `Work`) and the slope are None where a
    block was not sequential. `non_finite` counts images that overflowed.
    """

    case: Case
    first_ms: float
    p50_ms: float
    p95_ms: float
    images_per_s: float
    speedup: float
    max_difference: float
    step_us: float
    slope_us: float | None
    gflops: float | None
    gbs: float | None
    non_finite: int
    blocks: tuple[BlockResult, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineResult:
    """An engine of the sweep: to open the bundle (the first also loads its library), and to draw one image after it.

    `plans` says why `auto` has no tuned plan, or is empty.
    """

    engine: str
    load_ms: float
    first_image_ms: float
    plans: str
    report: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes: the bundle's weights; the process before loading, after the first image, and at most; None is unknown."""

    weights: int
    start: int | None
    ready: int | None
    peak: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """The complete results of a benchmark; `header` says what ran, where and when."""

    header: Mapping[str, Any]
    ceilings: Ceilings | None
    memory: Memory
    engines: tuple[EngineResult, ...]
    cases: tuple[CaseResult, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values, with the name and version of the schema first."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The minimal work of one sequential decode of a batch: floating-point operations, and bytes moved.

    With P = 12 L W^2 + D W + W D' weights in the linear layers of a block (D' = 2 D, or D without nvp), R rows and
    t = 1 .. N - 1 patches known at a step, summed over the steps of all blocks:

        operations = R (2 P + 4 L W t)
        bytes      = P * weight bytes + 2 R L W (t + 1) * cache bytes

    that is, the weights are read once a step, keys and values of t patches are read and those of one are written.
    Norms, softmax, biases and activations are left out.
    """

    operations: float
    bytes: float


def sequential_work(config: ModelConfig, *, rows: int, weight_bytes: float = 4, cache_bytes: int = 4) -> Work:
    """The work of `rows` = G * B rows through all K blocks; the formula is that of `Work`."""
    width, layers, values = config.width, config.layers, config.patch_values
    weights = 12 * layers * width**2 + values * width + width * values * (2 if config.nvp else 1)
    steps = config.patches - 1
    known = steps * (steps + 1) / 2
    return Work(
        operations=config.blocks * rows * (2 * weights * steps + 4 * layers * width * known),
        bytes=config.blocks
        * (weights * weight_bytes * steps + 2 * rows * layers * width * cache_bytes * (known + steps)),
    )
