"""`verify`: it passes on every engine, finds one fault in any of its passes, and refuses references that do not fit."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tarflow_runtimes as tfr
from host_device import HostMaker, ReachMaker, open_flow
from rooms import Bundle, open_bundle
from tarflow_export import export_bundle
from tarflow_runtimes.measure.verify import verify
from tarflow_sdk.testing import random_model, tiny_config


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a reference."""
    folder = tmp_path_factory.mktemp("bundle")
    return export_bundle(random_model(tiny_config()), folder / "tiny.tarflow").path


@pytest.fixture(scope="module")
def flow(exported: Path) -> Iterator[tfr.Flow]:
    with tfr.load(exported) as opened:
        yield opened


@pytest.mark.parametrize("engine", ["cpu", "ort-cpu"])
def test_an_engine_passes_the_verification_that_travels(exported: Path, engine: str) -> None:
    with tfr.load(exported, engine) as flow:
        check_verification(flow)


def check_verification(flow: tfr.Flow) -> None:
    seen: list[int] = []
    records = verify(flow.bundle, flow.engine, on_block=seen.append)
    assert all(record.passed for record in records)
    assert seen == list(range(flow.config.blocks))
    assert {record.stage for record in records} >= {"forward", "gradient", "inverse", "sample", "denoise"}
    graphs = {"graphs/ort-cpu/step_guided.onnx", "graphs/ort-cpu/window_guided.onnx"}
    expected = {None} if flow.engine_name == "native" else graphs
    assert {record.graph for record in records if record.name.startswith("block 1 guided")} == expected
    assert {record.graph for record in records if record.name.startswith("whole model")} == {None}


def test_the_native_kernel_passes_on_the_shipped_bundle() -> None:
    """What the kernel computes is no graph's."""
    try:
        opened = tfr.load(engine="native")
    except tfr.EngineError as error:
        if "was not built" not in str(error):
            raise
        pytest.skip(f"{error}: {error.hint}")
    with opened as flow:
        records = verify(flow.bundle, flow.engine)
    assert all(record.passed for record in records)
    assert {record.graph for record in records if record.stage == "inverse"} == {None}
    assert len(records) > 30


@pytest.mark.parametrize("maker", [HostMaker, ReachMaker])
def test_the_decode_loop_passes(exported: Path, maker: type[HostMaker]) -> None:
    with open_flow(exported, maker) as flow:
        records = verify(flow.bundle, flow.engine)
    assert all(record.passed for record in records)
    assert {record.stage for record in records} >= {"forward", "gradient", "window", "inverse", "log_prob"}
    graphs = {record.graph for record in records if record.graph and record.graph.startswith("graphs/")}
    assert graphs == {f"graphs/{maker.provider}/{kind}.onnx" for kind in ("step", "window")}


class Wrong:
    """An engine with one fault, or one that says that it computes in bfloat16."""

    def __init__(self, engine: Any, fault: str) -> None:
        self.engine, self.fault = engine, fault
        self.name, self.provider = engine.name, engine.provider
        self.precision = "bfloat16" if fault == "precision" else engine.precision

    def forward(self, block: int, patches: Any, labels: Any) -> Any:
        z, log_det = self.engine.forward(block, patches, labels)
        if self.fault == "z":
            z = z + np.float32(1e-3)
        if self.fault == "log_det":
            log_det = -log_det
        return z, log_det

    def vjp(self, blocks: Any, patches: Any, labels: Any, cotangent: Any) -> Any:
        z, gradient = self.engine.vjp(blocks, patches, labels, cotangent)
        return z, gradient * np.float32(1.0001) if self.fault == "gradient" else gradient

    def invert(self, turns: Any, noise: Any, conditions: Any, on_step: Any = None) -> Any:
        changed: dict[str, Any] = {}
        if self.fault == "guidance":
            changed["guidance"] = conditions.guidance[:, ::-1] * np.array([[1.0], [0.9]], np.float32)
        if self.fault == "temperature":
            changed["inverse_temperature"] = np.ones_like(conditions.inverse_temperature)
        if self.fault == "label":
            changed["labels"] = conditions.labels[:, ::-1].copy()
        return self.engine.invert(turns, noise, dataclasses.replace(conditions, **changed), on_step)


@pytest.mark.parametrize("fault", ["z", "log_det", "gradient", "guidance", "temperature", "label"])
def test_a_wrong_engine_fails(flow: tfr.Flow, fault: str) -> None:
    assert not all(record.passed for record in verify(flow.bundle, Wrong(flow.engine, fault)))


def test_an_engine_is_judged_by_the_precision_that_it_computes_in(flow: tfr.Flow) -> None:
    exact, coarse = (
        {record.stage: record.tolerance for record in verify(flow.bundle, engine)}
        for engine in (flow.engine, Wrong(flow.engine, "precision"))
    )
    assert exact.keys() == coarse.keys()
    assert all(coarse[stage] > 10 * limit for stage, limit in exact.items())


def copy_with_reference(exported: Path, folder: Path, **changed: Any) -> Bundle:
    """The bundle with other arrays in its reference (None drops one); digests are not checked here."""
    path = folder / "changed.tarflow"
    shutil.copytree(exported, path)
    with np.load(path / "reference.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays = {name: array for name, array in {**arrays, **changed}.items() if array is not None}
    np.savez(path / "reference.npz", **arrays)
    bundle = open_bundle(exported)
    return dataclasses.replace(bundle, reference=path / "reference.npz")


@pytest.mark.parametrize(
    "changed",
    [
        {"trajectory": np.zeros((3, 1, 2, 2), np.float32)},
        {"trajectory": np.zeros((3,), np.float32)},
        {"log_prob": np.zeros(3, np.float64)},
        {"guided": None},
        {"tempered": None},
        {"sample": None},
        {"labels": None},
    ],
)
def test_a_reference_of_another_model_is_refused(flow: tfr.Flow, tmp_path: Path, changed: dict[str, Any]) -> None:
    bundle = copy_with_reference(flow.bundle.path, tmp_path, **changed)
    with pytest.raises(tfr.BundleError, match="reference"):
        verify(bundle, flow.engine)


def test_a_damaged_reference_is_refused(flow: tfr.Flow, tmp_path: Path) -> None:
    bundle = copy_with_reference(flow.bundle.path, tmp_path)
    assert bundle.reference is not None
    bundle.reference.write_bytes(b"PK\x03\x04 not a zip file")
    with pytest.raises(tfr.BundleError, match="damaged"):
        verify(bundle, flow.engine)


def test_a_bundle_without_reference_says_why(tmp_path: Path) -> None:
    path = export_bundle(random_model(tiny_config()), tmp_path / "x.tarflow", verify=False).path
    with tfr.load(path) as flow, pytest.raises(tfr.VerificationError, match="--no-verify"):
        verify(flow.bundle, flow.engine)
