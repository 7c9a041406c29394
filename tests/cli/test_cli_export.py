"""`tarflow export` as a user meets it: what it leaves behind, and what it refuses."""

import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from rooms import open_bundle
from tarflow_sdk import save_checkpoint
from tarflow_sdk.testing import random_model, tiny_config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good checkpoints in both formats and bad ones of every kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = random_model(tiny_config())
    save_checkpoint(model, folder / "good.safetensors")
    save_checkpoint(model, folder / "mnist_model_4_64_2_2_0.10.pth")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    whole = (folder / "mnist_model_4_64_2_2_0.10.pth").read_bytes()
    (folder / "mnist_model_4_128_2_2_0.10.pth").write_bytes(whole)
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pth").write_text("not a checkpoint")
    torch.save({"layer.weight": torch.zeros(3, 3)}, folder / "foreign.pth")
    save_file({"layer.weight": torch.zeros(3, 3)}, folder / "foreign.safetensors")
    with (folder / "code.pth").open("wb") as file:
        pickle.dump(Evil(), file)
    torch.save({"blocks.0.proj_in.weight": Evil()}, folder / "zipped_code.pth")
    tensors = load_file(folder / "good.safetensors")
    tensors["blocks.1.proj_in.bias"][3] = float("nan")
    save_file(tensors, folder / "nan.safetensors")
    return folder


class Evil:
    """Unpickling this makes a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("evil"),))


def test_a_bundle_and_nothing_else(tarflow: Callable, checkpoints: Path) -> None:
    result = tarflow("export", checkpoints / "good.safetensors")
    assert result.code == 0
    assert Path(result.out.strip()) == Path.cwd() / "good.tarflow"
    assert [path.name for path in Path.cwd().iterdir()] == ["good.tarflow"]
    assert open_bundle("good.tarflow").manifest["verification"]["status"] == "passed"


def test_overwrite(tarflow: Callable, checkpoints: Path) -> None:
    options = ("export", checkpoints / "good.safetensors", "--no-verify", "-o", "x.tarflow")
    assert tarflow(*options).code == 0
    assert tarflow(*options).code == 2
    before = open_bundle("x.tarflow").digest
    assert tarflow(*options, "--dtype", "float16", "--overwrite").code == 0
    assert open_bundle("x.tarflow").digest != before
    assert [path.name for path in Path.cwd().iterdir()] == ["x.tarflow"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.pth",), "no such file"),
        (("cut.safetensors",), "cut.safetensors"),
        (("cut.pth", "--head-dim", 32), "cut.pth"),
        (("text.pth",), "text.pth"),
        (("foreign.pth",), "foreign.pth"),
        (("foreign.safetensors",), "foreign.safetensors"),
        (("code.pth",), "code"),
        (("zipped_code.pth",), "code"),
        (("nan.safetensors", "--head-dim", 32, "--image-channels", 1), "blocks.1.proj_in.bias"),
        (("good.safetensors", "--image-channels", 3), "image"),
        (("good.safetensors", "--patch-size", 2), "patch"),
        (("good.safetensors", "--head-dim", 48), "head"),
        (("mnist_model_4_128_2_2_0.10.pth",), "width"),
        (("mnist_model_4_64_2_2_0.10.pth", "--head-dim", 32, "--noise-std", -1), "noise"),
        (("good.safetensors", "--dtype", "int8"), "dtype must be one of"),
        (("good.safetensors", "--labels", "none.txt"), "none.txt"),
        (("good.safetensors", "--labels", "two.txt"), "2 label names for 3 classes"),
        (("good.safetensors", "--labels", "binary.txt"), "not UTF-8 text"),
        (("good.safetensors", "--labels", "gap.txt"), "empty line"),
        (("good.safetensors", "--noise-std", "0.5"), "noise_std"),
        (("good.safetensors", "-o", "no/x.tarflow"), "does not exist"),
        (("good.safetensors", "-o", "here.tarflow"), "exists already"),
        (("good.safetensors", "-o", "here.tarflow", "--overwrite"), "is not a bundle"),
        (("good.safetensors", "-o", "file.tarflow", "--overwrite"), "not a directory"),
        (("good.safetensors", "-o", "/proc/x.tarflow"), "/proc/x.tarflow"),
    ],
)
def test_bad_input(refused: Callable, checkpoints: Path, arguments: tuple[object, ...], message: str) -> None:
    Path("here.tarflow").mkdir()
    Path("here.tarflow/thesis.tex").touch()
    Path("file.tarflow").touch()
    Path("two.txt").write_text("ant\nbee\n")
    Path("gap.txt").write_text("ant\n\nbee\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    checkpoint, *options = arguments
    assert message in refused("export", checkpoints / str(checkpoint), *options, hinted=False).err


@pytest.mark.parametrize("stage", ["write", "verify"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(
    tarflow: Callable, checkpoints: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: int
) -> None:
    """As the first file is written, and as the first graph is opened to be verified."""
    owner, name = {"write": (Path, "write_bytes"), "verify": (onnxruntime, "InferenceSession")}[stage]
    original, raised = getattr(owner, name), []

    def interrupted(*given: Any, **options: Any) -> Any:
        if not raised:
            raised.append(len(list(Path.cwd().iterdir())))
            signal.raise_signal(number)
        return original(*given, **options)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(owner, name, interrupted)
    try:
        result = tarflow("export", checkpoints / "good.safetensors")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.code, result.out, result.err) == (130, "", "interrupted; nothing was written\n")
    assert raised == [1], "the bundle as it grows"
    assert list(Path.cwd().iterdir()) == []


def test_noise_of_the_file_name_is_kept(tarflow: Callable, checkpoints: Path) -> None:
    checkpoint = checkpoints / "mnist_model_4_64_2_2_0.10.pth"
    result = tarflow("export", checkpoint, "--head-dim", 32, "--image-channels", 1, "--no-verify", "-o", "x.tarflow")
    assert result.code == 0
    config = open_bundle("x.tarflow").config
    assert np.isclose(config.noise_std, 0.1)
