"""Where parallel decoding can pay: what one evaluation of S patches costs, and how many evaluations a block takes.

    python benchmarks/windows.py BUNDLE [--images 8] [--json FILE]

Costs are medians for one image, means over the evaluations of block 0, in units of one sequential step, measured in
turn. The evaluations of a block are counted, not timed: means over images, from drawn noise. Their product against
N - 1 says whether a window pays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

import tarflow_runtimes as tfr
from tarflow_runtimes.decode.turn import Turn
from tarflow_runtimes.model.guidance import conditions_of

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def costs(flow: tfr.Flow, rounds: int) -> tuple[float, dict[int, float]]:
    """Milliseconds of a sequential step, and those of one evaluation by window size, of block 0 for one image."""
    config, whole = flow.config, flow.config.patches - 1
    noise = np.random.default_rng(0).standard_normal((1, config.patches, config.patch_values), dtype=np.float32)
    given = conditions_of([tfr.Guidance()], np.zeros(1, np.int64) if config.classes else None, config)
    single = Turn(block=0, strategy=tfr.Sequential())
    sizes = (*(size for size in SIZES if size < whole), whole)
    # With tolerance 0 an evaluation settles a patch or more, so that at most N - 1 come; that many is what is counted.
    turns = {size: Turn(block=0, strategy=tfr.Parallel(window=size, tolerance=0.0)) for size in sizes}
    steps, taken = [], {size: list[float]() for size in sizes}
    for _ in range(rounds + 1):
        began = time.perf_counter()
        flow.engine.invert([single], noise, given)
        steps.append((time.perf_counter() - began) / whole)
        for size, turn in turns.items():
            began = time.perf_counter()
            _, (report,) = flow.engine.invert([turn], noise, given)
            taken[size].append((time.perf_counter() - began) / report.calls[0])
    return 1e3 * statistics.median(steps[1:]), {size: 1e3 * statistics.median(s[1:]) for size, s in taken.items()}


def evaluations(flow: tfr.Flow, images: int, tolerance: float) -> dict[int, list[float]]:
    """Mean evaluations of each block (the first to run first) by window size."""
    labels = [i % flow.config.classes for i in range(images)] if flow.config.classes else None
    whole = flow.config.patches - 1
    found = {}
    for size in (*(size for size in SIZES if 1 < size < whole), whole):
        plan = tfr.Parallel(window=size, tolerance=tolerance)
        report = flow.sample(images, labels=labels, seed=0, denoise=False, plan=plan).report
        found[size] = [statistics.mean(block.calls) for block in report.blocks]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--json", help="write the table to this file")
    arguments = parser.parse_args()
    with tfr.load(arguments.bundle) as flow:
        step, by_size = costs(flow, arguments.rounds)
        counted = evaluations(flow, arguments.images, arguments.tolerance) if arguments.images else {}
        whole = flow.config.patches - 1
        header = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
            "onnxruntime": version("onnxruntime"),
            "bundle": Path(arguments.bundle).name,
            "patches": flow.config.patches,
            "width": flow.config.width,
            "tolerance": arguments.tolerance,
            "images": arguments.images,
        }
    print(json.dumps(header))
    print(f"one sequential step: {step:.3f} ms")
    print("window  cost in steps  evaluations by block, and gain over sequential by their product")
    rows = []
    for size, milliseconds in by_size.items():
        cost = milliseconds / step
        gains = [(calls, whole / (calls * cost)) for calls in counted.get(size, ())]
        print(f"{size:6d} {cost:14.2f}  " + "  ".join(f"{calls:6.1f} ({gain:.2f}x)" for calls, gain in gains))
        rows.append(
            {"window": size, "cost_steps": cost, "evaluations": counted.get(size), "gain": [g for _, g in gains]}
        )
    if arguments.json:
        document = {"header": header, "step_ms": step, "rows": rows}
        Path(arguments.json).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
