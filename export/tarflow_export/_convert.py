"""`convert_bundle`: convert a bundle to another precision and verify it like an export, without PyTorch.

The source is a float32 bundle: what is rounded is rounded once. Its reference travels along, so that the new graphs are
compared with what PyTorch computed in float32.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tarflow_export._errors import ExportError
from tarflow_export._plan import plan_export
from tarflow_export._report import ExportReport, OnProgress, Stages
from tarflow_export._target import Target
from tarflow_export._verify import SKIPPED, Verified, extent_of, verify_written
from tarflow_export._write import REFERENCE_FILE, Contents, record_of, write_files, write_manifest
from tarflow_runtimes.bundle.config import Precision
from tarflow_runtimes.bundle.reader import Bundle, open_bundle
from tarflow_runtimes.bundle.tolerances import require_passed

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
            raise ExportError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        target = Target(Path(output), overwrite=overwrite)
        bundle = open_bundle(source)
        if bundle.path == target.path:
            raise ExportError(f"{target.path}: is the bundle to convert", hint="give another name with -o")
        if bundle.precision != "float32":
            raise ExportError(
                f"bundle {bundle.path.name} is of {bundle.precision}: what is rounded cannot be rounded again",
                hint="convert the float32 bundle that it was made from",
            )
        _require_reference(bundle, verify=verify)
    with stages("plan"):
        plan = plan_export(bundle.config, precision)
    contents = Contents(
        weight=bundle.tensor,
        prior=bundle.prior_variance,
        checkpoint=bundle.manifest["checkpoint"],
        converted={"digest": bundle.digest, "precision": bundle.precision},
    )
    extent, blocks = extent_of(bundle.config), bundle.config.blocks
    can_verify = precision != "bfloat16"
    verification: dict[str, Any] = SKIPPED if can_verify and not verify else {**SKIPPED, "status": "unverified"}
    verified = None
    with target.growing() as folder:
        with stages("write"):
            files = write_files(folder, plan, contents, lambda k: stages.progress(k + 1, blocks))
            if verify and bundle.reference is not None:
                shutil.copyfile(bundle.reference, folder / REFERENCE_FILE)
                files[REFERENCE_FILE] = record_of(folder / REFERENCE_FILE)
                verification = {**verification, "floors": bundle.manifest["verification"]["floors"]}
            write_manifest(folder, plan, contents, files=files, verification=verification)
        if verify and can_verify:
            with stages("verify"):
                verified = verify_written(
                    folder, extent, verification["floors"], lambda k: stages.progress(k + 1, blocks)
                )
                if on_verified is not None:
                    on_verified(verified)
                require_passed(verified.records)
                write_manifest(folder, plan, contents, files=files, verification=verified.to_json())
        made = open_bundle(folder, verify_digests=False)
    return ExportReport(
        path=target.path,
        digest=made.digest,
        nbytes=sum(record.size for record in files.values()),
        parameters=bundle.manifest["checkpoint"]["parameters"],
        assumptions=(),
        verification=made.manifest["verification"],
        seconds=stages.seconds,
    )


def _require_reference(bundle: Bundle, *, verify: bool) -> None:
    if verify and bundle.reference is None:
        raise ExportError(
            f"bundle {bundle.path.name} holds no reference outputs to verify with: it was exported with --no-verify",
            hint="add --no-verify, or export the checkpoint again without it",
        )
