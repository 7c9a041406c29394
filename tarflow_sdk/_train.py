"""`Trainer`: maximum likelihood training of a `TarFlow`, described by a frozen `TrainConfig`.

loss = 0.5 * mean(z^2) - mean(log|det|) / dims. Every random draw of step s on rank r comes from a generator seeded by
(seed, s, r): a killed run that is resumed takes the same steps as one that was not.

Source: Zhai et al. 2024, section 2.3 and table 5; the prior update of `nvp=False` models is the original code's.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tarflow_sdk._checkpoint import replacing, save_checkpoint
from tarflow_sdk._config import FlowConfig
from tarflow_sdk._data import AUGMENTATIONS, Images
from tarflow_sdk._errors import TarFlowError
from tarflow_sdk._inverse import Guidance, decode
from tarflow_sdk._likelihood import bits_per_dim, classify, denoise
from tarflow_sdk._model import NULL_LABEL, TarFlow

ADAM_BETAS = (0.9, 0.95)
FINAL_LEARNING_RATE = 1e-6
PRIOR_RATE = 0.1
"""Weight of the newest batch in the running prior variance of `nvp=False` models."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train, apart from the model and the data; `batch_size` counts all processes together.

    The learning rate rises linearly over the first epoch and falls by cosine to 1e-6. `ema_decay` is the decay of the
    averaged weights, which are the ones that are evaluated and saved. `precision` bfloat16 is autocast.

    Raises:
        TarFlowError: on a value out of range.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    augment: str = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    evaluate_every: int = 5
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise TarFlowError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.learning_rate < 1.0:
            raise TarFlowError(f"learning_rate must be in (0, 1), got {self.learning_rate}")
        if not 0.0 <= self.label_dropout < 1.0:
            raise TarFlowError(f"label_dropout must be in [0, 1), got {self.label_dropout}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise TarFlowError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not self.clip_norm > 0.0 or self.weight_decay < 0.0:
            raise TarFlowError("clip_norm must be positive and weight_decay at least 0")
        if self.augment not in AUGMENTATIONS:
            raise TarFlowError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {self.augment!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise TarFlowError(f"precision must be float32 or bfloat16, got {self.precision!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One optimiser step: `loss` in nats per dim, `lr` the learning rate, `norm` the gradient's before clipping."""

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    norm: float


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then cosine to `FINAL_LEARNING_RATE` at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    fraction = (step - warmup) / max(1, steps - warmup)
    return float(FINAL_LEARNING_RATE + 0.5 * (peak - FINAL_LEARNING_RATE) * (1 + np.cos(np.pi * fraction)))


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """A generator that depends on `seed` and `numbers` alone."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class Trainer:
    """Trains a model on images and keeps its state in `folder`.

    `folder` receives `train.json` (all settings), `log.csv` (a row per evaluation), `samples/`, `state.pt` (to resume)
    and `model.safetensors` (the averaged weights, ready to export).
    """

    def __init__(
        self,
        model: TarFlow,
        train: TrainConfig,
        images: Images,
        validation: Images | None,
        folder: Path,
        *,
        device: str = "cpu",
    ) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if train.batch_size % self.world:
            raise TarFlowError(f"batch_size {train.batch_size} is not a multiple of the {self.world} processes")
        if len(images) < train.batch_size:
            raise TarFlowError(f"batch_size {train.batch_size} is larger than the training set of {len(images)} images")
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.averaged = TarFlow(model.config).to(self.device)
        self.averaged.load_state_dict(model.state_dict())
        self.config, self.train_config = model.config, train
        self.images, self.validation, self.folder = images, validation, folder
        self.steps_per_epoch = len(images) // train.batch_size
        self.steps = self.steps_per_epoch * train.epochs
        self.step = 0
        self.seconds = 0.0
        self.loss_sum = 0.0
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=train.learning_rate, betas=ADAM_BETAS, weight_decay=train.weight_decay
        )
        self.network: nn.Module = self.model
        if self.world > 1:
            ids = [self.device.index or 0] if self.device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def state_path(self) -> Path:
        """The file a killed run is resumed from."""
        return self.folder / "state.pt"

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {
            "model": self.config.to_json(),
            "train": dataclasses.asdict(self.train_config),
            "images": len(self.images),
        }

    def save(self) -> None:
        """Write `state.pt` and `model.safetensors`, each atomically; only the first process writes."""
        if self.rank:
            return
        state = {
            "settings": json.dumps(self.settings()),
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.state_path) as partial:
            torch.save(state, partial)
        save_checkpoint(self.averaged, self.folder / "model.safetensors")

    def resume(self) -> None:
        """Continue from `state.pt`.

        Raises:
            TarFlowError: when it cannot be read or was written under other settings.
        """
        try:
            state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise TarFlowError(f"{self.state_path}: cannot resume: {error}") from error
        before, now = json.loads(state["settings"]), json.loads(json.dumps(self.settings()))
        changed = [
            f"{section}.{name}"
            for section in ("model", "train")
            for name in now[section]
            if before[section].get(name) != now[section][name]
        ]
        if changed or before["images"] != now["images"]:
            raise TarFlowError(
                f"{self.folder} was trained with other settings: {', '.join(changed) or 'another training set'}",
                hint="give the same options to resume, or another --log-dir",
            )
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.loss_sum = state["step"], state["seconds"], state["loss_sum"]

    # -- one step ------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The noisy images and labels of a step on this rank, a function of (seed, step, rank) alone."""
        train = self.train_config
        epoch, index = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.images), generator=generator_for(train.seed, 0, epoch))
        chosen = order[index * train.batch_size : (index + 1) * train.batch_size][self.rank :: self.world]
        generator = generator_for(train.seed, 1, step, self.rank)
        x = AUGMENTATIONS[train.augment](self.images.model_range(chosen), generator)
        x = add_noise(x, self.config, generator)
        labels = None
        if self.config.classes and self.images.labels is not None:
            labels = self.images.labels[chosen]
            dropped = torch.rand(len(labels), generator=generator) < train.label_dropout
            labels = labels.where(~dropped, NULL_LABEL).to(self.device)
        return x.to(self.device), labels

    def optimise(self) -> Progress:
        """Take one step."""
        train = self.train_config
        lr = learning_rate(self.step, self.steps, self.steps_per_epoch, train.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, labels = self.batch(self.step)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=train.precision == "bfloat16"):
            z, log_det = self.network(x, labels)
            loss = 0.5 * z.square().mean() - log_det.mean() / self.config.dims
        if not torch.isfinite(loss):
            raise TarFlowError(
                f"the loss is not finite at step {self.step}",
                hint=f"{self.state_path} holds an earlier state; try a lower --learning-rate or --precision float32",
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        self.optimizer.step()
        if not self.config.nvp:
            self._update_prior(z.detach())
        self._average()
        self.step += 1
        value = float(loss.detach())
        self.loss_sum += value
        epoch = (self.step - 1) // self.steps_per_epoch
        return Progress(step=self.step, steps=self.steps, epoch=epoch, loss=value, lr=lr, norm=float(norm))

    @torch.no_grad()
    def _update_prior(self, z: Tensor) -> None:
        variance = z.square().mean(dim=0)
        if self.world > 1:
            torch.distributed.all_reduce(variance)
            variance /= self.world
        self.model.var.lerp_(variance, PRIOR_RATE)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.train_config.ema_decay, (1 + self.step) / (10 + self.step))
        ours, theirs = list(self.averaged.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(ours, theirs, 1.0 - decay)
        self.averaged.var.copy_(self.model.var)

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[Progress], None] | None = None) -> Iterator[dict[str, float]]:
        """Train to the end, yielding the row that each evaluation adds to `log.csv`.

        The state is saved every `save_every` steps, at every epoch's end, and when the run is interrupted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.rank:
            (self.folder / "train.json").write_text(json.dumps(self.settings(), indent=2) + "\n")
        started = time.monotonic() - self.seconds
        try:
            while self.step < self.steps:
                progress = self.optimise()
                self.seconds = time.monotonic() - started
                if on_step is not None:
                    on_step(progress)
                if self.step % self.steps_per_epoch == 0:
                    row = self._end_of_epoch(progress)
                    self.save()
                    if row:
                        yield row
                elif self.step % self.train_config.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise

    def _end_of_epoch(self, progress: Progress) -> dict[str, float] | None:
        epoch, loss = progress.epoch + 1, self.loss_sum / self.steps_per_epoch
        self.loss_sum = 0.0
        due = epoch % self.train_config.evaluate_every == 0 or epoch == self.train_config.epochs
        if not due or self.rank:
            return None
        row = {"epoch": epoch, "step": self.step, "seconds": round(self.seconds, 1), "lr": progress.lr, "loss": loss}
        row.update(evaluate(self.averaged, self.validation, seed=self.train_config.seed))
        self._log(row)
        self._save_samples(epoch)
        return row

    def _log(self, row: dict[str, float]) -> None:
        path = self.folder / "log.csv"
        rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [old for old in csv.DictReader(file) if int(old["step"]) < row["step"]]
        with replacing(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows([*rows, row])

    def _save_samples(self, epoch: int) -> None:
        from PIL import Image

        classes, columns = self.config.classes, 8
        rows = min(classes, 10) or 4
        generator = generator_for(self.train_config.seed, 2)
        z = torch.randn(rows * columns, self.config.patches, self.config.patch_values, generator=generator).to(
            self.device
        )
        labels = torch.arange(rows, device=self.device).repeat_interleave(columns) if classes else None
        images = decode(self.averaged, z, labels, Guidance(weight=1.0 if classes else 0.0))
        if self.config.noise_std is not None:
            images = denoise(self.averaged, images, labels)
        pixels = (images.clip(-1, 1) * 127.5 + 127.5).round().byte().cpu()
        grid = pixels.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        if grid.shape[-1] not in (1, 3):
            return
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(grid.squeeze(-1).numpy()).save(folder / f"epoch_{epoch:04d}.png")


def add_noise(x: Tensor, config: FlowConfig, generator: torch.Generator) -> Tensor:
    """Training noise: sigma * N(0, 1), or uniform dequantisation over one of the 256 levels (width 1/128)."""
    if config.noise == "uniform":
        # A level of pixel / 127.5 - 1 is 1/127.5 wide; scaling to 128 levels keeps x + noise in [-1, 1).
        pixels = ((x + 1) * 127.5).round()
        return (pixels + torch.rand(x.shape, generator=generator)) / 128 - 1
    return x + (config.noise_std or 0.0) * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def evaluate(model: TarFlow, images: Images | None, *, seed: int = 0, batch_size: int = 100) -> dict[str, float]:
    """Bits/dim of noisy images under their labels and, for class models, the accuracy of `classify`; {} without images."""
    if images is None:
        return {}
    device = model.var.device
    bits, right = 0.0, 0
    for start in range(0, len(images), batch_size):
        chosen = torch.arange(start, min(start + batch_size, len(images)))
        x = add_noise(images.model_range(chosen), model.config, generator_for(seed, 3, start)).to(device)
        labels = images.labels[chosen].to(device) if images.labels is not None and model.config.classes else None
        bits += float(bits_per_dim(model, x, labels).sum())
        if labels is not None:
            right += int((classify(model, x).argmax(dim=1) == labels).sum())
    row = {"bits_per_dim": bits / len(images)}
    if model.config.classes:
        row["accuracy"] = right / len(images)
    return row
