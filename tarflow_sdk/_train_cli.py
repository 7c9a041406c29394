"""`tarflow-train`: train a model from a folder, an `.npz` file or the built-in digits.

Exit codes: 0 done, 1 training diverged, 2 bad input or usage, 130 interrupted. PyTorch is imported only when training
starts, so that `--help` and usage errors appear immediately.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tarflow_sdk._errors import TarFlowError

if TYPE_CHECKING:  # the module loads PyTorch
    from tarflow_sdk._config import FlowConfig
    from tarflow_sdk._model import TarFlow
    from tarflow_sdk._train import Trainer

USAGE_ERROR: Any = typer.BadParameter.__base__  # typer's own class or click's, depending on typer's version

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def train(
    data: Annotated[str, typer.Argument(help="A folder of images (one folder per class), an .npz file, or mnist5k.")],
    *,
    log_dir: Annotated[
        Path, typer.Option("--log-dir", "-o", help="Folder for state, curve, samples and the model.")
    ] = Path("runs/tarflow"),
    image_size: Annotated[int | None, typer.Option(help="Side in pixels; needed for a folder.")] = None,
    image_channels: Annotated[int | None, typer.Option(help="1 or 3 for a folder; else read from the data.")] = None,
    patch_size: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 4,
    width: Annotated[int, typer.Option(help="Channels of the transformers.")] = 128,
    blocks: Annotated[int, typer.Option(help="Flow blocks.")] = 4,
    layers: Annotated[int, typer.Option(help="Transformer layers per block.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Channels per attention head.")] = 64,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Ignore the labels of the data.")] = False,
    no_nvp: Annotated[
        bool, typer.Option("--no-nvp", help="Volume preserving: learn shifts and a prior variance only.")
    ] = False,
    noise_std: Annotated[
        float | None, typer.Option(help="Sigma of the Gaussian training noise, model units. [default: 0.1]")
    ] = None,
    uniform_noise: Annotated[
        bool, typer.Option("--uniform-noise", help="Uniform dequantisation, for likelihood.")
    ] = False,
    holdout: Annotated[
        Path | None, typer.Option(help="Text file of image numbers to validate on, not to train on.")
    ] = None,
    augment: Annotated[str, typer.Option(help="none, flip or digits.")] = "none",
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Images per step, all processes together.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW weight decay.")] = 1e-4,
    label_dropout: Annotated[float, typer.Option(help="Probability of training an image with the null class.")] = 0.1,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.999,
    clip_norm: Annotated[float, typer.Option(help="Gradient norm to clip at.")] = 1.0,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: bfloat16 where the hardware has it.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Epochs between evaluations.")] = 5,
    save_every: Annotated[int, typer.Option(help="Steps between saved states.")] = 500,
    init: Annotated[
        Path | None, typer.Option(help="Start from the weights of this checkpoint, which must be of the same model.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --log-dir.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Train a TarFlow model; `tarflow-export LOG_DIR/model.safetensors` makes it a bundle.

    Under torchrun the processes share each batch. Ctrl-C stops after the step at hand and saves the state.
    """
    import torch

    from tarflow_sdk._config import FlowConfig
    from tarflow_sdk._data import load_images, load_indices
    from tarflow_sdk._model import TarFlow
    from tarflow_sdk._train import Interrupted, Trainer, TrainingDiverged
    from tarflow_sdk._train_config import TrainConfig

    try:
        if uniform_noise and noise_std is not None:
            raise TarFlowError("--uniform-noise and --noise-std contradict each other", hint="give one of them")
        images = load_images(data, image_size=image_size, image_channels=image_channels)
        conditional = images.labels is not None and not unconditional
        config = FlowConfig(
            image_size=images.pixels.shape[-1],
            image_channels=images.pixels.shape[1],
            patch_size=patch_size,
            width=width,
            blocks=blocks,
            layers=layers,
            head_dim=head_dim,
            classes=len(images.names) if conditional else 0,
            labels=images.names if conditional else None,
            nvp=not no_nvp,
            noise="uniform" if uniform_noise else "gaussian",
            noise_std=None if uniform_noise else 0.1 if noise_std is None else noise_std,
        )
        device = _device(device)
        settings = TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            label_dropout=label_dropout,
            ema_decay=ema_decay,
            clip_norm=clip_norm,
            augment=augment,
            precision=_precision(precision, device, uniform_noise=uniform_noise),  # type: ignore[arg-type]
            seed=seed,
            evaluate_every=evaluate_every,
            save_every=save_every,
        )
        validation = None
        if holdout is not None:
            held = load_indices(holdout, len(images))
            kept = torch.ones(len(images), dtype=torch.bool)
            kept[held] = False
            validation, images = images.take(held), images.take(kept.nonzero().flatten())
        with _process_group(device) as device:
            torch.manual_seed(seed)
            model = TarFlow(config) if init is None else _initial(init, config)
            trainer = Trainer(model, settings, images, validation, folder=log_dir, device=device)
            if trainer.state_path.exists():
                if not resume:
                    raise TarFlowError(f"{log_dir} already holds a run", hint="add --resume, or give another --log-dir")
                trainer.resume()
            elif resume:
                raise TarFlowError(f"{log_dir} holds no run to resume", hint="start it without --resume")
            with _stopping_on_signals(trainer):
                _run(trainer)
    except TarFlowError as error:
        _report(str(error), error.hint)
        raise typer.Exit(1 if isinstance(error, TrainingDiverged) else 2) from error
    except Interrupted:
        typer.echo(f"interrupted; the state is in {log_dir}, continue with --resume", err=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None


def _initial(path: Path, config: FlowConfig) -> TarFlow:
    """The model of a checkpoint, which must be the one that the options describe."""
    from tarflow_sdk._checkpoint import load_checkpoint

    model = load_checkpoint(path)
    ours, theirs = config.to_json(), model.config.to_json()
    if different := [f"{name} {theirs[name]} (here {ours[name]})" for name in ours if ours[name] != theirs[name]]:
        raise TarFlowError(f"{path} is another model: {', '.join(different)}", hint="give the options of that model")
    return model


def _device(name: str) -> str:
    """The kind of device to train on, `cpu` or `cuda`, checked."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise TarFlowError(f"--device {name}: no such device", hint="give cpu, cuda or auto") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise TarFlowError(f"--device {name}: PyTorch has no such device here", hint="give cpu, cuda or auto")
    return name


def _precision(name: str, device: str, *, uniform_noise: bool) -> str:
    """`auto` is bfloat16 where it is fast, but float32 for likelihood runs."""
    import torch

    if name != "auto":
        return name
    if uniform_noise:
        return "float32"
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # PyTorch has no public name for it
    return "bfloat16" if has_bfloat16() else "float32"


@contextlib.contextmanager
def _process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yield the device of this one."""
    import torch

    if "RANK" not in os.environ:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    # The other processes wait while the first one evaluates and draws samples.
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=dt.timedelta(hours=2))
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the trainer between two steps; a second signal stops it immediately."""

    def stop(number: int, _: object) -> None:
        trainer.stop_requested = True
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(trainer: Trainer) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=trainer.rank != 0 or not console.is_terminal) as bar:
        task = bar.add_task("train", total=trainer.steps, completed=trainer.step)

        def on_step(progress: Any) -> None:
            bar.update(
                task, completed=progress.step, description=f"epoch {progress.epoch + 1} loss {progress.loss:.4f}"
            )

        for row in trainer.run(on_step):
            typer.echo("  ".join(f"{name} {value:.5g}" for name, value in row.items()))


def _report(message: str, hint: str) -> None:
    typer.echo(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), err=True)


def main() -> NoReturn:
    """Entry point of the console script."""
    try:
        code = app(prog_name="tarflow-train", standalone_mode=False)
    except USAGE_ERROR as error:
        message = error.format_message().rstrip(".")
        _report(message[:1].lower() + message[1:], "tarflow-train --help lists the options")
        code = 2
    except ModuleNotFoundError as error:
        _report(f"tarflow-train needs the package {error.name}", 'pip install "tarflow-sdk[train]"')
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    raise SystemExit(code if isinstance(code, int) else 0)
