"""`tarflow-train` as a shell sees it: what it writes, what it refuses, how it stops."""

import contextlib
import functools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import command_line
from tarflow_sdk import load_checkpoint, save_checkpoint
from tarflow_sdk.testing import random_model, tiny_config

Train = Callable[..., command_line.Result]
TINY = "--width 32 --head-dim 16 --layers 1 --blocks 2 --batch-size 8 --epochs 2 --evaluate-every 1 --precision float32"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, images=rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), labels=np.arange(40) % 3)
    return path


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Train:
    """Run `tarflow-train ARGUMENTS`."""
    return functools.partial(command_line.run, capsys, "tarflow-train")


def test_a_run_and_its_continuation(data: Path, tmp_path: Path, train: Train) -> None:
    folder, holdout = tmp_path / "run", tmp_path / "holdout.txt"
    holdout.write_text("0\n1\n2\n3\n")
    arguments = [data, "-o", folder, *TINY.split(), "--holdout", holdout, "--augment", "flip", "--seed", 3]
    done = train(*arguments)
    assert (done.code, done.err) == (0, "")
    rows = [line.split()[:4] for line in done.out.splitlines()]
    assert rows == [["epoch", "1", "step", "4"], ["epoch", "2", "step", "8"]]
    assert "bits_per_dim" in done.out
    assert "accuracy" in done.out
    model = load_checkpoint(folder / "model.safetensors")
    assert model.config.classes == 3
    assert model.config.labels == ("0", "1", "2")
    assert model.config.noise_std == 0.1
    assert len(list((folder / "samples").iterdir())) == 2

    refused = train(*arguments)
    assert refused.code == 2
    assert f"error: {folder} already holds a run\nhint: add --resume" in refused.err
    assert train(*arguments, "--resume") == command_line.Result(0, "", "")
    refused = train(*arguments, "--resume", "--learning-rate", "0.01")
    assert refused.code == 2
    assert "train.learning_rate 0.0001 -> 0.01" in refused.err


def test_starts_from_the_weights_of_a_checkpoint(data: Path, tmp_path: Path, train: Train) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    weights = first / "model.safetensors"
    assert train(data, "-o", first, *TINY.split()).code == 0
    options = [*TINY.split(), "--epochs", 1, "--learning-rate", 1e-9, "--weight-decay", 0, "--init", weights]
    assert train(data, "-o", second, *options).code == 0
    before, after = load_checkpoint(weights).state_dict(), load_checkpoint(second / "model.safetensors").state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)

    refused = train(data, "-o", tmp_path / "third", *options, "--width", 64)
    assert refused.code == 2
    assert "is another model: width 32 (here 64)" in refused.err


def test_other_kinds_of_models(data: Path, tmp_path: Path, train: Train) -> None:
    options = [*TINY.split(), "--epochs", 1]
    done = train(data, "-o", tmp_path / "a", *options, "--unconditional", "--uniform-noise", "--no-nvp")
    assert done.code == 0
    config = load_checkpoint(tmp_path / "a" / "model.safetensors").config
    assert (config.classes, config.labels, config.noise, config.noise_std, config.nvp) == (
        0,
        None,
        "uniform",
        None,
        False,
    )
    assert train(data, "-o", tmp_path / "b", *options, "--noise-std", "0.05").code == 0
    assert load_checkpoint(tmp_path / "b" / "model.safetensors").config.noise_std == 0.05


REFUSED = {
    "no data": (["absent.npz"], "absent.npz: no such file or folder"),
    "no argument": ([], "issing argument"),
    "unknown option": (["data.npz", "--colour", "red"], "--colour"),
    "no number": (["data.npz", "--epochs", "many"], "--epochs"),
    "noise twice": (["data.npz", "--uniform-noise", "--noise-std", "0.1"], "contradict each other"),
    "patch size": (["data.npz", "--patch-size", "3"], "image_size 8 is not a multiple of patch_size 3"),
    "head dimension": (["data.npz", "--head-dim", "48"], "width 128 is not a multiple of head_dim 48"),
    "image size": (["data.npz", "--image-size", "16"], "--image-size says 16"),
    "channels": (["data.npz", "--image-channels", "3"], "--image-channels says 3"),
    "epochs": (["data.npz", "--epochs", "0"], "epochs must be at least 1"),
    "batch size": (["data.npz", "--batch-size", "64"], "larger than the training set of 40 images"),
    "augmentation": (["data.npz", "--augment", "twist"], "augment must be one of none, flip, digits"),
    "precision": (["data.npz", "--precision", "int8"], "precision must be float32 or bfloat16"),
    "device": (["data.npz", "--device", "abacus"], "--device abacus: no such device"),
    "other device": (["data.npz", "--device", "meta"], "--device meta: PyTorch has no such device here"),
    "seed": (["data.npz", "--seed", "-1"], "seed must be at least 0"),
    "sigma": (["data.npz", "--noise-std", "0"], "noise_std must be a number in (0, 10)"),
    "nothing to resume": (["data.npz", "--batch-size", "8", "--resume"], "holds no run to resume"),
    "no holdout": (["data.npz", "--holdout", "absent.txt"], "absent.txt: cannot read image numbers"),
    "everything held out": (["data.npz", "--holdout", "all.txt"], "the training set is empty"),
    "unwritable": (["data.npz", "--batch-size", "8", "-o", "data.npz/run"], "cannot write"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input(
    arguments: list[str], message: str, data: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    monkeypatch.chdir(data.parent)
    (data.parent / "all.txt").write_text("\n".join(map(str, range(40))))
    before = sorted(data.parent.rglob("*"))
    refused = train(*arguments)
    assert (refused.code, refused.out) == (2, "")
    first, *rest = refused.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert len(rest) <= 1
    assert all(line.startswith("hint: ") for line in rest)
    assert sorted(data.parent.rglob("*")) == before


def test_divergence_is_exit_code_1(data: Path, tmp_path: Path, train: Train) -> None:
    model = random_model(tiny_config(width=32, head_dim=16, layers=1, labels=("0", "1", "2")))
    with torch.no_grad():
        model.flow_blocks[0].proj_out.bias[:] = -200.0
    save_checkpoint(model, tmp_path / "spoilt.safetensors")
    result = train(data, "-o", tmp_path / "run", *TINY.split(), "--init", tmp_path / "spoilt.safetensors")
    assert result.code == 1
    assert re.search("^error: loss (nan|inf)", result.err)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`signalled(step, *signals)`: send this process signals while the optimiser takes that step, from 1."""

    def plant(step: int, *numbers: int) -> None:
        taken, take = [], torch.optim.AdamW.step

        def interrupted(self: torch.optim.AdamW, *given: Any, **options: Any) -> Any:
            taken.append(self)
            if len(taken) == step:
                for number in numbers:
                    signal.raise_signal(number)
            return take(self, *given, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)

    return plant


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves_the_state(
    number: signal.Signals, data: Path, tmp_path: Path, train: Train, signalled: Callable[..., None]
) -> None:
    folder, handler = tmp_path / "run", signal.getsignal(number)
    signalled(3, number)
    result = train(data, "-o", folder, *TINY.split())
    assert result.code == 130
    assert result.err == f"interrupted; the state is in {folder}, continue with --resume\n"
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 3
    assert load_checkpoint(folder / "model.safetensors").config.classes == 3
    assert signal.getsignal(number) is handler


def test_a_second_signal_stops_at_once(
    data: Path, tmp_path: Path, train: Train, signalled: Callable[..., None]
) -> None:
    signalled(1, signal.SIGINT, signal.SIGINT)
    assert train(data, "-o", tmp_path / "run", *TINY.split()).code == 130
    assert not (tmp_path / "run" / "state.pt").exists()


def test_ctrl_c_in_a_process_of_its_own(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [*TINY.split(), "--epochs", "100000", "--evaluate-every", "100000"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [command_line.script("tarflow-train"), data, "-o", folder, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=one_thread,
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "model.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 130
    assert err == f"interrupted; the state is in {folder}, continue with --resume\n"
    assert torch.load(folder / "state.pt", weights_only=True)["step"] > 0
    assert not list(folder.glob(".*"))


def test_help_lists_the_options(train: Train) -> None:
    result = train("--help")
    assert result.code == 0
    for option in ("--log-dir", "--holdout", "--augment", "--label-dropout", "--resume", "--uniform-noise", "--no-nvp"):
        assert option in result.out
