"""`convert_bundle`: convert a bundle to another precision and verify it like an export, without PyTorch.

The source is a float32 bundle: what is rounded is rounded once. Its reference travels along, so that the new graphs are
compared with what PyTorch computed in float32.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tarflow_export._errors import ExportError
from tarflow_export._make import make_bundle
from tarflow_export._plan import plan_export
from tarflow_export._report import ExportReport, OnProgress, Stages
from tarflow_export._target import Target
from tarflow_export._verify import Extent, Verified
from tarflow_export._write import Contents
from tarflow_runtimes.bundle.config import Precision
from tarflow_runtimes.bundle.reader import Bundle, open_bundle

PRECISIONS: Final[tuple[Precision, ...]] = ("float16", "bfloat16", "int8")
"""The precisions that a float32 bundle can be converted to."""


def convert_bundle(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: Precision,
    verify: bool = True,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_verified: Callable[[Verified], None] | None = None,
) -> ExportReport:
    """Convert the float32 bundle at `source` to another precision at `output`.

    float16 and bfloat16 round linear layers, their activations and the caches; int8 rounds the weights of the layers
    to 8 bits with a scale for every 128, and steps round the activations of these products, too. The bundle appears
    complete and verified, or not at all; ONNX Runtime on a CPU does not compute in bfloat16, so that such a bundle says
    `unverified` until `tarflow verify --engine` on a GPU. `on_verified` is called with the comparisons whether they
    passed or not.

    Raises:
        BundleError: when the source is missing, damaged or unsafe.
        ExportError: on a target that may not be written, a source that is rounded already, weights out of range.
        VerificationError: when a comparison misses its tolerance.
    """
    stages = Stages(on_progress)
    with stages("check"):
        if precision not in PRECISIONS:
            raise ExportError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}",
                hint="float16 and bfloat16 halve the weights, int8 quarters them",
            )
        target = Target(Path(output), overwrite=overwrite)
        bundle = open_bundle(source)
        if bundle.path == target.path:
            raise ExportError(f"{target.path}: is the bundle to convert", hint="give another name with -o")
        if bundle.precision != "float32":
            raise ExportError(
                f"bundle {bundle.path.name} is of {bundle.precision}: what is rounded cannot be rounded again",
                hint="convert the float32 bundle that it was made from",
            )
        if verify:
            _reference_of(bundle)
    with stages("plan"):
        plan = plan_export(bundle.config, precision)

    def add_reference(path: Path, _: Extent) -> Mapping[str, float]:
        shutil.copyfile(_reference_of(bundle), path)
        floors: Mapping[str, float] = bundle.manifest["verification"]["floors"]
        return floors

    contents = Contents(
        weight=bundle.tensor,
        prior=bundle.prior_variance,
        checkpoint=bundle.manifest["checkpoint"],
        converted={"digest": bundle.digest, "precision": bundle.precision},
    )
    return make_bundle(
        target,
        plan,
        contents,
        add_reference=add_reference if verify else None,
        assumptions=(),
        stages=stages,
        on_verified=on_verified,
    )


def _reference_of(bundle: Bundle) -> Path:
    if bundle.reference is None:
        raise ExportError(
            f"bundle {bundle.path.name} holds no reference outputs to verify with: it was exported with --no-verify",
            hint="add --no-verify, or export the checkpoint again without it",
        )
    return bundle.reference
