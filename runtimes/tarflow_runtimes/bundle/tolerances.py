"""`Record` and `Tolerance`: one comparison of a computed array with its reference, and how far apart they may be.

Comparisons are data: collect them all, look at them, then `require_passed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.errors import VerificationError

Measure = Literal["max_abs", "max_scaled", "relative"]
"""What a tolerance bounds: max |difference|; max of |difference| / max(unit, |reference|); L2 norm of the difference
over that of the reference."""

FLOOR_FACTOR: Final = 4.0
"""How many times PyTorch's own float32 error, measured against float64, an engine's difference from it may be.

Two float32 computations that are both one floor away from the truth are up to two apart; the rest is the spread over
inputs."""


WIDEST: Final = 0.1
"""What a floor can widen a tolerance to at most: a twentieth of the range of images is no rounding any more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Bound on a measure, and why that one.

    Where it is `widened`, the float32 floor measured for the same comparison counts:
    max(`limit`, min(FLOOR_FACTOR * floor, WIDEST)).
    """

    measure: Measure
    limit: float
    reason: str
    widened: bool = False


_SAMPLING = "pictures; the floor takes over where a model amplifies float32 rounding"
_EXACT: Final = {
    "forward": Tolerance(measure="max_abs", limit=1e-4, widened=True, reason="float32 rounding of one block"),
    "log_det": Tolerance(
        measure="max_scaled", limit=1e-5, widened=True, reason="a float32 sum over N*D terms, scaled by its size"
    ),
    "gradient": Tolerance(measure="relative", limit=1e-5, reason="ten times what PyTorch float32 misses float64 by"),
    "window": Tolerance(measure="max_abs", limit=1e-4, widened=True, reason="x -> z -> x of one block in float32"),
    "inverse": Tolerance(measure="max_abs", limit=1e-4, widened=True, reason=_SAMPLING),
    "sample": Tolerance(measure="max_abs", limit=1e-4, widened=True, reason=_SAMPLING),
    "round_trip": Tolerance(
        measure="max_abs", limit=1e-3, widened=True, reason="x -> z -> x of the whole model in float32"
    ),
    "log_prob": Tolerance(measure="max_scaled", limit=1e-5, reason="a float32 sum over N*D terms, scaled by its size"),
    "bits_per_dim": Tolerance(measure="max_abs", limit=1e-5, reason="log_prob over N*D ln 2"),
    "denoise": Tolerance(
        measure="max_abs", limit=1e-4, reason="sigma^2 times the gradient's error, at most 1e-4 of it"
    ),
}

_HALF = "weights and activations of linear layers have 11 bits: 5e-4 each; at least five times what was measured"
_ROUNDED: Final = {
    "forward": Tolerance(measure="relative", limit=1.25e-3, reason=_HALF),
    "log_det": Tolerance(measure="max_scaled", limit=2e-2, reason=f"{_HALF}; where its sum nearly cancels, nats"),
    "gradient": Tolerance(measure="relative", limit=2.5e-3, reason=f"{_HALF}, forward and backward"),
    "window": Tolerance(measure="relative", limit=2.5e-3, reason=f"{_HALF}; z is PyTorch's, from float32"),
    "inverse": Tolerance(measure="relative", limit=5e-3, reason=f"{_HALF}, fed back from patch to patch"),
    "sample": Tolerance(measure="relative", limit=1.25e-2, reason=f"{_HALF}, fed back through every patch and block"),
    "round_trip": Tolerance(
        measure="relative", limit=2.5e-3, reason="both ways round alike, so most of the error cancels"
    ),
    "log_prob": Tolerance(measure="max_scaled", limit=2.5e-3, reason=_HALF),
    "bits_per_dim": Tolerance(measure="max_abs", limit=2.5e-3, reason=_HALF),
    "denoise": Tolerance(measure="max_abs", limit=5e-3, reason="half an 8-bit step"),
}
"""float16 on a CPU. Measured on the two trained models and ten random ones, widths 64 to 512, up to 6 layers and 256
patches: forward 2.4e-4, gradient 3.5e-4, window 3.4e-4, inverse 4.4e-4, sample 8.4e-4, bits/dim 4.6e-4 at worst."""


def _scaled(table: Mapping[str, Tolerance], factor: float, reason: str) -> dict[str, Tolerance]:
    return {
        stage: dataclasses.replace(tolerance, limit=factor * tolerance.limit, reason=f"{reason}; {tolerance.reason}")
        for stage, tolerance in table.items()
    }


_GPU_EXACT: Final = _scaled(
    _EXACT, 10.0, "ten times the CPU's: sums in another order, and exp, erf and rsqrt of CUDA, each 1 to 2 ulp off"
)
_ELEVEN_BITS: Final = _scaled(
    _ROUNDED, 4.0, "four times the CPU's: sums in another order, perhaps of fewer bits; not measured"
) | {"log_det": _ROUNDED["log_det"]}
_GPU_ROUNDED: Final = _ELEVEN_BITS | {
    "sample": Tolerance(
        measure="relative", limit=2e-2, reason="a PSNR of 40 dB: images span 2 and have a root mean square of at most 1"
    )
}
_COARSE: Final = _scaled(_ELEVEN_BITS, 8.0, "bfloat16 has 3 bits less than float16")

_INT8: Final = _scaled(
    _ROUNDED, 16.0, "weights of layers have 7 bits and a sign, and in steps their activations, too"
) | {
    "log_det": Tolerance(
        measure="max_scaled",
        limit=0.5,
        reason="where its sum nearly cancels, nats: 0.35 in the worst of a dozen models",
    )
}
"""Measured as `_ROUNDED`: forward 5.9e-3, gradient 8.8e-3, window 1.6e-2, inverse 3.1e-2, sample 5.1e-2 at worst."""

GPU_ENGINES: Final = ("ort-cuda", "trt", "trt-rtx")

TOLERANCES: Final[Mapping[tuple[str, str], Mapping[str, Tolerance]]] = {
    ("*", "float32"): _EXACT,
    ("*", "float16"): _ROUNDED,
    ("*", "tf32"): _ELEVEN_BITS,  # the factors of products have the 11 bits of float16
    ("*", "bfloat16"): _COARSE,
    ("*", "int8"): _INT8,
    **{(engine, "float32"): _GPU_EXACT for engine in GPU_ENGINES},
    **{(engine, "float16"): _GPU_ROUNDED for engine in GPU_ENGINES},
}
"""(engine, precision it computes in) -> stage -> tolerance; `*` stands for every engine without its own row."""


def tolerance_for(engine: str, precision: str, stage: str) -> Tolerance:
    """The line of the table that applies."""
    return TOLERANCES.get((engine, precision), TOLERANCES["*", precision])[stage]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The comparison of a computed array with its reference.

    `max_abs`, `mean_abs`, `max_scaled`, `relative` (L2) and `cosine` are of the whole array, in float64; `non_finite`
    counts NaN and infinite values of either side. `value` is the measure that the tolerance bounds. `graph` is the file
    that computed the array, None for the whole model. Numbers that are not finite are None, so that a record is JSON.
    """

    name: str
    stage: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float | None
    mean_abs: float | None
    max_scaled: float | None
    relative: float | None
    cosine: float | None
    non_finite: int
    measure: Measure
    value: float | None
    tolerance: float
    passed: bool
    graph: str | None

    def to_json(self) -> dict[str, Any]:
        """The fields, JSON values only."""
        return dataclasses.asdict(self)


def compare(
    name: str,
    stage: str,
    actual: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    *,
    tolerance: Tolerance,
    floors: Mapping[str, float],
    unit: float = 1.0,
    graph: str | None = None,
) -> Record:
    """Measure `actual`, which `graph` computed, against `expected`; `max_scaled` is relative from magnitude `unit` on.

    Never passes on another shape, an empty array, numbers that are no floats or a value that is not finite.
    """
    comparable = actual.shape == expected.shape and actual.size > 0 and np.issubdtype(actual.dtype, np.floating)
    measures: dict[str, float | None] = dict.fromkeys(("max_abs", "mean_abs", "max_scaled", "relative", "cosine"))
    non_finite = int(np.count_nonzero(~np.isfinite(actual)) + np.count_nonzero(~np.isfinite(expected)))
    if comparable and not non_finite:
        measures |= _measures(actual.astype(np.float64), expected.astype(np.float64), unit)
    floor = floors.get(name, 0.0) if tolerance.widened else 0.0
    # A floor that is not a finite number would make the check unable to fail.
    limit = max(tolerance.limit, min(FLOOR_FACTOR * floor, WIDEST) if np.isfinite(floor) else 0.0)
    value = measures[tolerance.measure]
    return Record(
        name=name,
        stage=stage,
        shape=actual.shape,
        dtype=str(actual.dtype),
        max_abs=measures["max_abs"],
        mean_abs=measures["mean_abs"],
        max_scaled=measures["max_scaled"],
        relative=measures["relative"],
        cosine=measures["cosine"],
        non_finite=non_finite,
        measure=tolerance.measure,
        value=value,
        tolerance=limit,
        passed=value is not None and value <= limit,
        graph=graph,
    )


def require_passed(records: Iterable[Record]) -> None:
    """Raise unless there are records and all of them passed.

    Raises:
        VerificationError: naming the comparisons that missed their tolerance, the worst first.
    """
    records = list(records)
    if not records:
        raise VerificationError("nothing was compared", hint="export the checkpoint again, with verification")
    failed = [record for record in records if not record.passed]
    if not failed:
        return
    failed.sort(key=lambda record: -(np.inf if record.value is None else record.value / record.tolerance))
    listed = "; ".join(_missed(record) for record in failed[:3])
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    raise VerificationError(
        f"{len(failed)} of {len(records)} comparisons with PyTorch missed their tolerance: {listed}{more}",
        hint="the bundle or the engine computes something else than the model: do not use it",
    )


def _missed(record: Record) -> str:
    if record.non_finite:
        return f"{record.name}: {record.non_finite} values are not finite"
    if record.value is None:
        return f"{record.name}: {record.dtype} {list(record.shape)} cannot be compared"
    return f"{record.name}: {record.measure} {record.value:.2g} > {record.tolerance:.2g}"


def _measures(
    actual: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], unit: float
) -> dict[str, float | None]:
    difference = np.abs(actual - expected)
    norm, other = float(np.linalg.norm(expected)), float(np.linalg.norm(actual))
    distance = float(np.linalg.norm(difference))
    # Against a reference of zeros only zeros are right, and the distance itself says how far off the rest is.
    return {
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.mean()),
        "max_scaled": float((difference / np.maximum(unit, np.abs(expected))).max()),
        "relative": distance / norm if norm > 0.0 else distance,
        "cosine": float(np.vdot(actual, expected)) / (norm * other) if norm * other > 0.0 else None,
    }
