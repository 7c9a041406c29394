"""The trainer: every part of a step, and runs that are stopped, killed, resumed and spread over processes."""

import csv
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tarflow_sdk import ConfigError, DataError, FlowConfig, TarFlow, TarFlowError, encode, load_checkpoint
from tarflow_sdk._data import Images
from tarflow_sdk._evaluate import add_noise, evaluate, generator_for, sample_grid
from tarflow_sdk._train import Interrupted, Progress, Trainer, TrainingDiverged
from tarflow_sdk._train_config import TrainConfig, learning_rate
from tarflow_sdk.testing import random_model, tiny_config

CONFIG = tiny_config(width=32, head_dim=16, layers=1)
TRAIN = TrainConfig(epochs=2, batch_size=4, learning_rate=1e-2, evaluate_every=1, save_every=100, augment="flip")


def some_images(count: int = 24, classes: int = 3, channels: int = 1) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, channels, 8, 8), dtype=np.uint8)
    labels = torch.arange(count) % classes if classes else None
    return Images(pixels=torch.from_numpy(pixels), labels=labels, names=tuple("abc"[:classes]))


def trainer(
    folder: Path, train: TrainConfig = TRAIN, config: FlowConfig = CONFIG, images: Images | None = None
) -> Trainer:
    images = images or some_images(classes=config.classes)
    return Trainer(random_model(config), train, images, images.take(torch.arange(5)), folder=folder)


def everything(run: Trainer) -> dict[str, Tensor]:
    """All tensors that a run depends on."""
    moments = {
        f"optimizer/{index}/{name}": value
        for index, state in run.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    averaged = {f"averaged/{name}": value for name, value in run.averaged.state_dict().items()}
    return {name: value.clone() for name, value in {**run.model.state_dict(), **averaged, **moments}.items()}


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


# -- one step ----------------------------------------------------------------------------------------------------


def test_a_step_follows_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    x, labels = run.batch(0)
    with torch.no_grad():
        z, log_det = run.model(x, labels)
    expected = float(0.5 * z.square().mean() - log_det.mean() / CONFIG.dims)
    progress = run.optimise()
    assert math.isclose(progress.loss, expected, rel_tol=1e-5)
    assert (progress.step, progress.steps, progress.epoch) == (1, 12, 0)


def test_training_learns(tmp_path: Path) -> None:
    """Flat images are far more likely after sixty steps, and the class is found in the grey of one corner."""
    pixels = torch.full((60, 1, 8, 8), 128, dtype=torch.uint8)
    pixels[:, :, :4, 4:] = torch.tensor([40, 128, 215], dtype=torch.uint8).repeat(20).view(-1, 1, 1, 1)
    images = Images(pixels=pixels, labels=torch.arange(60) % 3, names=tuple("abc"))
    train = TrainConfig(epochs=20, batch_size=20, learning_rate=1e-2, ema_decay=0.5, evaluate_every=20)
    torch.manual_seed(0)
    run = Trainer(TarFlow(CONFIG), train, images, images, folder=tmp_path)
    before = evaluate(run.averaged, images)
    (row,) = run.run()
    assert row["bits_per_dim"] < before["bits_per_dim"] - 1.0
    assert row["accuracy"] > 0.9
    assert [progress["loss"] for progress in curve(tmp_path)] == [str(row["loss"])]


def test_label_dropout(tmp_path: Path) -> None:
    images = some_images(600)
    for rate in (0.0, 0.3):
        run = trainer(tmp_path, dataclasses.replace(TRAIN, batch_size=600, label_dropout=rate), images=images)
        _, labels = run.batch(0)
        assert labels is not None
        assert abs(float((labels == -1).float().mean()) - rate) < (0.06 if rate else 1e-9)
        assert set(labels.tolist()) == ({0, 1, 2, -1} if rate else {0, 1, 2})


def test_unconditional_models_ignore_labels(tmp_path: Path) -> None:
    config = tiny_config(width=32, head_dim=16, layers=1, classes=0)
    run = trainer(tmp_path, config=config, images=some_images(classes=3))
    assert run.batch(0)[1] is None
    assert "accuracy" not in evaluate(run.averaged, run.validation)


def test_every_image_is_seen_once_an_epoch(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, noise_std=1e-4)
    run = trainer(tmp_path, dataclasses.replace(TRAIN, augment="none"), config)
    orders = []
    for epoch in range(2):
        seen = torch.cat([run.batch(epoch * 6 + i)[0] for i in range(6)])
        distances = torch.cdist(seen.flatten(1), run.images.model_range(torch.arange(24)).flatten(1))
        orders.append(distances.argmin(dim=1).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))
    assert orders[0] != orders[1]


def test_gaussian_noise() -> None:
    x = torch.zeros(100, 1, 8, 8)
    noise = add_noise(x, CONFIG, torch.Generator().manual_seed(0))
    assert abs(float(noise.std()) - 0.1) < 0.005
    assert torch.equal(noise, add_noise(x, CONFIG, torch.Generator().manual_seed(0)))


def test_uniform_noise_stays_in_its_level_of_width_one_128th() -> None:
    config = tiny_config(noise="uniform", noise_std=None)
    pixels = torch.arange(256).view(4, 1, 8, 8)
    for seed in range(20):
        x = add_noise(pixels / 127.5 - 1, config, torch.Generator().manual_seed(seed))
        offset = (x + 1) * 128 - pixels
        assert x.min() >= -1
        assert x.max() < 1
        assert offset.min() >= -1e-4
        assert offset.max() <= 1 + 1e-4
        assert offset.std() > 0.2
        assert torch.equal(torch.floor((x + 1) * 128).clip(0, 255).int(), pixels.int())


def test_gradients_are_clipped(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(TRAIN, clip_norm=1e-3))
    assert run.optimise().norm > 1e-2
    norms = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None])
    assert abs(float(norms.norm()) - 1e-3) < 1e-5


def test_weights_are_averaged(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(TRAIN, ema_decay=0.15))
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.optimise()
    for old, new, mean in zip(before, run.model.parameters(), run.averaged.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.1 * old + 0.9 * new)  # (1 + 0) / (10 + 0) in the first step
    before = [parameter.detach().clone() for parameter in run.averaged.parameters()]
    run.optimise()
    for old, new, mean in zip(before, run.model.parameters(), run.averaged.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.15 * old + 0.85 * new)


def test_volume_preserving_models_learn_the_prior_variance(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=tiny_config(width=32, head_dim=16, layers=1, nvp=False))
    before = run.model.var.clone()
    x, labels = run.batch(0)
    with torch.no_grad():
        z, _ = run.model(x, labels)
    run.optimise()
    torch.testing.assert_close(run.model.var, 0.9 * before + 0.1 * z.square().mean(dim=0))
    assert torch.equal(run.averaged.var, run.model.var)
    nvp = trainer(tmp_path)
    nvp.optimise()
    assert (nvp.model.var == 1).all()


def test_bfloat16_trains(tmp_path: Path) -> None:
    exact, rough = trainer(tmp_path), trainer(tmp_path, dataclasses.replace(TRAIN, precision="bfloat16"))
    assert 0 < abs(exact.optimise().loss - rough.optimise().loss) < 0.05
    assert {parameter.dtype for parameter in rough.model.parameters()} == {torch.float32}


def test_learning_rate_schedule() -> None:
    rates = [learning_rate(step, 110, 10, 1e-3) for step in range(110)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx((1e-3 + 1e-6) / 2)
    assert 1e-6 < rates[-1] < 2e-6
    assert learning_rate(3, 4, 4, 1.0) == 1.0  # one epoch is all warm-up


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_divergence_ends_the_run_before_the_weights_are_spoiled(
    poison: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)
    run.optimise()
    good, batch = everything(run), run.batch
    monkeypatch.setattr(run, "batch", lambda step: (batch(step)[0] * poison, None))
    with pytest.raises(TrainingDiverged, match="step 1: training diverged"):
        next(run.run())
    assert_identical(everything(run), good)
    assert not run.state_path.exists()


# -- runs --------------------------------------------------------------------------------------------------------


def test_what_a_run_writes(tmp_path: Path) -> None:
    run = trainer(tmp_path / "new" / "folder")
    rows = list(run.run())
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    samples = {f"samples/epoch_000{epoch}.png" for epoch in (1, 2)}
    assert names == {"train.json", "log.csv", "state.pt", "model.safetensors", *samples}
    assert [row["epoch"] for row in rows] == [1, 2]
    assert list(curve(run.folder)[0]) == ["epoch", "step", "lr", "loss", "bits_per_dim", "accuracy"]
    settings = json.loads((run.folder / "train.json").read_text())
    assert settings["train"] == dataclasses.asdict(TRAIN)
    saved = load_checkpoint(run.folder / "model.safetensors")
    assert saved.config == CONFIG
    assert torch.equal(saved.flow_blocks[0].proj_in.weight, run.averaged.flow_blocks[0].proj_in.weight)


def stop_after(run: Trainer, step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        run.stop_requested = progress.step == step

    return on_step


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("step", [1, 5, 6, 7, 12])
def test_a_stopped_run_continues_as_if_nothing_had_happened(step: int, nvp: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, nvp=nvp)
    straight = trainer(tmp_path / "straight", config=config)
    list(straight.run())
    first = trainer(tmp_path / "resumed", config=config)
    with pytest.raises(Interrupted):
        list(first.run(stop_after(first, step)))
    assert first.step == step
    second = trainer(tmp_path / "resumed", config=config)
    second.resume()
    assert_identical(everything(second), everything(first))
    list(second.run())
    assert_identical(everything(second), everything(straight))
    assert curve(tmp_path / "resumed") == curve(tmp_path / "straight")


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_killed_run_repeats_the_steps_since_the_last_save(step: int, tmp_path: Path) -> None:
    train = dataclasses.replace(TRAIN, save_every=3)
    straight = trainer(tmp_path / "straight", train)
    list(straight.run())
    first = trainer(tmp_path / "killed", train)

    def kill(progress: Progress) -> None:
        if progress.step == step:
            raise MemoryError

    with pytest.raises(MemoryError):
        list(first.run(kill))
    second = trainer(tmp_path / "killed", train)
    second.resume()
    assert second.step == (step - 1) // 3 * 3
    list(second.run())
    assert_identical(everything(second), everything(straight))
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")


def test_rows_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    """A run that was killed after it logged an epoch and before it saved logs that epoch again, once."""
    run = trainer(tmp_path)
    run.save()
    rows = list(run.run())
    (tmp_path / "state.pt").unlink()
    again = trainer(tmp_path)
    assert [row["loss"] for row in again.run()] == [row["loss"] for row in rows]
    assert len(curve(tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": dataclasses.replace(TRAIN, learning_rate=2e-2)}, r"train\.learning_rate 0\.01 -> 0\.02"),
        ({"config": tiny_config(width=64, head_dim=16, layers=1)}, r"model\.width 32 -> 64"),
        ({"images": some_images(28)}, r"data\.images 24 -> 28"),
        ({"images": some_images().take(torch.arange(23, -1, -1))}, r"data\.sha256"),
    ],
)
def test_resuming_something_else_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer(tmp_path).save()
    with pytest.raises(TarFlowError, match=message):
        trainer(tmp_path, **change).resume()


@pytest.mark.parametrize("data", [b"", b"hello", None])
def test_a_damaged_state_is_refused(data: bytes | None, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.save()
    run.state_path.write_bytes(run.state_path.read_bytes()[:5000] if data is None else data)
    with pytest.raises(TarFlowError, match="cannot resume"):
        run.resume()
    torch.save({"step": 3}, run.state_path)
    with pytest.raises(TarFlowError, match="cannot resume"):
        run.resume()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TarFlowError, match="cannot write"):
        list(trainer(tmp_path / "file" / "run").run())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (some_images(7), TarFlowError, "batch_size 8 is larger than the training set of 7 images"),
        (some_images(classes=0), DataError, "3 classes, the images have no labels"),
        (some_images(classes=2), DataError, "3 classes, the images have 2"),
        (some_images(channels=3), DataError, r"images are \[3, 8, 8\], the model takes \[1, 8, 8\]"),
    ],
)
def test_images_that_do_not_fit_the_model(images: Images, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, dataclasses.replace(TRAIN, batch_size=8), images=images)


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0}, {"batch_size": 0}, {"evaluate_every": 0}, {"save_every": -1}, {"learning_rate": 0.0},
        {"learning_rate": math.nan}, {"label_dropout": 1.0}, {"ema_decay": -0.1}, {"clip_norm": 0.0},
        {"weight_decay": -1.0}, {"augment": "twist"}, {"precision": "float16"}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_train_config_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        TrainConfig(**fields)


# -- evaluation --------------------------------------------------------------------------------------------------


def test_evaluate_does_not_depend_on_what_was_drawn_before() -> None:
    model, images = random_model(CONFIG), some_images()
    row = evaluate(model, images, seed=3)
    torch.rand(5)
    assert evaluate(model, images, seed=3) == row
    assert evaluate(model, images, seed=4) != row
    assert evaluate(model, None) == {}
    x = add_noise(images.model_range(torch.arange(24)), CONFIG, generator_for(3, 3, 0))
    with torch.no_grad():
        u, log_det = encode(model, x, images.labels)
    nats = 0.5 * u.square().sum(dim=(1, 2)) + 0.5 * math.log(2 * math.pi) * 64 - log_det
    assert row["bits_per_dim"] == pytest.approx(float(nats.mean()) / (64 * math.log(2)) + 7, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "size", "mode"),
    [
        (CONFIG, (64, 24), "L"),
        (tiny_config(image_channels=3, classes=0), (64, 32), "RGB"),
        (tiny_config(classes=12, noise="uniform", noise_std=None), (64, 80), "L"),
    ],
)
def test_sample_grids(config: FlowConfig, size: tuple[int, int], mode: str) -> None:
    grid = sample_grid(random_model(config))
    assert grid is not None
    assert (grid.size, grid.mode) == (size, mode)
    assert sample_grid(random_model(tiny_config(image_channels=2))) is None


# -- processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from tarflow_sdk import _train, _train_cli

class Recorder(_train.Trainer):
    def optimise(self):
        progress = super().optimise()
        self.stop_requested = self.rank == 1 and self.step == 3  # one process is asked, both must stop
        return progress

    def save(self):
        super().save()
        torch.save(self.model.state_dict(), f"rank{self.rank}_step{self.step}.pth")

_train.Trainer = Recorder
_train_cli.main()
"""


def test_two_processes_train_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = some_images()
    assert images.labels is not None
    np.savez(tmp_path / "data.npz", images=images.pixels[:, 0].numpy(), labels=images.labels.numpy())
    (tmp_path / "script.py").write_text(SCRIPT)
    options = "--width 32 --head-dim 16 --layers 1 --blocks 2 --batch-size 4 --epochs 1 --no-nvp --precision float32"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # What torchrun sets for each process, without its agent.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py", "data.npz", "-o", "run", *options.split(), "--label-dropout", "0.5"],
            cwd=tmp_path,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [130, 130], said
    assert all("interrupted; the state is in run" in text for text in said)
    states = [torch.load(tmp_path / f"rank{rank}_step3.pth", weights_only=True) for rank in range(2)]
    assert_identical(*states)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3

    # One process that takes both parts of each batch together takes the same steps.
    train = TrainConfig(epochs=1, batch_size=4, label_dropout=0.5)
    torch.manual_seed(0)
    config = tiny_config(width=32, head_dim=16, layers=1, nvp=False, labels=("0", "1", "2"))
    alone = Trainer(TarFlow(config), train, images, None, folder=tmp_path / "alone")
    batch = alone.batch

    def both(step: int) -> tuple[Tensor, Tensor]:
        parts = []
        for rank in range(2):
            alone.rank, alone.world = rank, 2
            parts.append(batch(step))
        alone.rank, alone.world = 0, 1
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts if y is not None])

    monkeypatch.setattr(alone, "batch", both)
    for _ in range(3):
        alone.optimise()
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(states[0][name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_processes_draw_noise_of_their_own(tmp_path: Path) -> None:
    same = some_images().take(torch.zeros(24, dtype=torch.int64))
    run = trainer(tmp_path, images=same)
    run.world = 2
    first, _ = run.batch(0)
    run.rank = 1
    assert (run.batch(0)[0] != first).flatten(1).any(dim=1).all()


def test_processes_share_a_batch_without_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, noise_std=1e-4)
    run = trainer(tmp_path, dataclasses.replace(TRAIN, augment="none"), config)
    whole, _ = run.batch(0)
    run.world = 2
    parts = []
    for rank in range(2):
        run.rank = rank
        parts.append(run.batch(0)[0])
    assert torch.cdist(torch.cat(parts).flatten(1), whole.flatten(1)).min(dim=0).values.max() < 0.01
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TarFlowError, match="batch_size 4 is not a multiple of the 3 processes"):
        trainer(tmp_path)
