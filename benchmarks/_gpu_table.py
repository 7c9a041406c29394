"""The results of `gpu.py` as Markdown: `document`, of a `table` for each cell."""

from __future__ import annotations

from typing import Any

BASELINES = ("original", "graphed-bfloat16", "graphed-float16", "graphed-float32")
"""The baselines of speed-ups: the first of these that ran."""

COLUMNS = ("sampler", "s, whole model", "ms per step", "images/s", "speed-up", "of the floor", "PSNR, dB", "max diff")


def document(result: dict[str, Any]) -> str:
    """The whole file: what ran where, the limits of the card, and the tables."""
    head, floors = result["header"], result["floors"]
    gpus = "; ".join(
        f"{gpu['name']} (sm_{gpu['capability'][0]}{gpu['capability'][1]}, {gpu['memory'] / 1e9:.0f} GB)"
        for gpu in head["gpus"]
    )
    lines = [
        f"# Sampling on {gpus if head['device'] == 'cuda' else 'a CPU, to try the script'}",
        "",
        f"* {head['date']}, commit {head['commit']}, {head['machine']}",
        f"* driver {head['driver']['version'] or 'none'}, CUDA up to {head['driver']['cuda']}",
        f"* {listed(head['versions'] | head['packages'])}",
        f"* limits of the device: {listed({name: f'{value:.4g}' for name, value in floors.items()})}",
        "* Times are medians of interleaved rounds and include the way of latents and images between host and device.",
        "  The floor is the larger of the bytes and the operations of a sequential decode at these limits.",
        "* PSNR and the largest difference are to the images of the first sampler in the first dtype.",
        "* PyTorch with a CUDA graph replays one recorded step at a time and attends to whole caches, as ort-cuda",
        "  does; ours replays up to 16 steps at a time.",
    ]
    return "\n".join([*lines, *map(table, result["cells"])]) + "\n"


def table(cell: dict[str, Any]) -> str:
    """A cell under its heading, followed by the samplers that did not run."""
    how = "sequential" if cell["window"] is None else f"parallel, window {cell['window'] or 'whole block'}"
    images = f"{cell['batch']} image{'s' * (cell['batch'] != 1)}"
    ran = [row["sampler"] for row in cell["rows"]]
    against = next((name for name in BASELINES if name in ran), "")
    lines = [
        f"\n## {cell['model']}: {images}, guidance {cell['guidance']:g}, {how}, {cell['dtype']}\n",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += [f"| {' | '.join(_cells(row, against))} |" for row in cell["rows"]]
    return "\n".join([*lines, *(f"\nDid not run: {reason}" for reason in cell["failed"])])


def _cells(row: dict[str, Any], against: str) -> list[str]:
    gain = row["faster_than"].get(against)
    return [
        row["title"],
        _number(row["model_seconds"], ".4g"),
        _number(row["ms_per_step"], ".3f"),
        _number(row["images_per_s"], ".3g"),
        "-" if gain is None else f"{gain['median']:.2f} ({gain['low']:.2f}..{gain['high']:.2f})",
        _number(row["floor_share"], ".1%"),
        _number(row["psnr_db"], ".1f"),
        _number(row["max_difference"], ".1e"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def listed(facts: dict[str, Any]) -> str:
    """Format facts as `a 1, b 2`."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
