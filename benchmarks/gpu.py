"""Sampling on an NVIDIA GPU: this SDK, the original, and PyTorch with a CUDA graph, beside the card's own limits.

    python benchmarks/gpu.py --quick [--reference PATH/TO/ml-tarflow]     # about ten minutes, and TensorRT's builds
    python benchmarks/gpu.py --reference PATH/TO/ml-tarflow               # all shapes, hours
    python benchmarks/gpu.py --tiny --device cpu                          # every line of it, without a GPU

docs/GPU.md says how to install what it needs. Every engine that `tarflow doctor` calls ready is measured. NAME.json and
NAME.md are written, by default below benchmarks/results/.

Each sampler runs in a separate process, and they are called in turn on the same noise and labels; seconds are medians
over the rounds and include the transfers of latents and images between host and GPU, ratios are medians of the rounds'
ratios. With --quick, wide models run with one block, because all blocks are alike: seconds of the whole model are then
multiplied by the number of blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _floors import floor_seconds, measure_floors
from _gpu_samplers import DTYPES, dtype_of, serve_sampler, title
from _gpu_table import document, table
from _peer import Peer, PeerError, keep_stdout
from _work import CHECKPOINTS, ROOT, SHAPES, Work, header, write_json

from tarflow_runtimes import doctor
from tarflow_runtimes.bundle.reader import open_bundle


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and the cases to draw from it; window None means sequential, 0 the whole block.

    Windows are for trained weights: how many evaluations random ones need says nothing. `blocks` of random weights are
    made, if not all.
    """

    model: str
    batches: Sequence[int]
    guidance: Sequence[float] = (0.0, 1.5)
    windows: Sequence[int | None] = (None,)
    blocks: int | None = None


FULL = (
    Case(model="mnist", batches=(1, 16, 128), windows=(None, 16, 0)),
    Case(model="photos", batches=(1, 16, 128), guidance=(0.0,), windows=(None, 16, 0)),
    Case(model="imagenet64", batches=(1, 8, 32, 128)),
    Case(model="afhq", batches=(1, 8)),
)
QUICK = (
    Case(model="mnist", batches=(1, 64), windows=(None, 16)),
    Case(model="imagenet64", batches=(32,), blocks=1),
    Case(model="afhq", batches=(1,), guidance=(0.0,), blocks=1),
)
QUICK_DTYPES = ("float32", "float16")
TINY = (Case(model="tiny", batches=(1, 3), windows=(None, 4)),)

Judges = dict[tuple[int, float, int | None], tuple[str, np.ndarray]]
"""By batch, guidance and window: the sampler whose images others are compared with, and these."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def engines_of(options: argparse.Namespace, facts: doctor.Facts) -> list[str]:
    """The engines to measure: those requested, or all GPU engines that are ready; prints what the others lack."""
    if options.engines is not None:
        return list(options.engines)
    verdicts = doctor.verdicts(facts)
    for name, fault in verdicts.items():
        if fault is not None:
            say(f"engine {name} is left out: {fault.problem}; {fault.remedy}")
    return [name for name, fault in verdicts.items() if fault is None and name not in ("native", "ort-cpu")]


def samplers_of(options: argparse.Namespace, engines: Sequence[str], dtype: str) -> list[str]:
    """What is measured side by side in a dtype: the original where it is given, PyTorch, and ours on each engine."""
    return ["original"] * bool(options.reference) + [f"{kind}-{dtype}" for kind in ("graphed", *engines)]


@contextlib.contextmanager
def opened(
    names: Sequence[str], work: Work, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Peer], list[str]]]:
    """A process for each sampler, and why some did not start."""
    peers: dict[str, Peer] = {}
    failed: list[str] = []
    given = (str(work.folder), options.reference, options.device)
    try:
        for name in names:
            try:
                peers[name] = Peer(name, str(Path(__file__).resolve()), *given)
            except PeerError as error:
                failed.append(str(error))
                say(f"left out: {error}")
        yield peers, failed
    finally:
        for peer in peers.values():
            peer.close()


def measure(
    peers: dict[str, Peer], work: Work, cell: dict[str, Any], options: argparse.Namespace, judges: Judges
) -> dict[str, Any]:
    """All samplers on one batch, guidance, way of decoding and dtype: a row each, and what failed.

    The first call, which warms up, is kept apart. Rounds start with another sampler each time, and end at the limit.
    Images are compared with those in `judges`, which the first dtype of a cell puts there.
    """
    request = work.request(cell["batch"], cell["guidance"]) | {"window": cell["window"]}
    names = [name for name in peers if cell["window"] is None or not name.startswith(("original", "graphed"))]
    times: dict[str, list[float]] = {name: [] for name in names}
    failed: list[str] = []

    def call(name: str, **more: str) -> float | None:
        """Seconds of a call; a sampler that fails, out of memory say, is out of this cell."""
        try:
            return peers[name].call_rested(**request, **more)
        except PeerError as error:
            failed.append(str(error))
            say(f"left out: {error}")
            del times[name]
            return None

    first = {name: call(name, save=str(work.folder / f"{name}.npy")) for name in names}
    images = {name: np.load(work.folder / f"{name}.npy") for name in times}
    if times:
        name = next((one for one in times if dtype_of(one) == cell["dtype"]), next(iter(times)))
        judges.setdefault((cell["batch"], cell["guidance"], cell["window"]), (name, images[name]))
    began = time.monotonic()
    for done in range(options.rounds):
        if done and time.monotonic() - began > options.limit:
            break
        order = list(times)
        for name in order[done % len(order) :] + order[: done % len(order)] if order else ():
            seconds = call(name)
            if seconds is not None:
                times[name].append(seconds)
    rows = [
        row(name, times, images[name], judges[cell["batch"], cell["guidance"], cell["window"]])
        | {
            "title": title(name, options.device),
            "first_call_seconds": first[name],
            "images_per_s": cell["batch"] / median(times[name]),
            "detail": peers[name].detail,
        }
        for name in times
    ]
    return cell | {"rows": rows, "failed": failed}


def row(name: str, times: dict[str, list[float]], images: np.ndarray, judge: tuple[str, np.ndarray]) -> dict[str, Any]:
    """What one sampler did, and how far its images are from the judge's."""
    difference = images.astype(np.float64) - judge[1]
    square = float(np.mean(np.square(difference)))
    return {
        "sampler": name,
        "rounds": len(times[name]),
        "seconds": median(times[name]),
        "spread": [min(times[name]), max(times[name])],
        "faster_than": {other: ratio(times[other], times[name]) for other in times if other != name},
        "compared_with": judge[0],
        "max_difference": finite(float(np.abs(difference).max())),
        "psnr_db": finite(10 * np.log10(4 / square)) if square else None,
    }


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times longer the first takes: the median round, the lowest and the highest."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def run_case(
    case: Case, options: argparse.Namespace, engines: Sequence[str], floors: dict[str, Any], folder: Path
) -> list[dict[str, Any]]:
    """All cells of a model."""
    work = Work.prepare(case.model, CHECKPOINTS.get(case.model), folder / case.model, blocks=case.blocks)
    config = open_bundle(work.bundle, verify_digests=False).config
    scale = SHAPES[case.model]["blocks"] / config.blocks if case.blocks else 1.0
    cells = []
    judges: Judges = {}
    for batch, dtype in itertools.product(case.batches, options.dtypes):
        # processes of one batch and dtype at a time: each holds weights and caches on the card
        with opened(samplers_of(options, engines, dtype), work, options) as (peers, failed):
            for guidance, window in itertools.product(case.guidance, case.windows):
                cell = {"model": work.model, "batch": batch, "guidance": guidance, "window": window, "dtype": dtype}
                found = measure(peers, work, cell, options, judges)
                found["failed"] = failed + found["failed"]
                for one in found["rows"]:
                    rows, seconds = batch * (2 if guidance else 1), one["seconds"]
                    least = floor_seconds(floors, config, rows=rows, dtype=dtype_of(one["sampler"]))
                    one["model_seconds"] = scale * seconds
                    one["ms_per_step"] = 1e3 * seconds / work.steps if window is None else None
                    one["floor_share"] = least / seconds if window is None else None
                cells.append(found)
                print(table(found), flush=True)
    return cells


def about(facts: doctor.Facts, options: argparse.Namespace) -> dict[str, Any]:
    """The head of the results: date, commit, machine, card, driver and versions."""
    packages = {name: module.version for name, module in facts.modules.items() if module.version}
    return header(
        device=options.device,
        gpus=[dataclasses.asdict(gpu) for gpu in facts.gpus],
        driver={"version": facts.driver.version, "cuda": ".".join(map(str, facts.driver.cuda))},
        packages=packages,
        rounds=options.rounds,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="fewer shapes and rounds, one block of wide models")
    sizes.add_argument("--tiny", action="store_true", help="a model of milliseconds, to try the script itself")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--reference", default="", help="folder of the original code (transformer_flow.py)")
    parser.add_argument("--models", help="of mnist, photos, imagenet64, afhq, separated by commas; default: all")
    parser.add_argument("--engines", help="separated by commas; default: every one that is ready on a GPU")
    parser.add_argument("--dtypes", help=f"of {', '.join(DTYPES)}; default: all, --quick the first two")
    parser.add_argument("--rounds", type=int, help="default: 7, --quick 3")
    parser.add_argument("--limit", type=float, help="seconds after which a cell begins no more rounds; default: 600")
    parser.add_argument("--folder", type=Path, help="keep models and bundles here, and reuse them")
    parser.add_argument("-o", "--output", type=Path, help="NAME.json and NAME.md are written")
    options = parser.parse_args()
    if options.reference and not (Path(options.reference) / "transformer_flow.py").is_file():
        parser.error(f"{options.reference} has no transformer_flow.py")
    options.reference = str(Path(options.reference).resolve()) if options.reference else ""
    small = options.quick or options.tiny
    options.dtypes = options.dtypes.split(",") if options.dtypes else QUICK_DTYPES if options.quick else DTYPES
    options.engines = options.engines.split(",") if options.engines else None
    options.rounds = options.rounds or (3 if small else 7)
    options.limit = options.limit or (60.0 if small else 600.0)
    if unknown := [name for name in options.dtypes if name not in DTYPES]:
        parser.error(f"no dtype {unknown[0]!r}: {', '.join(DTYPES)}")
    options.cases = TINY if options.tiny else QUICK if options.quick else FULL
    if options.models is not None:
        wanted = options.models.split(",")
        options.cases = [case for case in options.cases if case.model in wanted]
        if len(options.cases) != len(wanted):
            parser.error(f"--models {options.models}: not all of them are measured here")
    return options


def main() -> None:
    options = parsed()
    facts = doctor.gather()
    if options.device == "cuda" and not facts.gpus:
        raise SystemExit(f"no GPU: {facts.driver.problem or 'the driver sees none'} (tarflow doctor says more)")
    engines = engines_of(options, facts)
    head = about(facts, options)
    card = facts.gpus[0].name if options.device == "cuda" else "cpu"
    output = options.output or ROOT / "benchmarks" / "results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower())}"
    if not output.parent.is_dir():
        raise SystemExit(f"{output.parent}: no such folder")
    floors = measure_floors(options.device, tiny=options.tiny)
    print(f"floors: {floors}", flush=True)
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in options.cases:
            cells += run_case(case, options, engines, floors, options.folder or Path(temporary))
            result = {"header": head, "floors": floors, "cells": cells}
            write_json(output.with_suffix(".json"), result)
            output.with_suffix(".md").write_text(document(result))
    say(f"wrote {output.with_suffix('.json')} and {output.with_suffix('.md')}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        keep_stdout()
        serve_sampler(sys.argv[2], Work.open(sys.argv[3]), reference=sys.argv[4], device=sys.argv[5])
    else:
        main()
