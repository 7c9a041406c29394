"""Two threads against one while other processes take every core: batch 1, where the threads share columns.

    python runtimes/native/bench/busy.py mnist.tarflow --library build/native/libtarflow_native.so

Each round times both, one right after the other, in a random order. The quiet machine's ratio stands beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import time
from pathlib import Path

import numpy as np
from native_step import invert_blocks

from tarflow_runtimes.bundle.reader import open_bundle
from tarflow_runtimes.decode.turn import Conditions
from tarflow_runtimes.engines.native.library import Library


def spin() -> None:
    while True:
        sum(range(10000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--library", type=Path, default=Path("build/native/libtarflow_native.so"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--load", type=int, nargs="+", default=[0, 1, 2], help="other processes for each core")
    options = parser.parse_args()

    bundle, library = open_bundle(options.bundle), Library(options.library)
    config = bundle.config
    blocks = [library.pack(bundle, block) for block in range(config.blocks)]
    noise = np.random.default_rng(0).standard_normal((1, config.patches, config.patch_values), dtype=np.float32)
    conditions = Conditions(
        labels=np.zeros((1, 1), np.int64) if config.classes else None,
        guidance=np.zeros((1, 2, config.patches), np.float32),
        inverse_temperature=np.ones((1, 1), np.float32),
    )

    def seconds(threads: int) -> float:
        start = time.perf_counter()
        invert_blocks(library, blocks, bundle, noise, conditions, threads=threads)
        return time.perf_counter() - start

    print(f"load  one thread ms  {options.threads} threads ms  ratio   25 % .. 75 %  of the sums")
    for load in options.load:
        others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(load * (os.cpu_count() or 1))]
        for other in others:
            other.start()
        time.sleep(0.5)
        pairs = []
        for _ in range(options.rounds):
            sides = [1, options.threads]
            random.shuffle(sides)
            times = {side: seconds(side) for side in sides}
            pairs.append((times[1], times[options.threads]))
        for other in others:
            other.kill()
            other.join()
        low, ratio, high = statistics.quantiles([many / one for one, many in pairs], n=4)
        one, many = (statistics.median(pair[side] for pair in pairs) * 1e3 for side in (0, 1))
        total = sum(pair[1] for pair in pairs) / sum(pair[0] for pair in pairs)
        print(
            f"{load:>4} {one:>14.2f} {many:>13.2f} {ratio:>6.2f} {f'{low:.2f} .. {high:.2f}':>14} {total:>12.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
