"""`convert_bundle`: what it rounds and how, what it verifies, what it refuses, and that it needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rooms import open_bundle
from tarflow_export import ExportError, convert_bundle, export_bundle
from tarflow_runtimes import BundleError
from tarflow_sdk.testing import random_model, tiny_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified float32 bundle; some weights lie halfway between two of bfloat16, above an even one and an odd one."""
    model = random_model(tiny_config())
    with torch.no_grad():
        model.blocks[1].proj_in.weight[0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, -1 - 3 * 2**-8]) / 8
    return export_bundle(model, tmp_path_factory.mktemp("whole") / "x.tarflow").path


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
    ties = bundle.tensor(1, "proj_in.weight")[0, :4] & 0x7FFF
    assert [hex(bits) for bits in ties] == ["0x3e00", "0x3e02", "0x3e00", "0x3e02"]


def test_float16_is_what_an_export_in_float16_writes(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    whole = export_bundle(model, tmp_path / "whole.tarflow", verify=False).path
    converted = convert_bundle(whole, tmp_path / "half.tarflow", precision="float16", verify=False)
    exported = export_bundle(model, tmp_path / "x.tarflow", dtype="float16", verify=False)
    files, others = (open_bundle(report.path).manifest["files"] for report in (exported, converted))
    assert files == others


@pytest.mark.parametrize("width", [64, 192])
def test_int8_is_the_nearest_of_255_levels_of_each_group(tmp_path: Path, width: int) -> None:
    """Columns that fill no group, and one and a half; and a row of zeros."""
    model = random_model(tiny_config(width=width, layers=1, blocks=1))
    with torch.no_grad():
        model.blocks[0].attn_blocks[0].attention.qkv.weight[0] = 0
    whole = export_bundle(model, tmp_path / "x.tarflow", verify=False).path
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
        assert (np.isfinite(scale) & (scale > 0)).all()
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


def refused(source: Path, output: Path, **options: Any) -> str:
    """The one line of the refusal, and its hint."""
    with pytest.raises(ExportError) as caught:
        convert_bundle(source, output, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return f"{caught.value}; {caught.value.hint}"


def test_a_rounded_bundle_is_converted_from_its_source_instead(
    whole: Path, converted: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "y.tarflow"
    for path in converted.values():
        assert "the float32 bundle that it was made from" in refused(path, target, precision="int8")
    assert convert_bundle(whole, target, precision="int8", verify=False).path == target


def test_a_bundle_without_a_reference_is_converted_unverified(tmp_path: Path) -> None:
    target = tmp_path / "y.tarflow"
    source = export_bundle(random_model(tiny_config()), tmp_path / "x.tarflow", verify=False).path
    for precision in ("float16", "bfloat16", "int8"):
        assert "--no-verify" in refused(source, target, precision=precision)
    assert convert_bundle(source, target, precision="float16", verify=False).verification["status"] == "skipped"


def test_weights_beyond_float16_are_named(tmp_path: Path) -> None:
    target, model = tmp_path / "y.tarflow", random_model(tiny_config())
    with torch.no_grad():
        model.blocks[1].proj_in.weight[0, 0] = 1e5
    source = export_bundle(model, tmp_path / "x.tarflow", verify=False).path
    words = refused(source, target, precision="float16", verify=False)
    assert words.startswith("blocks.1.proj_in.weight holds values beyond the range of float16")
    assert sorted(tmp_path.iterdir()) == [source]
    convert_bundle(source, target, precision="bfloat16", verify=False)


def test_targets_and_precisions_that_do_not_fit(whole: Path, tmp_path: Path) -> None:
    before = open_bundle(whole).digest
    assert "--overwrite" in refused(whole, whole, precision="float16")
    assert "another name" in refused(whole, whole, precision="float16", overwrite=True)
    assert "does not exist" in refused(whole, tmp_path / "missing" / "y.tarflow", precision="int8")
    assert open_bundle(whole).digest == before
    for precision in ("float32", "float64", "int4"):
        with pytest.raises(ExportError, match="precision must be one of float16, bfloat16, int8, got") as caught:
            convert_bundle(whole, tmp_path / "y.tarflow", precision=precision)  # type: ignore[arg-type]
        assert "int8 quarters them" in caught.value.hint
    with pytest.raises(BundleError, match="no such directory"):
        convert_bundle(tmp_path / "none.tarflow", tmp_path / "y.tarflow", precision="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["write", "verify"])
def test_an_interrupted_conversion_leaves_what_was_there(whole: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(now: str, done: int, total: int) -> None:
        if now == stage and done == 1 and total > 1:
            raise KeyboardInterrupt

    target = tmp_path / "y.tarflow"
    before = convert_bundle(whole, target, precision="float16", verify=False).digest
    with pytest.raises(KeyboardInterrupt):
        convert_bundle(whole, target, precision="int8", overwrite=True, on_progress=interrupt)
    assert open_bundle(target).digest == before
    assert list(tmp_path.iterdir()) == [target]


def test_convert_runs_where_pytorch_is_not(whole: Path, tmp_path: Path) -> None:
    """Of the training core it needs one module alone: the base class of errors."""
    code = f"""
import sys
for name in ("torch", "safetensors", "scipy"):
    sys.modules[name] = None
from tarflow_export import convert_bundle
print(convert_bundle({str(whole)!r}, {str(tmp_path / "y.tarflow")!r}, precision="int8").verification["status"])
print(len([name for name in sys.modules if name.startswith("tarflow_sdk")]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "passed\n2\n", done.stderr
