"""The native step against ONNX Runtime's: all blocks of a bundle, inverted by both in turn in one process.

    python runtimes/native/native_build.py --output build/native
    python runtimes/native/bench/native_step.py mnist.tarflow --library build/native/libtarflow_native.so

Each round times both sides, one right after the other, in a random order; the ratio is the median of the rounds'
ratios, so that a machine whose clock or neighbours change disturbs both alike. Each side runs once untimed before it is
timed, since the other one's weights have taken its place in the caches. `--threads 1` binds the process to one CPU
before either side counts them. GFLOP/s are those of the products with the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tarflow_runtimes.bundle.reader import Bundle, open_bundle
from tarflow_runtimes.decode.plan import Sequential
from tarflow_runtimes.decode.turn import Conditions, Turn
from tarflow_runtimes.engines.native.library import Block, Library
from tarflow_runtimes.engines.open import Options, open_engine


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--library", type=Path, default=Path("build/native/libtarflow_native.so"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.5], help="0 is unguided")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kernel", help="x86-64-v4, x86-64-v3, aarch64, portable; by default the best")
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args()


def seconds(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    options = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    bundle, library = open_bundle(options.bundle), Library(options.library)
    config = bundle.config
    engine, _ = open_engine("ort-cpu", bundle, Options(tf32=False, engine_dir=None, on_building=None))
    blocks = [library.pack(bundle, block) for block in range(config.blocks)]
    turns = [Turn(block=block, strategy=Sequential()) for block in reversed(range(config.blocks))]
    kernel = options.kernel or library.kernels[0]
    print(f"{bundle.path.name} ({bundle.precision}), {options.threads} threads, {kernel}, {options.rounds} rounds")
    print("batch guidance  ort-cpu ms  native ms  ratio   25 % .. 75 %  GFLOP/s")
    results = []
    for batch in options.batch:
        for weight in options.guidance:
            branches = 2 if weight else 1
            rng = np.random.default_rng(0)
            noise = rng.standard_normal((batch, config.patches, config.patch_values), dtype=np.float32)
            if bundle.prior_variance is not None:
                noise *= np.sqrt(bundle.prior_variance)
            labels = None
            if config.classes:
                null = np.full(batch, config.classes)
                labels = np.stack([np.arange(batch) % config.classes, null])[:branches]
            guidance = np.full((batch, 2, config.patches), weight, np.float32)
            inverse_temperature = np.ones((branches, batch), np.float32)
            conditions = Conditions(labels=labels, guidance=guidance, inverse_temperature=inverse_temperature)

            def reference(noise: np.ndarray = noise, conditions: Conditions = conditions) -> np.ndarray:
                return engine.invert(turns, noise, conditions)[0]

            def native(noise: np.ndarray = noise, conditions: Conditions = conditions) -> np.ndarray:
                return invert_blocks(library, blocks, bundle, noise, conditions, threads=options.threads, kernel=kernel)

            difference = float(np.abs(reference() - native()).max())
            pairs = []
            for _ in range(options.rounds):
                sides = [reference, native]
                random.shuffle(sides)
                times = {side: seconds(side) for side in sides}
                pairs.append((times[reference], times[native]))
            ratios = [ours[0] / ours[1] for ours in pairs]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            theirs, ours = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
            per_step = 2 * 12 * config.layers * config.width**2 + 6 * config.width * config.patch_values
            gflops = branches * batch * (config.patches - 1) * config.blocks * per_step / ours / 1e9
            print(
                f"{batch:>5} {weight:>8.1f} {theirs * 1e3:>11.2f} {ours * 1e3:>10.2f} {ratio:>6.2f} "
                f"{f'{low:.2f} .. {high:.2f}':>14} {gflops:>8.0f}",
                flush=True,
            )
            results.append(
                {
                    "batch": batch,
                    "guidance": weight,
                    "ort_cpu_ms": theirs * 1e3,
                    "native_ms": ours * 1e3,
                    "ratio": ratio,
                    "quartiles": [low, high],
                    "gflops": gflops,
                    "largest_difference": difference,
                }
            )
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "bundle": bundle.path.name,
                    "precision": bundle.precision,
                    "threads": options.threads,
                    "kernel": kernel,
                    "results": results,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
