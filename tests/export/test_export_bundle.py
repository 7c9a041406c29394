"""`export_bundle`: what it writes, that it writes all or nothing, and what it refuses."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rooms import open_bundle
from tarflow_export import ExportError, ExportReport, _target, _verify, export_bundle
from tarflow_export._source import bundle_config
from tarflow_export._verify import extent_of
from tarflow_runtimes import VerificationError
from tarflow_sdk import CheckpointError, FlowConfig, save_checkpoint
from tarflow_sdk.testing import random_model, tiny_config


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """A verified bundle of a tiny class model, read only."""
    return export_bundle(random_model(tiny_config()), tmp_path_factory.mktemp("bundle") / "tiny.tarflow")


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ({}, "float32"),
        ({"classes": 0, "blocks": 3, "layers": 1}, "float32"),
        ({"nvp": False}, "float32"),
        ({"image_channels": 5, "patch_size": 2}, "float32"),
        ({"noise": "uniform", "noise_std": None, "labels": ("a", "b", "c")}, "float32"),
        (dict.fromkeys(("image_size", "image_channels", "patch_size")) | {"tokens": 5, "token_values": 3}, "float32"),
        ({}, "float16"),
        ({"nvp": False, "classes": 0}, "float16"),
    ],
)
def test_exports_pass_and_reopen(tmp_path: Path, overrides: dict[str, Any], dtype: Any) -> None:
    config = tiny_config(**overrides)
    report = export_bundle(random_model(config), tmp_path / "x.tarflow", dtype=dtype)
    bundle = open_bundle(report.path)
    assert bundle.digest == report.digest
    assert bundle.precision == bundle.cache_dtype == dtype
    assert bundle.class_names == config.labels
    assert (bundle.prior_variance is None) == config.nvp
    assert bundle.manifest["verification"]["status"] == "passed"
    records = report.verification["records"]
    stages = {record["stage"] for record in records}
    expected = {
        "forward",
        "log_det",
        "gradient",
        "window",
        "inverse",
        "log_prob",
        "round_trip",
        "sample",
    }
    optional = {"denoise": config.noise_std is not None, "bits_per_dim": config.data == "image"}
    assert stages == expected | {stage for stage, is_there in optional.items() if is_there}
    named = {record["graph"] for record in records} - {None}
    assert named == {name for name in bundle.manifest["files"] if name.endswith(".onnx")}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.tarflow"]


def test_the_directory_holds_the_listed_files_and_nothing_else(passed: ExportReport) -> None:
    bundle = open_bundle(passed.path)
    found = {file.relative_to(passed.path).as_posix() for file in passed.path.rglob("*") if file.is_file()}
    assert found == {*bundle.manifest["files"], "manifest.json"}
    assert passed.path.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    import os

    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_the_manifest_describes_the_model_and_its_source(tmp_path: Path) -> None:
    config = tiny_config(labels=("ant", "bee", "cat"))
    save_checkpoint(random_model(config), tmp_path / "model.safetensors")
    report = export_bundle(tmp_path / "model.safetensors", tmp_path / "x.tarflow", verify=False)
    manifest = json.loads((report.path / "manifest.json").read_text())
    assert FlowConfig.from_json({"schema_version": 1, **manifest["config"]}) == config
    assert manifest["checkpoint"]["file"] == "model.safetensors"
    assert len(manifest["checkpoint"]["sha256"]) == 64
    assert manifest["checkpoint"]["parameters"] == sum(p.numel() for p in random_model(config).parameters())
    assert manifest["verification"]["status"] == "skipped"
    assert manifest["reference"] is None
    assert [block["order"] for block in manifest["blocks"]] == ["identity", "reversed"]
    assert set(manifest["dtypes"].values()) == {manifest["precision"]} == {"float32"}
    assert manifest["converted"] is None


def test_exporting_twice_writes_the_same_bytes(tmp_path: Path, passed: ExportReport) -> None:
    again = export_bundle(random_model(tiny_config()), tmp_path / "again.tarflow")
    first, second = (open_bundle(path).manifest["files"] for path in (passed.path, again.path))
    assert {name: file for name, file in first.items() if name != "reference.npz"} == {
        name: file for name, file in second.items() if name != "reference.npz"
    }


def test_the_bundle_is_hardly_larger_than_its_weights(tmp_path: Path) -> None:
    config = FlowConfig(
        image_size=16, image_channels=3, patch_size=2, width=256, blocks=2, layers=2, classes=3, noise_std=0.1
    )
    report = export_bundle(random_model(config), tmp_path / "x.tarflow", verify=False)
    assert 4 * report.parameters <= report.nbytes <= 1.05 * 4 * report.parameters


def test_every_number_of_the_reference_is_used_as_it_stands_in_the_bundle(passed: ExportReport) -> None:
    with np.load(passed.path / "reference.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert set(arrays["labels"].tolist()) == {0, 2, 3}  # null labels among others
    assert arrays["inverse_temperature"][1] != 1.0
    assert len(set(arrays["guidance"][0].tolist())) > 1  # annealed
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert np.abs(arrays["guided"] - arrays["unguided"]).max() > 1e-2
    assert np.abs(arrays["guided"] - arrays["tempered"]).max() > 1e-2


# -- all or nothing ----------------------------------------------------------------------------------------------


def test_a_failed_export_keeps_the_bundle_that_was_there(tmp_path: Path, wrong_weight: Callable[[str], None]) -> None:
    target = tmp_path / "x.tarflow"
    before = export_bundle(random_model(tiny_config()), target, verify=False).digest
    wrong_weight("proj_out.weight")
    with pytest.raises(VerificationError):
        export_bundle(random_model(tiny_config()), target, overwrite=True)
    assert open_bundle(target).digest == before
    assert list(tmp_path.iterdir()) == [target]


def test_the_manifest_is_written_once_and_last(tmp_path: Path) -> None:
    seen: dict[str, list[Path]] = {}

    def look(stage: str, done: int, total: int) -> None:
        seen[stage] = list(tmp_path.glob(".*/manifest.json"))

    report = export_bundle(random_model(tiny_config()), tmp_path / "x.tarflow", on_progress=look)
    assert list(seen) == ["check", "load", "plan", "write", "reference", "verify"]
    assert not any(seen.values())
    assert report.digest == open_bundle(report.path).digest


@pytest.mark.parametrize("stage", ["write", "reference", "verify"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, stage: str, error: Any) -> None:
    def interrupt(now: str, done: int, total: int) -> None:
        if now == stage and done == 1 and total > 1:
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        export_bundle(random_model(tiny_config()), tmp_path / "x.tarflow", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_bundle_that_is_replaced_is_never_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_exchange: bool
) -> None:
    """Names are exchanged in one step; where a file system cannot, an interrupt brings the old bundle back."""
    target = tmp_path / "x.tarflow"
    before = export_bundle(random_model(tiny_config()), target, verify=False).digest
    rename, calls = Path.rename, []

    def interrupted(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    if not can_exchange:
        monkeypatch.setattr(_target, "_exchange", lambda *_: False)
    with contextlib.nullcontext() if can_exchange else pytest.raises(KeyboardInterrupt):
        export_bundle(random_model(tiny_config(), seed=1), target, verify=False, overwrite=True)
    assert (open_bundle(target).digest == before) == (not can_exchange)
    assert len(calls) == (0 if can_exchange else 3)
    assert list(tmp_path.iterdir()) == [target]


def test_on_verified_sees_missed_tolerances(tmp_path: Path, wrong_weight: Callable[[str], None]) -> None:
    wrong_weight("proj_in.weight")
    seen: list[Any] = []
    with pytest.raises(VerificationError):
        export_bundle(random_model(tiny_config()), tmp_path / "x.tarflow", on_verified=seen.append)
    assert seen[0].to_json()["status"] == "failed"
    assert any(not record.passed for record in seen[0].records)


# -- what may be replaced ----------------------------------------------------------------------------------------


def test_overwrite_replaces_a_bundle_and_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "x.tarflow"
    first = export_bundle(random_model(tiny_config()), target, verify=False)
    with pytest.raises(ExportError, match="exists already") as caught:
        export_bundle(random_model(tiny_config()), target, verify=False)
    assert "--overwrite" in caught.value.hint
    second = export_bundle(random_model(tiny_config(), seed=1), target, verify=False, overwrite=True)
    assert first.digest != second.digest == open_bundle(target).digest
    assert list(tmp_path.iterdir()) == [target]


def test_overwrite_replaces_nothing_that_is_no_bundle(tmp_path: Path) -> None:
    bundle = export_bundle(random_model(tiny_config()), tmp_path / "kept.tarflow", verify=False).path
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(bundle, target_is_directory=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"format": "something", "files": {}}')
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("file", "folder", "link", "other"):
        with pytest.raises(ExportError, match="not replaced"):
            export_bundle(random_model(tiny_config()), tmp_path / name, verify=False, overwrite=True)
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds notes\.txt"):
        export_bundle(random_model(tiny_config()), bundle, verify=False, overwrite=True)
    assert (bundle / "notes.txt").exists()
    assert all(path.lstat().st_mtime_ns == before[path] for path in before if path != bundle)


@pytest.mark.parametrize("name", ["missing/x.tarflow", "..", "."])
def test_targets_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError) as caught:
        export_bundle(random_model(tiny_config()), f"{tmp_path}/{name}", verify=False)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = random_model(tiny_config())
    with torch.no_grad():
        model.blocks[1].attn_blocks[0].attention.qkv.weight[3, 4] = value
    with pytest.raises(ExportError, match=r"blocks\.1\.attn_blocks\.0\.attention\.qkv\.weight"):
        export_bundle(model, tmp_path / "x.tarflow", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_refused_by_name_in_float16_only(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    with torch.no_grad():
        model.blocks[0].proj_in.weight[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"blocks\.0\.proj_in\.weight") as caught:
        export_bundle(model, tmp_path / "x.tarflow", dtype="float16", verify=False)
    assert "float32" in caught.value.hint
    export_bundle(model, tmp_path / "x.tarflow", verify=False)


def test_a_model_whose_own_outputs_overflow_is_refused(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    with torch.no_grad():
        model.blocks[0].proj_out.bias[:] = -200.0
    with pytest.raises(ExportError, match="not finite") as caught:
        export_bundle(model, tmp_path / "x.tarflow")
    assert "--no-verify" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    model, target = random_model(tiny_config()), tmp_path / "x.tarflow"
    with pytest.raises(ExportError, match="bfloat16"):
        export_bundle(model, target, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="noise_std"):
        export_bundle(model, target, noise_std=0.1)
    with pytest.raises(ExportError, match="no name"):
        export_bundle(model)
    with pytest.raises(CheckpointError, match="no such file"):
        export_bundle(tmp_path / "none.safetensors", target)
    assert list(tmp_path.iterdir()) == []


def test_checks_come_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("no checkpoint")
    (tmp_path / "x.tarflow").mkdir()
    for target in (tmp_path / "x.tarflow", tmp_path / "missing" / "x.tarflow"):
        with pytest.raises(ExportError):
            export_bundle(tmp_path / "model.safetensors", target)


# -- extent ------------------------------------------------------------------------------------------------------


def test_small_models_are_verified_whole_and_large_ones_in_part() -> None:
    mnist = FlowConfig(image_size=28, image_channels=1, patch_size=4, width=128, blocks=4, layers=4, classes=10)
    small = extent_of(bundle_config(mnist))
    assert (small.images, small.steps, small.end_to_end) == (3, 48, True)
    afhq = FlowConfig(image_size=256, image_channels=3, patch_size=8, width=768, blocks=8, layers=8, classes=3)
    large = extent_of(bundle_config(afhq))
    assert large.images == 1
    assert 8 <= large.steps <= 64
    assert not large.end_to_end


def test_a_large_model_is_verified_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong_weight: Callable[[str], None]
) -> None:
    monkeypatch.setattr(_verify, "PASS_BUDGET", 1)
    monkeypatch.setattr(_verify, "STEP_BUDGET", 1)
    config = tiny_config(patch_size=2)
    report = export_bundle(random_model(config), tmp_path / "x.tarflow")
    stages = {record["stage"] for record in report.verification["records"]}
    assert {"inverse", "log_prob", "denoise"} <= stages
    assert not {"sample", "round_trip"} & stages
    extent = open_bundle(report.path).manifest["verification"]["extent"]
    assert (extent["images"], extent["steps"], extent["end_to_end"]) == (1, 8, False)
    assert "steps" in extent["rule"]
    wrong_weight("attn_blocks.0.attention.proj.weight")
    with pytest.raises(VerificationError):
        export_bundle(random_model(config), tmp_path / "y.tarflow")
