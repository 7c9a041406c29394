"""`make_bundle`: a plan and weights to a verified bundle under its name; what an export and a conversion share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tarflow_export._plan import Plan
from tarflow_export._report import ExportReport, Stages
from tarflow_export._target import Target
from tarflow_export._verify import SKIPPED, Extent, Verified, extent_of, verify_graphs
from tarflow_export._write import REFERENCE_FILE, Contents, manifest_of, record_of, write_files
from tarflow_runtimes.bundle.reader import MANIFEST, read_bundle
from tarflow_runtimes.bundle.tolerances import require_passed

AddReference = Callable[[Path, Extent], Mapping[str, float]]
"""Writes reference.npz, of that extent, under the path; returns PyTorch's float32 floors."""


def make_bundle(
    target: Target,
    plan: Plan,
    contents: Contents,
    *,
    add_reference: AddReference | None,
    assumptions: tuple[str, ...],
    stages: Stages,
    on_verified: Callable[[Verified], None] | None,
) -> ExportReport:
    """Write the files in a hidden folder, verify them unless there is no reference, add the manifest, and publish.

    The manifest is written once, last: the engines that are compared read it from memory, and as anybody would, digests
    checked. ONNX Runtime on a CPU does not compute in bfloat16: such a bundle gets its reference and is not verified.

    Raises:
        VerificationError: when a comparison misses its tolerance.
        EngineError: when ONNX Runtime is missing, or cannot run a graph.
    """
    extent, blocks = extent_of(plan.config), plan.config.blocks
    can_verify = plan.layout.precision != "bfloat16"
    verification: dict[str, Any] = {**SKIPPED, "status": "skipped" if can_verify else "unverified"}
    with target.growing() as folder:
        with stages("write"):
            files = write_files(folder, plan, contents, lambda k: stages.progress(k + 1, blocks))
        if add_reference is not None:
            path = folder / REFERENCE_FILE
            verification["floors"] = add_reference(path, extent)
            files[REFERENCE_FILE] = record_of(path)
        if add_reference is not None and can_verify:
            with stages("verify"):
                draft = read_bundle(folder, manifest_of(plan, contents, files, verification))
                verified = verify_graphs(draft, extent, lambda k: stages.progress(k + 1, blocks))
                if on_verified is not None:
                    on_verified(verified)
                require_passed(verified.records)
                verification = verified.to_json()
        manifest = manifest_of(plan, contents, files, verification)
        bundle = read_bundle(folder, manifest, verify_digests=False)  # nothing is published that no reader takes
        (folder / MANIFEST).write_bytes(manifest)
    # From here on the bundle stands under its name.
    return ExportReport(
        path=target.path,
        digest=bundle.digest,
        nbytes=sum(record.size for record in files.values()),
        parameters=bundle.manifest["checkpoint"]["parameters"],
        assumptions=assumptions,
        verification=bundle.manifest["verification"],
        seconds=stages.seconds,
    )
