"""The native step against ONNX Runtime's: all blocks of a bundle, inverted by both in turn in one process.

    python runtimes/native/native_build.py --output build/native
    python runtimes/native/bench/native_step.py mnist.tarflow --library build/native/libtarflow_native.so
    python runtimes/native/bench/native_step.py mnist.tarflow --library build/native/libtarflow_native.so --forward

`--forward` compares the forward pass, patches to noise and log|det|, instead.

Each round times both sides, one right after the other, in a random order; the ratio is the median of the rounds'
ratios, so that a machine whose clock or neighbours change disturbs both alike. Each side runs once untimed before it is
timed, since the other one's weights have taken its place in the caches. `--threads 1` binds the process to one CPU
before either side counts them.

With `--ceilings`, `ceilings.cpp` measures right before and after each row what the machine can do. GFLOP/s and GB/s are
then stated as shares of that: all multiplications of a step, and its weights and the filled part of its caches read
once.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tarflow_runtimes.bundle.reader import Bundle, open_bundle
from tarflow_runtimes.decode.plan import Sequential
from tarflow_runtimes.decode.turn import Conditions, Turn
from tarflow_runtimes.engines.native.library import Block, Library
from tarflow_runtimes.engines.open import Options, open_engine
from tarflow_runtimes.engines.ort_cpu.cpus import cpu_name
from tarflow_runtimes.measure.bench_results import sequential_work

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def invert_blocks(
    library: Library,
    blocks: Sequence[Block],
    bundle: Bundle,
    noise: np.ndarray[Any, Any],
    conditions: Conditions,
    **options: Any,
) -> np.ndarray[Any, Any]:
    """All blocks, the last one first: noise [B, N, D] -> patches in the order of the data."""
    x = noise
    for block, packed in zip(reversed(bundle.blocks), reversed(blocks), strict=True):
        ordered = library.invert(
            packed,
            x[:, ::-1] if block.is_reversed else x,
            labels=conditions.labels,
            guidance=conditions.guidance,
            inverse_temperature=conditions.inverse_temperature,
            branches=conditions.branches,
            **options,
        )
        x = np.ascontiguousarray(ordered[:, ::-1] if block.is_reversed else ordered)
    return x


def forward_blocks(
    library: Library,
    blocks: Sequence[Block],
    bundle: Bundle,
    patches: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any] | None,
    **options: Any,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All blocks, the first one first: patches [B, N, D] in the order of the data -> (z, log|det| [B])."""
    x, log_det = patches, np.zeros(len(patches))
    for block, packed in zip(bundle.blocks, blocks, strict=True):
        z, own = library.forward(packed, x[:, ::-1] if block.is_reversed else x, labels=labels, **options)
        x = np.ascontiguousarray(z[:, ::-1] if block.is_reversed else z)
        log_det += own
    return x, log_det


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", type=Path, help="the bundle that ort-cpu inverts, in another precision")
    parser.add_argument("--library", type=Path, default=Path("build/native/libtarflow_native.so"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.5], help="0 is unguided")
    parser.add_argument("--forward", action="store_true", help="the forward pass, which has no guidance")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kernel", help="x86-64-v4-vnni, x86-64-v4, x86-64-v3, aarch64, portable; by default the best")
    parser.add_argument("--ceilings", action="store_true", help="measure the machine beside each row; needs a compiler")
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args()


def seconds(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def invert(engine: Any, noise: np.ndarray[Any, Any], conditions: Conditions) -> np.ndarray[Any, Any]:
    """All blocks by the engine: noise -> patches."""
    blocks = reversed(range(engine.bundle.config.blocks))
    return engine.invert([Turn(block=block, strategy=Sequential()) for block in blocks], noise, conditions)[0]


def forward(*blocks: Any, **options: Any) -> np.ndarray[Any, Any]:
    """All blocks by the library: patches -> z."""
    return forward_blocks(*blocks, **options)[0]


def forward_blocks_of(engine: Any, patches: Any, labels: Any) -> np.ndarray[Any, Any]:
    """All blocks by the engine: patches -> z."""
    x = patches
    for block in range(engine.bundle.config.blocks):
        x, _ = engine.forward(block, x, labels)
    return x


def given(bundle: Bundle, batch: int, weight: float) -> tuple[np.ndarray[Any, Any], Conditions]:
    """Noise [B, N, D], and labels in turn with that guidance."""
    config, branches = bundle.config, 2 if weight else 1
    noise = np.random.default_rng(0).standard_normal((batch, config.patches, config.patch_values), dtype=np.float32)
    if bundle.prior_variance is not None:
        noise *= np.sqrt(bundle.prior_variance)
    labels = None
    if config.classes:
        labels = np.stack([np.arange(batch) % config.classes, np.full(batch, config.classes)])[:branches]
    return noise, Conditions(
        labels=labels,
        guidance=np.full((batch, 2, config.patches), weight, np.float32),
        inverse_temperature=np.ones((branches, batch), np.float32),
    )


def timed(reference: Callable[[], object], native: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Both sides in turn: medians, and quartiles of the rounds' ratios."""
    pairs = []
    for _ in range(rounds):
        sides = [reference, native]
        random.shuffle(sides)
        times = {side: seconds(side) for side in sides}
        pairs.append((times[reference], times[native]))
    low, ratio, high = statistics.quantiles([theirs / ours for theirs, ours in pairs], n=4)
    theirs, ours = (1e3 * statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    return {"ort_cpu_ms": theirs, "native_ms": ours, "ratio": ratio, "quartiles": [low, high]}


def shares(bundle: Bundle, row: dict[str, Any], measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What the native side reached of the machine's ceilings, which are the largest of these."""
    rows = row["batch"] * (2 if row["guidance"] else 1)
    work = sequential_work(bundle.config, rows=rows, weight_bytes=WEIGHT_BYTES[bundle.precision])
    gflops, gbs = (1e-6 * amount / row["native_ms"] for amount in (work.operations, work.bytes))
    ceilings = {name: max(one[name] for one in measured) for name in measured[0]}
    reached = {
        "fma": gflops / ceilings["fma_gflops"],
        "l3": gbs / ceilings["l3_gbs"],
        "dram": gbs / ceilings["dram_gbs"],
    }
    return {"gflops": gflops, "gbs": gbs, "ceilings": ceilings, "shares": reached}


def main() -> None:
    options = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    bundle, library = open_bundle(options.bundle), Library(options.library)
    against = open_bundle(options.against) if options.against else bundle
    engine, _ = open_engine("ort-cpu", against, Options(tf32=False, engine_dir=None, on_building=None))
    blocks = [library.pack(bundle, block) for block in range(bundle.config.blocks)]
    kernel = options.kernel or library.kernels[0]
    steps = bundle.config.blocks * (bundle.config.patches - 1)
    head = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": cpu_name(),
        "bundle": bundle.path.name,
        "precision": bundle.precision,
        "against": against.precision,
        "steps": steps,
        "threads": options.threads,
        "kernel": kernel,
        "pass": "forward" if options.forward else "inverse",
        "rounds": options.rounds,
    }
    print(", ".join(f"{name} {value}" for name, value in head.items()))
    print("batch guidance  ort-cpu ms  native ms  us/step  ratio   25 % .. 75 %")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        program, measured = Path(folder) / "ceilings", []

        def measure() -> None:
            if options.ceilings:
                measured.append(json.loads(subprocess.check_output([program, str(options.threads)])))

        if options.ceilings:
            source = Path(__file__).with_name("ceilings.cpp")
            compiler = ["c++", "-std=c++17", "-O3", "-march=native", "-pthread"]
            subprocess.run([*compiler, source, "-o", program], check=True)
        measure()
        for batch in options.batch:
            for weight in [0.0] if options.forward else options.guidance:
                noise, conditions = given(bundle, batch, weight)
                labels = None if conditions.labels is None else conditions.labels[0]
                how = {"threads": options.threads, "kernel": kernel}
                if options.forward:
                    reference = functools.partial(forward_blocks_of, engine, noise, labels)
                    native = functools.partial(forward, library, blocks, bundle, noise, labels, **how)
                else:
                    reference = functools.partial(invert, engine, noise, conditions)
                    native = functools.partial(invert_blocks, library, blocks, bundle, noise, conditions, **how)
                difference = float(np.abs(reference() - native()).max())
                row = {"batch": batch, "guidance": weight, "largest_difference": difference}
                row |= timed(reference, native, options.rounds)
                measure()
                print(
                    f"{batch:>5} {weight:>8.1f} {row['ort_cpu_ms']:>11.2f} {row['native_ms']:>10.2f}"
                    f" {1e3 * row['native_ms'] / steps:>8.1f} {row['ratio']:>6.2f}"
                    f" {'{:.2f} .. {:.2f}'.format(*row['quartiles']):>14}",
                    flush=True,
                )
                if measured and not options.forward:
                    row |= shares(bundle, row, measured[-2:])
                    print(
                        f"      {row['gflops']:.0f} GFLOP/s, {row['gbs']:.0f} GB/s; of "
                        + ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
                    )
                results.append(row)
    if options.json:
        options.json.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
