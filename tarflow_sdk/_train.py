"""`Trainer`: maximum likelihood training of a `TarFlow`, described by a frozen `TrainConfig`.

loss = 0.5 * mean(z^2) - mean(log|det|) / dims. All random numbers of step s on rank r come from a generator seeded with
(seed, s, r): a run that is killed and resumed takes the same steps as an uninterrupted one.

Source: Zhai et al. 2024, section 2.3 and table 5; the prior update of `nvp=False` models is the original code's.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_sdk._checkpoint import replacing, save_checkpoint
from tarflow_sdk._config import FlowConfig
from tarflow_sdk._data import AUGMENTATIONS, Images
from tarflow_sdk._errors import DataError, TarFlowError
from tarflow_sdk._evaluate import add_noise, evaluate, generator_for, sample_grid
from tarflow_sdk._model import NULL_LABEL, TarFlow
from tarflow_sdk._train_config import TrainConfig, learning_rate

ADAM_BETAS = (0.9, 0.95)
PRIOR_RATE = 0.1
"""Weight of the newest batch in the running prior variance of `nvp=False` models."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; it stopped between two steps and saved its state."""


class TrainingDiverged(TarFlowError):  # noqa: N818  (a result more than an error)
    """The loss or its gradient is no longer finite."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One optimiser step: `loss` in nats per dim, `lr` the learning rate, `norm` the gradient norm before clipping."""

    step: int
    steps: int
    epoch: int
    loss: float
    lr: float
    norm: float


class Trainer:
    """Trains a model on images and keeps its state in `folder`.

    `folder` receives `train.json` (all settings), `log.csv` (a row per evaluation), `samples/`, `state.pt` (to resume)
    and `model.safetensors` (the averaged weights, ready to export). Under `torchrun`, with the process group up, every
    process trains on its part of each batch and the first one evaluates and writes.

    Raises:
        TarFlowError: when images, batch size, model and number of processes do not fit each other.
    """

    def __init__(
        self,
        model: TarFlow,
        train: TrainConfig,
        images: Images,
        validation: Images | None,
        *,
        folder: Path,
        device: str = "cpu",
    ) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if train.batch_size % self.world:
            raise TarFlowError(f"batch_size {train.batch_size} is not a multiple of the {self.world} processes")
        if len(images) < train.batch_size:
            raise TarFlowError(f"batch_size {train.batch_size} is larger than the training set of {len(images)} images")
        for part in (images, validation):
            if part is not None:
                _require_fit(model.config, part)
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.averaged = copy.deepcopy(self.model)
        self.config, self.train_config = model.config, train
        self.images, self.validation, self.folder = images, validation, folder
        # What must be the same when a run is resumed; the number of processes may change.
        self.settings: dict[str, Any] = {
            "model": self.config.to_json(),
            "train": dataclasses.asdict(train),
            "data": {"images": len(images), "sha256": images.digest},
        }
        self.steps_per_epoch = len(images) // train.batch_size
        self.steps = self.steps_per_epoch * train.epochs
        self.step = 0
        self.seconds = 0.0
        self.loss_sum = 0.0
        self.stop_requested = False
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

    def save(self) -> None:
        """Write `state.pt` and `model.safetensors`, each atomically; only the first process writes."""
        if self.rank:
            return
        state = {
            "settings": json.dumps(self.settings),
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
            before = json.loads(state["settings"])
            now = json.loads(json.dumps(self.settings))
            changed = [
                f"{section}.{name} {before[section].get(name)} -> {now[section][name]}"
                for section in now
                for name in now[section]
                if before[section].get(name) != now[section][name]
            ]
        except Exception as error:  # a damaged file can fail anywhere
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TarFlowError(
                f"{self.state_path}: cannot resume: {reason}", hint="start anew in another --log-dir"
            ) from error
        if changed:
            raise TarFlowError(
                f"{self.folder} was trained with other settings: {', '.join(changed)}",
                hint="give the same options and data to resume, or another --log-dir",
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
        """Take one step.

        Raises:
            TrainingDiverged: when the loss or its gradient is not finite; the weights are those before the step.
        """
        train = self.train_config
        lr = learning_rate(self.step, self.steps, self.steps_per_epoch, train.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, labels = self.batch(self.step)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=train.precision == "bfloat16"):
            z, log_det = self.network(x, labels)
            loss = 0.5 * z.square().mean() - log_det.mean() / self.config.dims
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        # The gradient is averaged over the processes, so that all of them notice when one has diverged.
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingDiverged(
                f"loss {float(loss.detach())} with gradient norm {float(norm)} at step {self.step}: training diverged",
                hint="lower --learning-rate, or --precision float32, and start anew or --resume from the saved state",
            )
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
        variance = z.float().square().mean(dim=0)
        if self.world > 1:
            torch.distributed.all_reduce(variance)
            variance /= self.world
        self.model.var.lerp_(variance, PRIOR_RATE)

    @torch.no_grad()
    def _average(self) -> None:
        # Early weights decay faster than with ema_decay alone.
        decay = min(self.train_config.ema_decay, (1 + self.step) / (10 + self.step))
        for ours, theirs in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            ours.lerp_(theirs, 1.0 - decay)
        self.averaged.var.copy_(self.model.var)

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[Progress], None] | None = None) -> Iterator[dict[str, float]]:
        """Train to the end, yielding the row that each evaluation adds to `log.csv`.

        The state is saved every `save_every` steps, at every epoch's end, and when `stop_requested` was set (by a
        signal handler, say), which ends the run between two steps.

        Raises:
            Interrupted: when it was stopped.
            TarFlowError: when training diverges or `folder` cannot be written to.
        """
        self._open_folder()
        started = time.monotonic() - self.seconds
        while self.step < self.steps:
            progress = self.optimise()
            self.seconds = time.monotonic() - started
            if on_step is not None:
                on_step(progress)
            row = None
            epoch_ends = self.step % self.steps_per_epoch == 0
            if epoch_ends:
                row = self._end_of_epoch(progress)
            stop = self._stop()
            if stop or epoch_ends or self.step % self.train_config.save_every == 0:
                self.save()
            if row:
                yield row
            if stop:
                raise Interrupted

    def _open_folder(self) -> None:
        if self.rank:
            return
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            (self.folder / "train.json").write_text(json.dumps(self.settings, indent=2) + "\n")
        except OSError as error:
            raise TarFlowError(f"{self.folder}: cannot write: {error}", hint="give another --log-dir") from error

    def _stop(self) -> bool:
        """Whether any process was asked to stop: all of them must stop after the same step."""
        if self.world == 1:
            return self.stop_requested
        votes = torch.tensor(int(self.stop_requested), device=self.device)
        torch.distributed.all_reduce(votes)
        return bool(votes)

    def _end_of_epoch(self, progress: Progress) -> dict[str, float] | None:
        epoch, loss = progress.epoch + 1, self.loss_sum / self.steps_per_epoch
        self.loss_sum = 0.0
        due = epoch % self.train_config.evaluate_every == 0 or epoch == self.train_config.epochs
        if not due or self.rank:
            return None
        row = {"epoch": epoch, "step": self.step, "seconds": round(self.seconds, 1), "lr": progress.lr, "loss": loss}
        row.update(evaluate(self.averaged, self.validation, seed=self.train_config.seed))
        self._log(row)
        if (grid := sample_grid(self.averaged, seed=self.train_config.seed)) is not None:
            with replacing(self.folder / "samples" / f"epoch_{epoch:04d}.png") as partial:
                grid.save(partial, format="PNG")
        return row

    def _log(self, row: dict[str, float]) -> None:
        """Add a row to `log.csv`, in place of later ones that an earlier, killed run left."""
        path = self.folder / "log.csv"
        rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [old for old in csv.DictReader(file) if int(old["step"]) < row["step"]]
        with replacing(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows([*rows, row])


def _require_fit(config: FlowConfig, images: Images) -> None:
    """Refuse images of the wrong shape, or images without labels for a class model."""
    if config.data == "tokens":
        raise DataError("training is on images, and this model's data are tokens")
    if tuple(images.pixels.shape[1:]) != config.shape:
        raise DataError(f"images are {list(images.pixels.shape[1:])}, the model takes {list(config.shape)}")
    if not config.classes:
        return
    if images.labels is None:
        raise DataError(f"the model has {config.classes} classes, the images have no labels")
    if len(images.names) != config.classes:
        raise DataError(f"the model has {config.classes} classes, the images have {len(images.names)}")
