"""`export_bundle`: check, load and plan, each handing on a typed result; `make_bundle` does the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tarflow_export._errors import ExportError
from tarflow_export._make import make_bundle
from tarflow_export._plan import plan_export
from tarflow_export._reference import compute_reference
from tarflow_export._report import ExportReport, OnProgress, Stages
from tarflow_export._source import bundle_config, weights_of
from tarflow_export._target import SUFFIX, Target
from tarflow_export._verify import Extent, Verified, extent_of
from tarflow_export._weights import is_linear
from tarflow_export._write import Contents
from tarflow_runtimes.bundle.config import ModelConfig, Precision
from tarflow_runtimes.engines.onnxruntime import import_onnxruntime
from tarflow_sdk import TarFlow, load_checkpoint

DTYPES: tuple[Precision, ...] = ("float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """Stage `load`: the model, what the bundle will hold of it, and what its checkpoint left open."""

    model: TarFlow
    contents: Contents
    assumptions: tuple[str, ...]

    @property
    def config(self) -> ModelConfig:
        """The precision of the bundle."""
        return bundle_config(self.model.config)


def default_output(checkpoint: str | Path) -> Path:
    """`STEM.tarflow` in the current directory."""
    return Path(Path(checkpoint).stem + SUFFIX)


def export_bundle(
    model_or_path: TarFlow | str | Path,
    output: str | Path | None = None,
    *,
    dtype: Precision = "float32",
    verify: bool = True,
    overwrite: bool = False,
    tokens: bool = False,
    image_channels: int | None = None,
    patch_size: int | None = None,
    head_dim: int | None = None,
    noise_std: float | None = None,
    labels: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    on_verified: Callable[[Verified], None] | None = None,
) -> ExportReport:
    """Export a model, or the checkpoint at a path, as a bundle, and compare the bundle with PyTorch.

    `output` is `STEM.tarflow` in the current directory unless given. `dtype` is that of linear weights, their
    activations and the attention caches. `tokens` to `labels` say what a checkpoint does not, as in
    `load_checkpoint`; a model in memory has them in its configuration. The bundle appears under its name complete
    and verified, or not at all; `overwrite` lets it take the place of another bundle, and of nothing else.
    `on_verified` sees the comparisons whether they passed or not.

    Raises:
        CheckpointError: on a checkpoint that cannot be read or whose configuration stays open.
        ExportError: on a target that may not be written, weights that are not finite, options that do not fit.
        EngineError: when ONNX Runtime is missing, or cannot run a graph.
        VerificationError: when a comparison with PyTorch misses its tolerance.
        OSError: when the disk refuses.

    >>> import tempfile
    >>> from tarflow_sdk.testing import random_model, tiny_config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export_bundle(random_model(tiny_config()), f"{folder}/tiny.tarflow")
    >>> report.verification["status"]
    'passed'
    """
    stages = Stages(on_progress)
    given = {
        "tokens": tokens or None, "image_channels": image_channels, "patch_size": patch_size, "head_dim": head_dim,
        "noise_std": noise_std, "labels": labels,
    }  # fmt: skip
    with stages("check"):
        target = check(model_or_path, output, dtype=dtype, verify=verify, overwrite=overwrite)
    with stages("load"):
        loaded = load(model_or_path, dtype=dtype, **given)
    with stages("plan"):
        plan = plan_export(loaded.config, dtype)

    def add_reference(path: Path, extent: Extent) -> Mapping[str, float]:
        with stages("reference"):
            blocks = plan.config.blocks
            measured = compute_reference(loaded.model, extent, lambda k: stages.progress(k + 1, blocks))
            measured.reference.save(path)
        return measured.floors

    return make_bundle(
        target,
        plan,
        loaded.contents,
        add_reference=add_reference if verify else None,
        assumptions=loaded.assumptions,
        stages=stages,
        on_verified=on_verified,
    )


def plan_of(
    model_or_path: TarFlow | str | Path,
    output: str | Path | None = None,
    *,
    dtype: Precision = "float32",
    verify: bool = True,
    overwrite: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """What `export_bundle` would write, after the checks it would make, as data; writes nothing."""
    from tarflow_export._report import plan_facts  # noqa: PLC0415  (imports rich)

    target = check(model_or_path, output, dtype=dtype, verify=verify, overwrite=overwrite)
    loaded = load(model_or_path, dtype=dtype, **given)
    plan = plan_export(loaded.config, dtype)
    extent = extent_of(plan.config) if verify else None
    facts = plan_facts(plan, extent, loaded.contents.checkpoint["parameters"])
    return {"path": str(target.path), "assumptions": list(loaded.assumptions), **facts}


def check(
    model_or_path: TarFlow | str | Path, output: str | Path | None, *, dtype: str, verify: bool, overwrite: bool
) -> Target:
    """Stage `check`: everything that can be wrong before the checkpoint is read."""
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", hint="float32 is the default")
    if verify:
        import_onnxruntime()  # found out before the work
    if output is None:
        if isinstance(model_or_path, TarFlow):
            raise ExportError("a model in memory has no name to derive the bundle's from", hint="give output")
        output = default_output(model_or_path)
    return Target(output, overwrite=overwrite)


def load(model_or_path: TarFlow | str | Path, *, dtype: Precision, **given: Any) -> Loaded:
    """Stage `load`: read the checkpoint, and refuse weights that are not finite in `dtype`, naming the tensor."""
    source: dict[str, str | None] = {"file": None, "sha256": None}
    if isinstance(model_or_path, TarFlow):
        if unfit := [name for name, value in given.items() if value is not None]:
            raise ExportError(
                f"{', '.join(unfit)} given together with a model in memory", hint="set them in the model's FlowConfig"
            )
        model = model_or_path
    else:
        path = Path(model_or_path)
        model = load_checkpoint(path, **{name: value for name, value in given.items() if value is not None})
        with path.open("rb") as file:
            source = {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    for name, tensor in model.state_dict().items():
        array = tensor.detach().cpu().float().numpy()
        largest = float(max(-array.min(), array.max()))  # NaN where there is one
        if not math.isfinite(largest):
            raise ExportError(f"{name} holds values that are NaN or infinite", hint="the training run diverged")
        if dtype == "float16" and is_linear(name) and largest > torch.finfo(torch.float16).max:
            raise ExportError(f"{name} holds {largest:.3g}, beyond float16's 65504", hint="export with --dtype float32")
    prior = model.var.detach().cpu().float().numpy()
    contents = Contents(
        weight=weights_of(model),
        prior=prior if bool(np.any(prior != 1.0)) else None,
        checkpoint={**source, "parameters": sum(parameter.numel() for parameter in model.parameters())},
    )
    return Loaded(model=model, contents=contents, assumptions=tuple(model.assumptions))
