"""The native step against ONNX Runtime's: all blocks of a bundle, inverted by both in turn in one process.

    python runtimes/native/native_build.py --output build/native
    python runtimes/native/bench/native_step.py mnist.tarflow --library build/native/libtarflow_native.so
    python runtimes/native/bench/native_step.py mnist.tarflow --library build/native/libtarflow_native.so --forward

`--forward` compares the forward pass, patches to noise and log|det|, instead.

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
from tarflow_runtimes.engines.ort_cpu.engine import OrtCpuEngine

Side = Callable[[], np.ndarray[Any, Any]]


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
    parser.add_argument("--library", type=Path, default=Path("build/native/libtarflow_native.so"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.5], help="0 is unguided")
    parser.add_argument("--forward", action="store_true", help="the forward pass, which has no guidance")
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


def sides(
    engine: OrtCpuEngine, library: Library, blocks: Sequence[Block], batch: int, *, weight: float, **options: Any
) -> tuple[Side, Side]:
    """The inverse of all blocks, by the engine and by the library."""
    bundle = engine.bundle
    config, branches = bundle.config, 2 if weight else 1
    noise, labels = inputs(bundle, batch)
    if labels is not None:
        labels = np.stack([labels, np.full(batch, config.classes)])[:branches]
    guidance = np.full((batch, 2, config.patches), weight, np.float32)
    inverse_temperature = np.ones((branches, batch), np.float32)
    conditions = Conditions(labels=labels, guidance=guidance, inverse_temperature=inverse_temperature)
    turns = [Turn(block=block, strategy=Sequential()) for block in reversed(range(config.blocks))]
    return (
        lambda: engine.invert(turns, noise, conditions)[0],
        lambda: invert_blocks(library, blocks, bundle, noise, conditions, **options),
    )


def forward_sides(
    engine: OrtCpuEngine, library: Library, blocks: Sequence[Block], batch: int, **options: Any
) -> tuple[Side, Side]:
    """The forward pass of all blocks, by the engine and by the library."""
    bundle = engine.bundle
    patches, labels = inputs(bundle, batch)

    def reference() -> np.ndarray[Any, Any]:
        x = patches
        for block in range(bundle.config.blocks):
            x, _ = engine.forward(block, x, labels)
        return x

    return reference, lambda: forward_blocks(library, blocks, bundle, patches, labels, **options)[0]


def inputs(bundle: Bundle, batch: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Noise [B, N, D] and labels [B]."""
    config = bundle.config
    noise = np.random.default_rng(0).standard_normal((batch, config.patches, config.patch_values), dtype=np.float32)
    if bundle.prior_variance is not None:
        noise *= np.sqrt(bundle.prior_variance)
    return noise, np.arange(batch) % config.classes if config.classes else None


def main() -> None:
    options = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    bundle, library = open_bundle(options.bundle), Library(options.library)
    config = bundle.config
    engine = OrtCpuEngine(bundle)
    blocks = [library.pack(bundle, block) for block in range(config.blocks)]
    kernel = options.kernel or library.kernels[0]
    run = {"threads": options.threads, "kernel": kernel}
    print(f"{bundle.path.name} ({bundle.precision}), {options.threads} threads, {kernel}, {options.rounds} rounds")
    print("batch guidance  ort-cpu ms  native ms  ratio   25 % .. 75 %  GFLOP/s")
    results = []
    for batch in options.batch:
        for weight in [0.0] if options.forward else options.guidance:
            given = engine, library, blocks, batch
            reference, native = forward_sides(*given, **run) if options.forward else sides(*given, weight=weight, **run)
            difference = float(np.abs(reference() - native()).max())
            pairs = []
            for _ in range(options.rounds):
                order = [reference, native]
                random.shuffle(order)
                times = {side: seconds(side) for side in order}
                pairs.append((times[reference], times[native]))
            ratios = [ours[0] / ours[1] for ours in pairs]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            theirs, ours = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
            per_step = 2 * 12 * config.layers * config.width**2 + 6 * config.width * config.patch_values
            gflops = (2 if weight else 1) * batch * (config.patches - 1) * config.blocks * per_step / ours / 1e9
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
                    "pass": "forward" if options.forward else "inverse",
                    "results": results,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
