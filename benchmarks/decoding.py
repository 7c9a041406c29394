"""Decoding side by side: the original, compiled PyTorch, two published parallel decoders, and this SDK.

    python benchmarks/decoding.py --reference PATH/TO/ml-tarflow [--model mnist|photos] [--json FILE]
    python benchmarks/decoding.py --auto [--model mnist,photos] [--json FILE]
    python benchmarks/decoding.py --exactness [--model mnist|photos] [--json FILE]

Machine, weights, noise and labels are the same for all; each sampler runs in a separate process, and they are called in
turn, with no thread variables set. Seconds are medians over the rounds, ratios are medians of the rounds' ratios; calls
too short to time alone are repeated within a turn. `--auto` only compares tuned plans with sequential decoding;
`--exactness` compares images without timing: those of both CPU engines with float64, those of parallel decoding with
sequential ones. Both exit with code 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _exactness import exactness
from _peer import Peer, PeerError
from _samplers import SAMPLERS
from _work import CHECKPOINTS, Work, ceilings, header, write_json

AUTO_LIMIT = 1.10
"""The largest allowed ratio of the time of `auto` to the sequential time."""

AUTO_ROUNDS = 15

TURN_SECONDS, TURN_CALLS = 0.25, 7
"""A sampler's turn lasts until one of them is reached; the median of its calls counts."""


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """A parser of numbers with commas between them."""
    return lambda text: [kind(value) for value in text.split(",")]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tune(work: Work, batches: list[int], guidances: list[float]) -> None:
    """Write tuned plans next to the bundle for cases that have none yet."""
    import tarflow_runtimes as tfr
    from tarflow_runtimes.decode.tuned import plans_path, write_plans

    with tfr.load(work.bundle) as flow:
        for guidance in guidances:
            for batch in batches:
                known = {(entry.batch, entry.branches) for entry in flow.tuned_plans().entries}
                if (batch, 2 if guidance else 1) in known:
                    continue
                started = time.monotonic()
                plans = tfr.tune(flow, (batch,), (guidance,))
                write_plans(plans_path(work.bundle), plans.entries)
                entry = plans.entries[0]
                share = entry.seconds / entry.sequential_seconds
                took = time.monotonic() - started
                say(f"tuned batch {batch}, guidance {guidance:g}: {share:.2f} of sequential ({took:.0f} s)")


@contextlib.contextmanager
def opened(names: list[str], work: Work, reference: str) -> Iterator[dict[str, Peer]]:
    """A process for each of these samplers; those that do not start are left out."""
    peers: dict[str, Peer] = {}
    try:
        for name in names:
            try:
                peers[name] = Peer(name, str(Path(__file__).resolve()), str(work.folder), reference)
            except PeerError as error:
                say(f"left out: {error}")
        yield peers
    finally:
        for peer in peers.values():
            peer.close()


class Cell:
    """One batch size and guidance: times of every sampler, round by round, and its images."""

    def __init__(self, peers: dict[str, Peer], work: Work, batch: int, guidance: float) -> None:
        self.work, self.batch, self.guidance = work, batch, guidance
        self.peers = dict(peers)
        self.request = work.request(batch, guidance)
        self.images: dict[str, np.ndarray] = {}
        self.first: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}

    def warm_up(self) -> None:
        """One call each, whose images are kept; a sampler that fails is left out from here on."""
        for name, peer in list(self.peers.items()):
            path = self.work.folder / f"{name}.npy"
            try:
                self.first[name] = peer.call(**self.request, save=str(path))
            except PeerError as error:
                say(f"left out: {error}")
                del self.peers[name]
                continue
            self.images[name] = np.load(path)
            self.times[name] = []

    def run(self, rounds: int, limit: float) -> None:
        """Rounds in which every sampler has its turn, starting with another one each time, for `limit` seconds."""
        names = list(self.peers)
        started = time.monotonic()
        for done in range(rounds):
            if done and time.monotonic() - started > limit:
                break
            first = done % len(names)
            for name in names[first:] + names[:first]:
                self.times[name].append(self._turn(self.peers[name]))

    def _turn(self, peer: Peer) -> float:
        """The median of a few calls where they are short."""
        calls = [peer.call_rested(**self.request)]
        while len(calls) < TURN_CALLS and sum(calls) < TURN_SECONDS:
            calls.append(peer.call(**self.request))
        return median(calls)

    def ratio(self, slow: str, fast: str) -> dict[str, float] | None:
        """How many times longer `slow` takes than `fast`: the median round, the lowest and the highest."""
        if slow not in self.times or fast not in self.times:
            return None
        ratios = [a / b for a, b in zip(self.times[slow], self.times[fast], strict=True)]
        return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}

    def rows(self) -> list[dict[str, Any]]:
        """One row a sampler."""
        rows = []
        for name, times in self.times.items():
            difference = self.images[name] - self.images.get("original", self.images[name])
            largest = float(np.abs(difference).max())
            rows.append(
                {
                    "sampler": name,
                    "title": self.peers[name].ready.get("title", SAMPLERS[name].title),
                    "rounds": len(times),
                    "seconds": median(times),
                    "first_call_seconds": self.first[name],
                    "images_per_s": self.batch / median(times),
                    "over_original": self.ratio("original", name),
                    "over_native": self.ratio("native", name),
                    "max_difference": largest if np.isfinite(largest) else None,
                    "detail": self.peers[name].detail,
                }
            )
        return rows


def print_rows(cell: Cell, rows: list[dict[str, Any]]) -> None:
    print(f"\nbatch {cell.batch}, guidance {cell.guidance:g}, {rows[0]['rounds']} rounds")
    print(f"{'':36s} {'seconds':>9s} {'images/s':>9s} {'x original':>10s} {'':>14s} {'x native':>10s}   max diff")
    for row in rows:
        over, ours = row["over_original"], row["over_native"]
        speedup, spread = (f"{over['median']:.2f}", f"{over['low']:.2f}..{over['high']:.2f}") if over else ("", "")
        gain = f"{ours['median']:.2f}" if ours else ""
        largest = "not finite" if row["max_difference"] is None else f"{row['max_difference']:.1e}"
        print(
            f"{row['title'][:36]:36s} {row['seconds']:9.4f} {row['images_per_s']:9.2f}"
            f" {speedup:>10s} {spread:>14s} {gain:>10s} {largest:>10s}"
        )
    sys.stdout.flush()


def earlier_cells(path: str | None, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells of an earlier run of the same model on the same machine and versions; new ones replace them."""
    if path is None or not Path(path).exists():
        return []
    document = json.loads(Path(path).read_text())
    same = all(document["header"].get(key) == head[key] for key in ("machine", "versions", "model"))
    return list(document["cells"]) if same else []


def table(options: argparse.Namespace, work: Work) -> None:
    """All samplers on every batch size and guidance."""
    if "auto" in options.samplers:
        tune(work, options.batch, options.guidance)
    with opened(options.samplers, work, str(Path(options.reference).resolve())) as peers:
        about = {name: peer.ready for name, peer in peers.items()}
        head = header(model=work.model, steps=work.steps, samplers=about, ceilings=options.ceilings)
        cells = earlier_cells(options.json, head)
        for guidance in options.guidance:
            for batch in options.batch:
                cell = Cell(peers, work, batch, guidance)
                cell.warm_up()
                cell.run(options.rounds, options.limit)
                rows = cell.rows()
                print_rows(cell, rows)
                cells = [one for one in cells if (one["batch"], one["guidance"]) != (batch, guidance)]
                cells.append({"batch": batch, "guidance": guidance, "rows": rows})
                cells.sort(key=lambda one: (one["guidance"], one["batch"]))
                if options.json:
                    write_json(options.json, {"header": head, "cells": cells})


def auto(options: argparse.Namespace, work: Work) -> list[dict[str, Any]]:
    """Tuned plans against sequential decoding: one row for each batch size and guidance."""
    tune(work, options.batch, options.guidance)
    rows = []
    with opened(["native", "auto"], work, "") as peers:
        for guidance in options.guidance:
            for batch in options.batch:
                cell = Cell(peers, work, batch, guidance)
                cell.warm_up()
                cell.run(options.rounds, options.limit)
                ratio = cell.ratio("auto", "native")
                if ratio is None:
                    raise SystemExit("a sampler failed")
                difference = np.abs(cell.images["auto"] - cell.images["native"]).max()
                seconds = {name: median(cell.times[name]) for name in ("native", "auto")}
                rows.append(
                    {
                        "model": work.model,
                        "batch": batch,
                        "guidance": guidance,
                        "rounds": len(cell.times["auto"]),
                        "seconds": seconds,
                        "auto_over_sequential": ratio,
                        "max_difference": float(difference),
                        "detail": peers["auto"].detail,
                    }
                )
                print(
                    f"{work.model.split()[0][:28]:28s} {batch:5d} {guidance:6.1f} {seconds['native']:10.4f}"
                    f" {seconds['auto']:9.4f} {ratio['median']:6.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})"
                    f" {difference:9.1e}",
                    flush=True,
                )
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--auto", action="store_true", help="only tuned plans against sequential decoding")
    modes.add_argument(
        "--exactness", action="store_true", help="images against float64, and parallel against sequential"
    )
    parser.add_argument("--reference", help="folder of the original code (transformer_flow.py)")
    parser.add_argument("--model", help="mnist or photos, or both with a comma between; default: mnist, --auto both")
    parser.add_argument("--checkpoint", help="weights of the one model, instead of the accepted ones")
    parser.add_argument("--batch", type=numbers(int), default=[1, 16, 64])
    parser.add_argument("--guidance", type=numbers(float), default=[0.0, 1.5])
    parser.add_argument("--samplers", default=",".join(SAMPLERS), help=f"of {', '.join(SAMPLERS)}")
    parser.add_argument("--rounds", type=int, help=f"default: 5, --auto {AUTO_ROUNDS}")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a batch begins no more rounds")
    parser.add_argument("--images", type=int, default=256, help="--exactness: images")
    parser.add_argument("--window", type=int, default=0, help="--exactness: window, 0 is the whole block")
    parser.add_argument("--folder", type=Path, help="keep checkpoints, bundles and tuned plans here, and reuse them")
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure the machine's limits")
    parser.add_argument("--json", help="write the results here; cells of an earlier table that were not run stay")
    options = parser.parse_args()
    options.models = (options.model or ("mnist,photos" if options.auto else "mnist")).split(",")
    options.samplers = options.samplers.split(",")
    options.rounds = options.rounds or (AUTO_ROUNDS if options.auto else 5)
    if unknown := [name for name in options.models if name not in CHECKPOINTS]:
        parser.error(f"no model {unknown[0]!r}: mnist or photos")
    if unknown := [name for name in options.samplers if name not in SAMPLERS]:
        parser.error(f"no sampler {unknown[0]!r}: {', '.join(SAMPLERS)}")
    if len(options.models) > 1 and (options.checkpoint or not options.auto):
        parser.error("one model at a time, but for --auto with the accepted checkpoints")
    needs_original = not (options.auto or options.exactness) and any(n.startswith("original") for n in options.samplers)
    if needs_original and not (options.reference and (Path(options.reference) / "transformer_flow.py").is_file()):
        parser.error("--reference must name the folder of the original code, with transformer_flow.py in it")
    options.reference = options.reference or "."
    return options


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        works = [
            Work.prepare(name, options.checkpoint or CHECKPOINTS[name], (options.folder or Path(temporary)) / name)
            for name in options.models
        ]
        options.ceilings = None if options.no_ceilings or options.exactness else ceilings()
        if options.ceilings:
            print(f"ceilings: {options.ceilings}")
        if options.exactness:
            return exactness(options, works[0])
        if options.auto:
            print(f"{'model':28s} batch  guide sequential      auto  ratio (low..high)  max diff")
            rows = []
            for work in works:
                rows += auto(options, work)
                if options.json:
                    write_json(
                        options.json, {"header": header(limit=AUTO_LIMIT, ceilings=options.ceilings), "rows": rows}
                    )
            worst = max(row["auto_over_sequential"]["median"] for row in rows)
            print(f"worst ratio {worst:.3f}, limit {AUTO_LIMIT:.2f}")
            return int(worst > AUTO_LIMIT)
        table(options, works[0])
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        SAMPLERS[sys.argv[2]].serve(Work.open(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main())
