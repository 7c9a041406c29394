"""What an engine on a GPU must show, on the shipped digits; stand-ins show it on a tiny model (see conftest.py)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import command_line
import tarflow_runtimes as tfr
from tarflow_runtimes.engines.gpu.device import Replay
from tarflow_runtimes.engines.gpu.workspace import Workspace

pytestmark = pytest.mark.timeout(3600)  # TensorRT builds engines in minutes

ENGINES = ("ort-cuda", "trt", "trt-rtx")
IMAGES, SEED = 4, 11
LABELS = [0, 1, 2, None]

WAYS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "guided": {"guidance": 1.5},
    "each image in its own way": {
        "guidance": [0.0, 1.5, tfr.Guidance(weight=2.0, anneal=True, attention_temperature=0.8), 1.0]
    },
    "windows": {"plan": tfr.Parallel(window=8)},
    "whole blocks, guided": {"plan": tfr.Parallel(), "guidance": 1.5},
}
every_way = pytest.mark.parametrize("way", WAYS)


def draw(flow: tfr.Flow, count: int = IMAGES, **options: Any) -> tfr.Sample:
    labels = [LABELS[image % len(LABELS)] for image in range(count)]
    return flow.sample(count, labels=labels, seed=SEED, denoise=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_ready(engine: str, verdicts: Mapping[str, Any]) -> None:
    """The other tests run on the engines that are."""
    verdict = verdicts[engine]
    if not verdict["ready"]:
        pytest.skip(f"engine {engine} is not ready: {verdict['problem']}; {verdict['remedy']}")


@every_way
def test_pictures_are_those_of_the_cpu(flow: tfr.Flow, cpu: tfr.Flow, close: Callable[..., None], way: str) -> None:
    close(draw(flow, **WAYS[way]).images, draw(cpu, **WAYS[way]).images)


def test_a_second_batch_size(flow: tfr.Flow, cpu: tfr.Flow, close: Callable[..., None]) -> None:
    close(draw(flow, 3, guidance=1.5).images, draw(cpu, 3, guidance=1.5).images)


def test_denoised_pictures(flow: tfr.Flow, cpu: tfr.Flow, close: Callable[..., None]) -> None:
    options: dict[str, Any] = {"labels": LABELS, "seed": SEED, "guidance": 1.5}
    close(flow.sample(IMAGES, **options).images, cpu.sample(IMAGES, **options).images)


def test_density(flow: tfr.Flow, cpu: tfr.Flow, target: Any) -> None:
    images = draw(cpu).images
    bound = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 1e-1}[target.precision]
    np.testing.assert_allclose(flow.bits_per_dim(images, LABELS), cpu.bits_per_dim(images, LABELS), atol=bound)


def test_nothing_crosses_per_step(flow: tfr.Flow) -> None:
    """A run of all blocks takes a handful of uploads and one download, however many steps there are."""
    draw(flow)
    transfers = flow.engine.device.transfers
    before = dataclasses.replace(transfers)
    draw(flow)
    steps = flow.config.blocks * (flow.config.patches - 1)
    latents = 4 * IMAGES * flow.config.patches * flow.config.patch_values
    assert transfers.downloads - before.downloads == 1
    assert transfers.downloaded_bytes - before.downloaded_bytes == latents
    assert 1 <= transfers.uploads - before.uploads <= 5 < steps
    assert latents <= transfers.uploaded_bytes - before.uploaded_bytes <= 2 * latents + 4096


def test_parallel_blocks_look_at_positions_alone(flow: tfr.Flow) -> None:
    plan = tfr.Parallel(window=8)
    draw(flow, plan=plan)
    transfers = flow.engine.device.transfers
    before = dataclasses.replace(transfers)
    sample = draw(flow, plan=plan)
    evaluations = sum(max(block.calls) for block in sample.report.blocks)
    latents = 4 * IMAGES * flow.config.patches * flow.config.patch_values
    assert 1 < transfers.downloads - before.downloads <= 1 + evaluations
    assert transfers.downloaded_bytes - before.downloaded_bytes <= latents + 1024 * evaluations


def test_recorded_steps_are_the_steps(flow: tfr.Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs, where there are any, give what the launches one by one give, as far as these give it twice."""

    class Eagerly:
        def __init__(self, launches: list[Any]) -> None:
            self._launches = launches

        def replay(self) -> None:
            for launch in self._launches:
                launch.launch()

    recorded = draw(flow, guidance=1.5).images
    launched = []

    def eager(workspace: Workspace, *place: Any) -> Replay:
        launched.append(place[-1])
        return Eagerly([workspace.bound(*place[:-1], step % 2) for step in range(place[-1])])

    monkeypatch.setattr(Workspace, "recorded", eager)
    eager_images, again = (draw(flow, guidance=1.5).images for _ in range(2))
    assert np.abs(recorded - eager_images).max() <= 4 * np.abs(again - eager_images).max()
    assert sum(launched) >= 2 * flow.config.blocks * (flow.config.patches - 2)


@pytest.mark.parametrize("plan", [None, tfr.Parallel(window=8)], ids=["sequential", "parallel"])
def test_cancelling(flow: tfr.Flow, plan: Any) -> None:
    """It takes effect within a group of 16 steps, and the next run knows nothing of it."""
    expected = draw(flow, plan=plan).images
    heard: list[int] = []

    def stop(step: Any) -> bool:
        heard.append(step.step)
        return len(heard) < 3

    with pytest.raises(tfr.Cancelled):
        draw(flow, plan=plan, on_step=stop)
    assert len(heard) == 3
    assert plan is not None or heard[-1] <= 3 * 16
    np.testing.assert_array_equal(draw(flow, plan=plan).images, expected)


def test_the_report_names_what_runs(flow: tfr.Flow, target: Any) -> None:
    report = flow.engine_report
    assert (report["engine"], report["weights"]) == (target.engine, target.precision)
    assert report["device"]
    if target.engine == "ort-cuda":
        assert report["provider"] == ("CPUExecutionProvider" if target.stands_in else "CUDAExecutionProvider")
        assert any("onnxruntime" in path for path in report["libraries"])


def test_images_stay_on_the_device(flow: tfr.Flow, target: Any) -> None:
    """PyTorch takes them without a copy, and they outlive the sample."""
    torch = pytest.importorskip("torch")
    if not target.stands_in and not torch.cuda.is_available():
        pytest.skip("PyTorch is installed without CUDA: pip install torch, a build for this driver's CUDA")
    sample = draw(flow)
    tensor = torch.from_dlpack(sample.images_device)
    assert tensor.device.type == ("cpu" if target.stands_in else "cuda")
    images = sample.images
    del sample
    np.testing.assert_array_equal(tensor.cpu().numpy(), images)


def test_engines_are_built_once(
    flow: tfr.Flow, open_flow: Callable[..., tfr.Flow], target: Any, engine_dir: Path
) -> None:
    """What one flow has built, the next finds; ONNX Runtime builds nothing."""
    expected = draw(flow, guidance=1.5).images
    built = {path: path.stat().st_mtime_ns for path in engine_dir.glob("*.engine")}
    assert bool(built) == (target.engine != "ort-cuda")
    with open_flow() as again:
        np.testing.assert_array_equal(draw(again, guidance=1.5).images, expected)
    assert {path: path.stat().st_mtime_ns for path in engine_dir.glob("*.engine")} == built


@pytest.mark.usefixtures("open_flow")
def test_verify_and_its_record(bundle: Path, target: Any, engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tarflow verify` passes, and the engines that it used know it."""

    def run(*arguments: object) -> Any:
        result = command_line.run(capsys, "tarflow", *arguments)
        assert result.code == 0, result.err
        return json.loads(result.out)

    place = ("--engine-dir", engine_dir, "--json")
    tf32 = ["--tf32"] if target.precision == "tf32" else []
    report = run("verify", bundle, "--engine", target.engine, *tf32, *place)
    assert (report["engine"], report["precision"], report["passed"]) == (target.engine, target.precision, True)
    if target.engine != "ort-cuda":
        engines = run("cache", "list", *place)["engines"]
        verified = [one["name"] for one in engines if one["verified"] == "verified"]
        kinds = {"step", "window", "forward", "gradient"}
        assert {kind for kind in kinds if any(f" {kind} " in name for name in verified)} == kinds
