"""`benchmarks/gpu.py`: every line that runs without a GPU, and its graphed sampler against the sequential one."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tarflow_sdk import FlowConfig, Guidance, decode
from tarflow_sdk.testing import random_model, tiny_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _floors import floor_seconds
from _gpu_table import table
from _graphed import GraphedSampler
from _peer import PeerError
from _work import SHAPES, Work
from gpu import FULL, QUICK, Judges, measure

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

CONFIGS = {
    "classes": tiny_config(patch_size=2),
    "unconditional": tiny_config(patch_size=2, classes=0, blocks=3),
    "volume preserving": tiny_config(patch_size=2, nvp=False),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_the_graphed_sampler(config: FlowConfig, dtype: torch.dtype, bound: float) -> None:
    """In turn with and without guidance and in two batches, for which it prepares itself anew."""
    model = random_model(config)
    sampler = GraphedSampler(model, device="cpu", dtype=dtype)
    for batch, guidance in ((3, Guidance(weight=1.5, anneal=True)), (3, Guidance()), (6, Guidance()), (3, Guidance())):
        z = torch.randn(batch, config.patches, config.patch_values, generator=torch.Generator().manual_seed(batch))
        labels = torch.arange(batch) % 4 - 1 if config.classes else None
        expected = decode(model, z, labels, guidance)
        torch.testing.assert_close(sampler(z, labels, guidance), expected, atol=bound, rtol=0)


def test_the_floor() -> None:
    """It is set by what takes longer, and half the bytes take half the time."""
    config: Any = CONFIGS["classes"]
    rates = {"read_gbs": 2.0, "copy_gbs": 1.0, "float32_tflops": 1e9, "float16_tflops": 1e9}
    bytes_only = floor_seconds(rates, config, rows=4, dtype="float32")
    assert floor_seconds(rates, config, rows=4, dtype="float16") == pytest.approx(bytes_only / 2)
    assert floor_seconds(rates | {"copy_gbs": 4.0}, config, rows=4, dtype="float32") == pytest.approx(bytes_only / 2)
    slow = floor_seconds(rates | {"float32_tflops": 1e-9}, config, rows=4, dtype="float32")
    assert slow > bytes_only
    assert floor_seconds(rates | {"float32_tflops": 1e-9}, config, rows=8, dtype="float32") == pytest.approx(2 * slow)


def test_the_shapes_of_the_acceptance() -> None:
    wide = next(case for case in FULL if case.model == "imagenet64")
    assert (tuple(wide.batches), tuple(wide.guidance), wide.blocks) == ((1, 8, 32, 128), (0.0, 1.5), None)
    assert {case.model for case in FULL} >= {"mnist", "imagenet64", "afhq"}
    assert {case.model for case in QUICK} == {"mnist", "imagenet64", "afhq"}


class Sampler:
    """A peer whose calls take so many seconds; None is a call that fails."""

    detail = None

    def __init__(self, *seconds: float | None, image: float = 0.0) -> None:
        self.seconds, self.image = list(seconds), image

    def call_rested(self, *, save: str | None = None, **_: Any) -> float:
        seconds = self.seconds.pop(0)
        if seconds is None:
            raise PeerError("out of memory")
        if save is not None:
            np.save(save, np.full((2, 1, 4, 4), self.image, np.float32))
        return seconds


def test_a_cell_of_the_table(tmp_path: Path) -> None:
    """Medians of the rounds and of their ratios; samplers that fail at first or later are named and left out."""
    work = Work(folder=tmp_path, model="tiny", config=SHAPES["tiny"])
    peers: dict[str, Any] = {
        "original": Sampler(9.0, 4.0, 8.0, 6.0, image=0.02),
        "graphed-float32": Sampler(None),
        "ort-cuda-float32": Sampler(5.0, 2.0, 2.0, 1.0),
        "trt-float32": Sampler(5.0, 1.0, None),
    }
    options = SimpleNamespace(rounds=3, limit=60.0, device="cuda")
    cell: dict[str, Any] = {"model": "tiny", "batch": 2, "guidance": 0.0, "window": None, "dtype": "float32"}
    judges: Judges = {}
    found = measure(peers, work, cell, options, judges)  # type: ignore[arg-type]
    assert found["failed"] == ["out of memory", "out of memory"]
    original, ours = found["rows"]
    assert (original["sampler"], ours["sampler"]) == ("original", "ort-cuda-float32")
    assert (ours["seconds"], ours["first_call_seconds"], ours["images_per_s"]) == (2.0, 5.0, 1.0)
    assert ours["faster_than"] == {"original": {"median": 4.0, "low": 2.0, "high": 6.0}}
    assert (ours["compared_with"], ours["psnr_db"], ours["max_difference"]) == ("ort-cuda-float32", None, 0.0)
    assert original["psnr_db"] == pytest.approx(40.0)
    for row in found["rows"]:
        row |= {"model_seconds": 8 * row["seconds"], "ms_per_step": 1.0, "floor_share": 0.25}
    lines = table(found).splitlines()
    assert "| ours, ort-cuda, float32 | 16 | 1.000 | 1 | 4.00 (2.00..6.00) | 25.0% | - | 0.0e+00 |" in lines
    assert lines.count("Did not run: out of memory") == 2

    half: dict[str, Any] = {"ort-cuda-float16": Sampler(1.0, 1.0, 1.0, 1.0, image=0.002)}
    [row] = measure(half, work, cell | {"dtype": "float16"}, options, judges)["rows"]  # type: ignore[arg-type]
    assert (row["compared_with"], row["psnr_db"]) == ("ort-cuda-float32", pytest.approx(60.0, abs=1e-3))
    nothing: dict[str, Any] = {"ort-cuda-float16": Sampler(None)}
    assert measure(nothing, work, cell | {"dtype": "float16"}, options, {})["rows"] == []  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_script_on_a_cpu(tmp_path: Path) -> None:
    """The engines of a GPU run over the host's memory; one that cannot start is named, with its reason."""
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--rounds", "1"]
    engines = ["--engines", "ort-cpu,ort-cuda,warp-drive", "--dtypes", "float32", "-o", str(tmp_path / "tiny")]
    done = subprocess.run([*command, *engines], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert result["header"]["device"] == "cpu"
    assert set(result["floors"]) == {"read_gbs", "copy_gbs", "float32_tflops", "float16_tflops", "bfloat16_tflops"}
    assert len(result["cells"]) == 8
    for cell in result["cells"]:
        ours = ["ort-cpu-float32", "ort-cuda-float32"]
        assert [row["sampler"] for row in cell["rows"]] == (
            ["graphed-float32"] if cell["window"] is None else []
        ) + ours
        assert all(row["max_difference"] < 1e-4 for row in cell["rows"])
        assert ["warp-drive" in reason for reason in cell["failed"]] == [True]
    markdown = (tmp_path / "tiny.md").read_text()
    assert markdown.count("\n## ") == 8
    assert "| ours, ort-cuda over the host's memory, float32 |" in markdown


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, str(SCRIPT), "--quick", "-o", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU: ")
    assert not list(tmp_path.iterdir())
