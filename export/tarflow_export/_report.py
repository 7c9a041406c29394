"""Reports of an export: the plan before it, its stages, and the comparisons after it; as data and as text."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tarflow_export._plan import Plan
from tarflow_export._verify import Extent
from tarflow_runtimes.bundle.tolerances import Record

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done, and its total."""

MEASURES = {"max_abs": "max", "max_scaled": "scaled", "relative": "rel"}
"""The names of measures in the table."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """The results of an export.

    `seconds` is the time of each stage; `nbytes` the size of all files; `verification` that of the manifest;
    `assumptions` describes what was assumed because the checkpoint did not say.
    """

    path: Path
    digest: str
    nbytes: int
    parameters: int
    assumptions: tuple[str, ...]
    verification: Mapping[str, Any]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The fields, JSON values only."""
        return {
            "bundle": str(self.path),
            "digest": self.digest,
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "assumptions": list(self.assumptions),
            "verification": dict(self.verification),
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
        }


class Stages:
    """Names the stage that runs, for the callback, and times it: `with stages("write"): ...`."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_progress = on_progress
        self._stage = ""
        self._start = 0.0

    def __call__(self, stage: str) -> Stages:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self.progress(0, 1)

    def __exit__(self, *error: object) -> None:
        self.seconds[self._stage] = time.perf_counter() - self._start

    def progress(self, done: int, total: int) -> None:
        """Report the progress of the stage."""
        if self._on_progress is not None:
            self._on_progress(self._stage, done, total)


def parity_table(records: Sequence[Record], floors: Mapping[str, float]) -> Table:
    """One row per graph and computation: the block closest to its bound, and PyTorch's own float32 error.

    Every comparison, with its shape, mean and cosine, is in the manifest and in --json.
    """
    table = Table(box=box.SIMPLE_HEAD, title="Comparison with PyTorch", title_justify="left", pad_edge=False)
    table.add_column("graph", no_wrap=True)
    table.add_column("what, where it is worst", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    table.add_column("floor", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        graph = re.sub(r"^(block_\d+|graphs)/(.*)\.onnx$", r"\2", record.graph or "whole model")
        key = (
            graph if "/" in graph or record.graph is None else f"portable/{graph}",
            re.sub(r"^block \d+ ", "", record.name),
        )
        groups.setdefault(key, []).append(record)
    for (graph, _), group in groups.items():
        record = max(group, key=lambda one: math.inf if one.value is None else one.value / one.tolerance)
        bound = f"{MEASURES[record.measure]} {_number(record.value)} <= {record.tolerance:.1e}"
        table.add_row(
            graph,
            record.name.removeprefix("whole model "),
            bound if not record.non_finite else f"{record.non_finite} values not finite",
            _number(floors.get(record.name)),
            "ok" if record.passed else "MISSED",
            style="" if record.passed else "bold red",
        )
    return table


def plan_facts(plan: Plan, extent: Extent | None, parameters: int) -> dict[str, Any]:
    """The plan as data: graphs, bytes, memory, and what would be verified (None: nothing)."""
    files = plan.files
    return {
        "model": dataclasses.asdict(plan.config),
        "parameters": parameters,
        "precision": plan.layout.precision,
        "graphs": {
            f"{graph.provider}/{graph.kind}": {"nodes": graph.nodes, "bytes": len(graph.serialized)}
            for graph in plan.graphs
        },
        "files": files,
        "bytes": sum(files.values()),
        "peak_memory_bytes": peak_memory(plan, extent, parameters),
        "verification": None if extent is None else extent.to_json(),
    }


def peak_memory(plan: Plan, extent: Extent | None, parameters: int) -> int:
    """Estimate in bytes, good to a third: libraries, state dict, and the most that one block needs on top.

    That is, verifying, the gradient graph: attention weights [B, H, N, N] of every layer and some 25 hidden states
    [B*N, W] per layer, beside its weights twice (as they are and packed for the processor).
    """
    config = plan.config
    base = 400 * 2**20 + 4 * parameters
    if extent is None:
        return base + plan.layout.nbytes
    attention = config.heads * config.patches**2 * (config.layers + 4)
    hidden = 25 * config.patches * config.width * config.layers
    return base + 2 * plan.layout.nbytes + 4 * extent.images * (attention + hidden)


def plan_lines(facts: Mapping[str, Any]) -> list[str]:
    """The plan as lines of text."""
    model, extent = facts["model"], facts["verification"]
    weights = sum(size for name, size in facts["files"].items() if name.endswith(".bin"))
    data = f"{model['tokens']} tokens of {model['token_values']}"
    if model["tokens"] is None:
        side = model["image_size"]
        data = f"{model['image_channels']}x{side}x{side} images in patches of {model['patch_size']}"
    about = (
        f"model         {model['blocks']} blocks of {model['layers']} layers, width {model['width']}, "
        f"{data}, {model['classes']} classes, {facts['parameters']:,} parameters"
    )
    graphs = [
        f"{'graph':<12}  {kind}, {graph['nodes']} nodes, {size(graph['bytes'])}"
        for kind, graph in facts["graphs"].items()
    ]
    lines = [
        about,
        *graphs,
        f"weights       {size(weights)} in {model['blocks']} files, {facts['precision']}",
        f"bundle        {size(facts['bytes'])}, verification's reference aside",
        f"peak memory   about {size(facts['peak_memory_bytes'])}",
    ]
    if extent is None:
        return [*lines, "verification  none"]
    whole = "whole samples" if extent["end_to_end"] else "no whole samples: blocks only"
    images = f"{extent['images']} image{'s' * (extent['images'] > 1)}"
    return [*lines, f"verification  {images}, {extent['steps']} steps of each block's inverse, {whole}"]


def size(nbytes: float) -> str:
    """Format a number of bytes with decimal units."""
    power = min(3, int(math.log10(max(nbytes, 1)) // 3))
    return f"{nbytes / 1000**power:.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB')[power]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
