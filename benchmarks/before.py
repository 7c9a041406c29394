"""This checkout against another one, each in its own environment: time of the same images, called in turn.

    python benchmarks/before.py --before PATH [--rounds 15] [--json FILE]

PATH is a checkout in which `make .venv/ready` has run. Each side is a process that stays alive; the sides take turns,
each first in every other round, and a ratio is the median of the rounds' ratios, this checkout's time over the other's.
Each side uses its own bundles: the one that ships with it, and one that it exports from the photos' checkpoint here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _peer import PAUSE
from _work import CHECKPOINTS, ROOT, header, write_json

SIDE = """
import json, sys, time
import tarflow_runtimes as tfr
flows = {}
def timed(name, path, images, guidance):
    began = time.perf_counter()
    flow = flows.get(name)
    if images == 0:
        with tfr.load(path) as flow:
            flow.sample(1, seed=0, denoise=False)
        return time.perf_counter() - began
    if flow is None:
        flow = flows[name] = tfr.load(path)
    labels = [i % flow.config.classes for i in range(images)] if flow.config.classes else None
    flow.sample(images, labels=labels, seed=0, guidance=guidance, denoise=False)
    return time.perf_counter() - began
for line in sys.stdin:
    print(json.dumps(timed(*json.loads(line))), flush=True)
"""
"""One side: reads one job (bundle's name, path, images, guidance) per line and prints its seconds; 0 images: load and
draw one."""

JOBS = {
    "digits": [(0, 0.0), (1, 0.0), (16, 0.0), (64, 0.0), (1, 1.5), (16, 1.5), (64, 1.5)],
    "photos": [(1, 0.0)],
}
"""Images and guidance of each measurement."""


class Side:
    """One checkout's process."""

    def __init__(self, root: Path, bundles: dict[str, str | None]) -> None:
        self.bundles = bundles
        command = [root / ".venv" / "bin" / "python", "-c", SIDE]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")

    def seconds(self, name: str, images: int, guidance: float) -> float:
        """Seconds of one job."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, self.bundles[name], images, guidance]) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the checkout's process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def round_of(sides: tuple[Side, Side], number: int, job: tuple[str, int, float]) -> tuple[float, float]:
    """Seconds of both sides; the first one changes with the round, and each starts with idle cores."""
    seconds = [0.0, 0.0]
    for side in (0, 1) if number % 2 else (1, 0):
        time.sleep(PAUSE)
        seconds[side] = sides[side].seconds(*job)
    return seconds[0], seconds[1]


def exported(root: Path, target: Path) -> str:
    """The bundle that a checkout exports from the photos' checkpoint."""
    command = [root / ".venv" / "bin" / "tarflow-export", CHECKPOINTS["photos"], "-o", target, "--no-verify"]
    subprocess.run(command, check=True, capture_output=True)
    return str(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    roots = (ROOT, arguments.before.resolve())
    for root in roots:
        if not (root / ".venv" / "bin" / "tarflow-export").is_file():
            parser.error(f"{root} has no environment: run `make .venv/ready` there")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundles: list[dict[str, str | None]] = [
            {"digits": None, "photos": exported(root, Path(folder) / f"{side}.tarflow")}
            for side, root in enumerate(roots)
        ]
        sides = (Side(roots[0], bundles[0]), Side(roots[1], bundles[1]))
        print("model   images  guidance   ms here  ms there   ratio  (low..high)")
        for name, jobs in JOBS.items():
            for images, guidance in jobs:
                seconds = [round_of(sides, number, (name, images, guidance)) for number in range(arguments.rounds + 1)]
                ratios = [here / there for here, there in seconds[1:]]
                here, there = (1e3 * statistics.median(column) for column in zip(*seconds[1:], strict=True))
                ratio = statistics.median(ratios)
                what = "load+1" if images == 0 else str(images)
                print(
                    f"{name:7s} {what:>6s} {guidance:9.1f} {here:9.1f} {there:9.1f} {ratio:7.3f}"
                    f"  {min(ratios):.2f}..{max(ratios):.2f}",
                    flush=True,
                )
                rows.append(
                    {
                        "model": name,
                        "images": images,
                        "guidance": guidance,
                        "ms": here,
                        "ms_before": there,
                        "ratio": ratio,
                    }
                )
        for side in sides:
            side.close()
    if arguments.json:
        write_json(arguments.json, {"header": header(rounds=arguments.rounds), "rows": rows})


if __name__ == "__main__":
    main()
