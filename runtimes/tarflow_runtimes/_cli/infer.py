"""`tarflow-infer`, `tarflow infer`: draw images from a bundle."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tarflow_runtimes._cli._shell import command, new_app, note, print_json, run

app = new_app()

DEFAULT_COUNT = 16


@command(app)
def infer(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="A .tarflow folder; without it, the digits that come with the package.", show_default=False)] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="What runs the graphs.")] = "ort-cpu",
    n: Annotated[int | None, typer.Option("-n", metavar="COUNT", help="Images to draw. [default: one per label, or 16]", show_default=False)] = None,
    labels: Annotated[str | None, typer.Option(metavar="LIST", help="Classes, by number or name: 0,1,2 or cat,dog; null for no class; all. Repeated from the start when there are more images.")] = None,
    first_index: Annotated[int, typer.Option(metavar="INDEX", help="Number of the first image: a job cut into ranges draws the same images.")] = 0,
    batch_size: Annotated[int | None, typer.Option(metavar="COUNT", help="Images that run together. [default: the engine's choice]", show_default=False)] = None,
    guidance: Annotated[float, typer.Option(metavar="WEIGHT", help="Guidance weight w >= 0; 0 is off.")] = 0.0,
    guide: Annotated[str, typer.Option(metavar="a|b|ab", help="What guidance acts on: scales, shifts or both.")] = "ab",
    attention_temperature: Annotated[float, typer.Option(metavar="TAU", help="Attention temperature of the unguided branch.")] = 1.0,
    anneal_guidance: Annotated[bool, typer.Option("--anneal-guidance", help="Raise guidance from 0 to w along each block.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="SEED", help="Seed of the noise. [default: drawn and reported]", show_default=False)] = None,
    noise: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="Noise to start from, float32 [COUNT, N, D], instead of a seed.")] = None,
    no_denoise: Annotated[bool, typer.Option("--no-denoise", help="Keep the training noise in the images.")] = False,
    output: Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="grid.png, folder/ (one PNG per image), images.npy or images.npz.")] = "samples.png",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    save_latents: Annotated[str | None, typer.Option(metavar="FILE.npy", help="Also write the noise that the images started from.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Report on stdout as JSON.")] = False,
) -> None:
    """Draw images from a bundle; nothing else than the runtime is needed, no PyTorch."""
    _check_numbers(n, first_index, batch_size, guidance, guide, attention_temperature, seed, noise)

    # Heavy imports come after the checks that need none, and never before --help.
    import tarflow_runtimes as tfr
    from tarflow_runtimes._cli._images import load_float32
    from tarflow_runtimes._cli._labels import parse_labels, spread
    from tarflow_runtimes._cli._output import check_output, check_pictures, write_arrays, write_pictures
    from tarflow_runtimes._cli._progress import StepClock
    from tarflow_runtimes._noise import standard_normal

    target = check_output(output, kinds=(".png", "folder", ".npy", ".npz"), overwrite=overwrite)
    latents = None
    if save_latents is not None:
        latents = check_output(save_latents, kinds=(".npy",), overwrite=overwrite, option="--save-latents")
        if latents.path.resolve() == target.path.resolve():
            raise tfr.InputError(f"-o and --save-latents both name {latents.path}")
    start = load_float32(noise, key="noise", what="noise") if noise is not None else None
    began = time.perf_counter()
    with tfr.load(bundle, engine=engine) as flow:
        config = flow.config
        classes = parse_labels(labels, classes=config.classes, names=flow.labels)
        n = _count(n, classes, start)
        classes = spread(classes, n)
        if start is not None and start.shape != (n, config.patches, config.patch_values):
            expected = [n, config.patches, config.patch_values]
            raise tfr.InputError(f"{noise}: shape {list(start.shape)}, expected {expected}", hint="noise is [COUNT, N, D]: images, patches, values per patch")
        names = [f"{first_index + index:06d}.png" for index in range(n)]
        check_pictures(target, channels=config.image_channels, names=names)
        loaded = time.perf_counter()
        with StepClock("sampling") as clock:
            sample = flow.sample(
                n,
                labels=classes,
                seed=seed,
                noise=start,
                first_index=first_index,
                guidance=guidance,
                guide=guide,
                attention_temperature=attention_temperature,
                anneal_guidance=anneal_guidance,
                denoise=not no_denoise,
                batch_size=batch_size,
                on_step=clock.on_step,
            )
        facts = {
            "bundle": str(flow.bundle.path),
            "digest": flow.bundle.digest,
            "engine": flow.engine,
            "seed": sample.seed,
            "first_index": first_index,
            "guidance": guidance,
            "guide": guide,
            "attention_temperature": attention_temperature,
            "anneal_guidance": anneal_guidance,
            "denoise": not no_denoise,
        }
        text = {f"tarflow:{key}": _word(value) for key, value in facts.items() if key != "bundle"}
        arrays = {"labels": [] if classes is None else classes, "seed": -1 if sample.seed is None else sample.seed}
        files = write_pictures(target, sample.images, names=names, arrays=arrays, text=text)
        if latents is not None:
            used = start if start is not None else standard_normal(sample.seed, first_index, n, config.patches, config.patch_values)
            files += write_arrays(latents, used, key="noise", arrays={})
