"""`convert_bundle`: what it rounds and how, what it verifies, what it refuses, and that it needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tarflow_export import ExportError, convert_bundle, export_bundle
from tarflow_runtimes.bundle.reader import open_bundle
from tarflow_sdk.testing import random_model, tiny_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified float32 bundle."""
    return export_bundle(random_model(tiny_config()), tmp_path_factory.mktemp("whole") / "x.tarflow").path


@pytest.fixture(scope="module")
def converted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """It in every other precision."""
    folder = tmp_path_factory.mktemp("converted")
    precisions: tuple[Any, ...] = ("float16", "bfloat16", "int8")
    return {one: convert_bundle(whole, folder / f"{one}.tarflow", precision=one).path for one in precisions}


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_converted_bundle_is_verified(whole: Path, converted: dict[str, Path], precision: str) -> None:
    bundle = open_bundle(converted[precision])
    verification = bundle.manifest["verification"]
    assert (bundle.precision, verification["status"]) == (precision, "passed")
    assert all(record["passed"] for record in verification["records"])
    assert {record["graph"] for record in verification["records"]} - {None} == {
        name for name in bundle.manifest["files"] if name.endswith(".onnx")
    }
    assert bundle.manifest["converted"] == {"digest": open_bundle(whole).digest, "precision": "float32"}
    assert bundle.manifest["checkpoint"] == open_bundle(whole).manifest["checkpoint"]


def test_bfloat16_is_rounded_to_nearest_even_and_says_that_nothing_was_verified(
    whole: Path, converted: dict[str, Path]
) -> None:
    source, bundle = open_bundle(whole), open_bundle(converted["bfloat16"])
    assert bundle.manifest["verification"]["status"] == "unverified"
    assert bundle.reference is not None  # what a GPU is to be compared with
    assert set(bundle.manifest["graphs"]) == {"portable", "ort-cuda", "trt"}
    for name, entry in bundle.tensors.items():
        before, after = source.tensor(1, name), bundle.tensor(1, name)
        if entry.dtype == "bfloat16":
            expected = torch.from_numpy(before).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(after, expected)
        else:
            assert "norm" in name or name.endswith("_embed") or name == "order"
            np.testing.assert_array_equal(after, before)


def test_float16_is_what_an_export_in_float16_writes(converted: dict[str, Path], tmp_path: Path) -> None:
    exported = export_bundle(random_model(tiny_config()), tmp_path / "x.tarflow", dtype="float16", verify=False)
    files, others = (open_bundle(path).manifest["files"] for path in (exported.path, converted["float16"]))
    assert files == {name: others[name] for name in files}


@pytest.mark.parametrize("patch_values", [16, 40])
def test_int8_is_the_nearest_of_255_levels_of_each_group(tmp_path: Path, patch_values: int) -> None:
    """Widths of 64 and 192: columns that fill no group, and several."""
    config = tiny_config(width=64 if patch_values == 16 else 192, layers=1, blocks=1)
    whole = export_bundle(random_model(config), tmp_path / "x.tarflow", verify=False).path
    rounded = convert_bundle(whole, tmp_path / "y.tarflow", precision="int8", verify=False).path
    source, bundle = open_bundle(whole), open_bundle(rounded)
    names = [name.removesuffix(".int8") for name in bundle.tensors if name.endswith(".int8")]
    assert {name.split(".", 2)[2] for name in names} == {
        *("attention.qkv.weight", "attention.proj.weight", "mlp.main.0.weight", "mlp.main.2.weight"),
    }
    for name in names:
        weight = source.tensor(0, name).astype(np.float64)
        levels = bundle.tensor(0, f"{name}.int8").astype(np.float64) - 128
        scale = bundle.tensor(0, f"{name}.scale").astype(np.float64)
        assert levels.shape == (len(weight), -(-weight.shape[1] // 128), 128)
        assert np.abs(levels).max() == 127
        found = (levels * scale[:, :, None]).reshape(len(weight), -1)
        assert not found[:, weight.shape[1] :].any()
        bound = np.repeat(scale, 128, axis=1)[:, : weight.shape[1]] * 0.5001
        assert (np.abs(found[:, : weight.shape[1]] - weight) <= bound).all()


def test_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    config = tiny_config(width=256, layers=2, blocks=1)
    whole = export_bundle(random_model(config), tmp_path / "x.tarflow", verify=False).path
    sizes = {"float32": open_bundle(whole).block_bytes}
    for precision in ("float16", "int8"):
        made: Any = precision
        path = convert_bundle(whole, tmp_path / f"{precision}.tarflow", precision=made, verify=False).path
        sizes[precision] = open_bundle(path).block_bytes
    assert 0.49 < sizes["float16"] / sizes["float32"] < 0.52
    assert 0.25 < sizes["int8"] / sizes["float32"] < 0.28


def test_what_cannot_be_converted(whole: Path, converted: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "y.tarflow"
    unverified = export_bundle(random_model(tiny_config()), tmp_path / "x.tarflow", verify=False).path
    large = random_model(tiny_config())
    with torch.no_grad():
        large.blocks[1].proj_in.weight[0, 0] = 1e5
    beyond = export_bundle(large, tmp_path / "large.tarflow", verify=False).path
    cases: list[tuple[Path, Path, Any, str, str]] = [
        (converted["float16"], target, "int8", "rounded again", "float32 bundle"),
        (unverified, target, "float16", "no reference", "--no-verify"),
        (whole, whole, "float16", "exists already", "--overwrite"),
        (whole, target, "float64", "precision must be one of", "float16"),
        (whole, tmp_path / "missing" / "y.tarflow", "int8", "does not exist", "folder"),
    ]
    for source, output, precision, message, hint in cases:
        with pytest.raises(ExportError, match=message) as caught:
            convert_bundle(source, output, precision=precision)
        assert hint in f"{caught.value} {caught.value.hint}"
    with pytest.raises(ExportError, match=r"blocks\.1\.proj_in\.weight holds values beyond the range of float16"):
        convert_bundle(beyond, target, precision="float16", verify=False)
    with pytest.raises(ExportError, match="is the bundle to convert"):
        convert_bundle(whole, whole, precision="float16", overwrite=True)
    assert not target.exists()


def test_convert_runs_where_pytorch_is_not(whole: Path, tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("torch", "safetensors", "scipy"):
    sys.modules[name] = None
from tarflow_export import convert_bundle
report = convert_bundle({str(whole)!r}, {str(tmp_path / "y.tarflow")!r}, precision="int8")
print(report.verification["status"], "tarflow_sdk._model" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "passed False\n", done.stderr
