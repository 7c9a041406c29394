"""`tarflow-infer`, also `tarflow infer`: draw images from a bundle."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.decode_options import check_decode, plan_of, warnings_told
from tarflow_runtimes.cli.options import (
    BatchSize,
    BundleArgument,
    Engine,
    EngineDir,
    Json,
    Overwrite,
    Tf32,
    check_batch_size,
    load_options,
)
from tarflow_runtimes.cli.shell import command, counted, new_app, note, print_json, require, run
from tarflow_runtimes.decode.batches import BATCH_SIZE
from tarflow_runtimes.errors import InputError

if TYPE_CHECKING:
    from tarflow_runtimes.bundle.config import ModelConfig
    from tarflow_runtimes.decode.turn import Floats
    from tarflow_runtimes.io.write import Output

DEFAULT_COUNT = 16
GUIDES = ("a", "b", "ab")

app = new_app()


@command(app)
def infer(
    bundle: BundleArgument = None,
    *,
    engine: Engine = "cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    n: Annotated[
        int | None, typer.Option("-n", metavar="COUNT", help="Images to draw. [default: one per label, else 16]")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Classes by number or name, as 0,1,2 or cat,dog; null for no class; all. They repeat: image i has "
            "label i mod their count.",
        ),
    ] = None,
    first_index: Annotated[
        int,
        typer.Option(metavar="INDEX", help="Number of the first image; for jobs that are split into parts."),
    ] = 0,
    batch_size: BatchSize = BATCH_SIZE,
    guidance: Annotated[float, typer.Option(metavar="WEIGHT", help="Guidance weight, 0 for none.")] = 0.0,
    guide: Annotated[str, typer.Option(metavar="a|b|ab", help="Guide the scales a, the shifts b, or both.")] = "ab",
    attention_temperature: Annotated[
        float, typer.Option(metavar="TAU", help="Attention temperature of the unguided branch.")
    ] = 1.0,
    anneal_guidance: Annotated[
        bool, typer.Option("--anneal-guidance", help="Increase guidance from patch to patch up to its weight.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(metavar="SEED", help="Seed of the noise. [default: random, and reported]")
    ] = None,
    noise: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npy", help="Start from this noise, float32 [COUNT, N, D], instead of a seed."),
    ] = None,
    decode: Annotated[
        str,
        typer.Option(metavar="sequential|parallel|auto", help="How blocks are inverted; auto uses the tuned plan."),
    ] = "sequential",
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="MOVE", help="Tolerance of parallel decoding. [default: 0.00001]"),
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="PATCHES", help="Patches per parallel evaluation. [default: the whole block]")
    ] = None,
    plans: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tuned plans for auto. [default: next to the bundle]")
    ] = None,
    no_denoise: Annotated[bool, typer.Option("--no-denoise", help="Keep the training noise in the images.")] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="grid.png, folder/ (a PNG per image), images.npy or images.npz; tokens are arrays. "
            "[default: samples.png, of tokens samples.npy]",
        ),
    ] = None,
    overwrite: Overwrite = False,
    captions: Annotated[bool, typer.Option("--captions", help="Add the labels to the grid.")] = False,
    save_latents: Annotated[
        str | None, typer.Option(metavar="FILE.npy", help="Also write the noise of the images.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw images from a bundle, without PyTorch.

    The images are the same for the same seed, on every machine and in any batch size, up to rounding.
    """
    asked: dict[str, Any] = {
        "first_index": first_index,
        "guidance": guidance,
        "guide": guide,
        "attention_temperature": attention_temperature,
        "anneal_guidance": anneal_guidance,
        "denoise": not no_denoise,
    }
    check_batch_size(batch_size)
    _check_options(n=n, seed=seed, noise=noise, **asked)
    check_decode(decode, tolerance, window, plans)

    # These load NumPy and Pillow: not before --help and the checks above.
    import tarflow_runtimes as tfr
    from tarflow_runtimes.bundle.reader import open_bundle
    from tarflow_runtimes.cli.labels import label_name, spread
    from tarflow_runtimes.cli.progress import StepClock
    from tarflow_runtimes.io.write import write_arrays, write_pictures
    from tarflow_runtimes.model.flow import shipped_bundle
    from tarflow_runtimes.model.noise import standard_normal

    bundle = bundle or shipped_bundle()
    config = open_bundle(bundle, verify_digests=False).config  # all that can be checked is, before an engine is opened
    count, listed, given = _asked(n, labels, noise, config)
    classes = spread(listed, count, first_index=first_index)
    names = [f"{first_index + index:06d}.png" for index in range(count)]
    target, latents = _outputs(output, save_latents, config, names=names, captions=captions, overwrite=overwrite)

    clock = StepClock("sampling")
    began = time.perf_counter()
    with tfr.load(bundle, engine=engine, **load_options(tf32=tf32, engine_dir=engine_dir)) as flow:
        loaded = time.perf_counter()
        if engine == "auto":
            note(str(flow.engine_report["chosen"]))
        if listed is not None and len(listed) > count:
            last = first_index + count - 1
            note(f"{count} of the {len(listed)} labels are drawn: those of images {first_index} to {last}")
        plan = plan_of(flow, decode, tolerance, window, plans)
        with clock, warnings_told():
            sample = flow.sample(
                count,
                labels=classes,
                seed=seed,
                noise=given,
                first_index=first_index,
                guidance=tfr.Guidance(
                    weight=guidance,
                    guide=guide,
                    attention_temperature=attention_temperature,
                    anneal=anneal_guidance,
                ),
                denoise=not no_denoise,
                plan=plan,
                batch_size=batch_size,
                on_step=clock.on_step,
            )
        facts: dict[str, Any] = {
            "bundle": str(flow.bundle.path),
            "engine": flow.engine_name,
            "chosen": flow.engine_report["chosen"],
            "precision": sample.metadata["precision"],
            "digest": flow.bundle.digest,
            "seed": sample.seed,
            "count": count,
            **asked,
            "decode": {"asked": decode} | sample.report.to_json(),
        }
    words = [label_name(label, config.labels) for label in classes or [-1] * count]
    files = write_pictures(
        target,
        sample.images,
        names=names,
        columns=grid_columns(count, period=len(listed or [0])),
        captions=words if captions else None,
        text={f"tarflow:{name}": value for name, value in sample.metadata.items()},
        arrays={"labels": classes or [-1] * count} | ({} if sample.seed is None else {"seed": sample.seed}),
    )
    if latents is not None:
        shape = (count, config.patches, config.patch_values)
        used: Any = given if given is not None else standard_normal(facts["seed"], first_index, *shape)
        write_arrays(latents, used, key="noise", arrays={})
    if as_json:
        print_json(
            facts
            | {
                "labels": None if classes is None else words,
                "files": [str(file) for file in files],
                "latents": None if latents is None else str(latents.path),
                "steps": clock.steps,
                "seconds": {"load": loaded - began, "sample": clock.seconds, "per_step": clock.per_step},
            }
        )
    source = f"seed {sample.seed}" if noise is None else f"noise of {noise}"
    pace = f"{clock.seconds:.1f} s, {1e3 * clock.per_step:.2f} ms per step"
    note(f"wrote {target.path}: {counted(count, config.data)}, {source}, {flow.engine_name}, {pace}")


def grid_columns(count: int, *, period: int) -> int | None:
    """Columns of a near-square grid in which repeated labels are aligned vertically; None if there is none."""
    side = math.sqrt(count)
    columns = period * max(1, round(side / period))
    return columns if 1 < period < count and columns <= 3 * side else None


def _asked(
    n: int | None, labels: str | None, noise: Path | None, config: ModelConfig
) -> tuple[int, list[int] | None, Floats | None]:
    """The number of images, the labels and the noise, checked against the model."""
    from tarflow_runtimes.cli.labels import check_labels, parse_labels
    from tarflow_runtimes.io.read import load_float32

    listed = parse_labels(labels, classes=config.classes, names=config.labels)
    if noise is None:
        return n or len(listed or range(DEFAULT_COUNT)), listed, None
    given = load_float32(noise, key="noise", what="noise")
    count = n or (len(given) if given.ndim else 1)
    shape = (count, config.patches, config.patch_values)
    if given.shape != shape:
        raise InputError(
            f"--noise {noise}: shape {list(given.shape)}, expected {list(shape)}",
            hint="noise is [COUNT, N, D]: images, patches, values per patch",
        )
    check_labels(listed, count)
    return count, listed, given


def _outputs(
    output: str | None,
    save_latents: str | None,
    config: ModelConfig,
    *,
    names: Sequence[str],
    captions: bool,
    overwrite: bool,
) -> tuple[Output, Output | None]:
    """`-o` and `--save-latents`, checked against the model and each other."""
    from tarflow_runtimes.io.write import PICTURES, check_output, check_pictures

    is_image = config.data == "image"
    default = "samples.png" if is_image else "samples.npy"
    target = check_output(default if output is None else output, kinds=PICTURES, overwrite=overwrite)
    check_pictures(target, config.shape, names=names)
    if captions and target.kind != ".png":
        hint = "give -o grid.png, or remove --captions" if is_image else "remove --captions"
        raise InputError("--captions are written into a grid only", hint=hint)
    if save_latents is None:
        return target, None
    latents = check_output(save_latents, kinds=(".npy",), overwrite=overwrite, option="--save-latents")
    if latents.path.resolve() == target.path.resolve():
        raise InputError(f"-o and --save-latents both name {latents.path}", hint="give them different names")
    return target, latents


def _check_options(
    *,
    n: int | None,
    seed: int | None,
    noise: Path | None,
    first_index: int,
    guidance: float,
    guide: str,
    attention_temperature: float,
    **_: bool,
) -> None:
    """Refuse options that are invalid for any bundle, before anything is loaded."""
    checks = [
        (n is None or n >= 1, f"-n must be at least 1, got {n}", "leave it out for one image per label"),
        (
            0 <= first_index < 2**64,
            f"--first-index must be in 0 .. 2^64 - 1, got {first_index}",
            "images are numbered from 0",
        ),
        (
            guidance >= 0.0 and math.isfinite(guidance),
            f"--guidance must be a finite number and not negative, got {guidance}",
            "0 is no guidance, 1 to 3 is usual",
        ),
        (guide in GUIDES, f"--guide must be one of {', '.join(GUIDES)}, got {guide!r}", "ab guides scales and shifts"),
        (
            attention_temperature > 0.0 and math.isfinite(attention_temperature),
            f"--attention-temperature must be a positive number, got {attention_temperature}",
            "1 leaves the attention as it is",
        ),
        (seed is None or 0 <= seed < 2**64, f"--seed must be in 0 .. 2^64 - 1, got {seed}", "leave it out to draw one"),
        (seed is None or noise is None, "--seed and --noise contradict each other", "leave one of them out"),
        (
            noise is None or first_index == 0,
            "--first-index numbers the images of a seed, and --noise takes the place of the seed",
            "leave --first-index out",
        ),
    ]
    for right, message, hint in checks:
        require(right, message, hint)


def main() -> None:
    """Entry point of the console script `tarflow-infer`."""
    run(app, sys.argv[1:], name="tarflow-infer")
