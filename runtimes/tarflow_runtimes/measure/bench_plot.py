"""`draw_plot`: the plot of a benchmark: time per block, time of a step over its index, convergence per block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.measure.bench_results import BenchResult, BlockResult, CaseResult

if TYPE_CHECKING:
    from PIL import Image

WIDTH: Final = 1200
"""Width of the plot in pixels; the height depends on the contents."""

OVERSAMPLING: Final = 3
"""The plot is drawn this many times larger and reduced, because Pillow draws lines without antialiasing."""

COLOURS: Final = ("#3b6fb6", "#e08a2b", "#4b9d5b", "#a1609f", "#d1495b", "#5aa9b5", "#8a6d4f", "#c9a227")
"""Colours of blocks (or cases), used in turn; distinguishable with the common colour vision deficiencies."""

INK, GREY, RULE, PAPER = "#222222", "#6b6b6b", "#e3e3e3", "#ffffff"

MARGIN, GAP, HEAD, BAR, PANEL = 36, 44, 84, 26, 290


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a panel: its name in the legend, its values at 0, 1, 2, ..., and its colour."""

    name: str
    values: Sequence[float]
    colour: str
    dashed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """A pair of axes from zero, with lines."""

    title: str
    across: str
    lines: Sequence[Line]


def draw_plot(result: BenchResult) -> Image.Image:
    """The plot of a benchmark, RGB, WIDTH pixels wide."""
    from PIL import Image

    steps = _step_panel(result.cases)
    panels = [_convergence(one, result.cases) for one in result.cases if _is_parallel(one)]
    top = HEAD + 98 + BAR * len(result.cases)
    rows = (steps is not None) + math.ceil(len(panels) / 2)
    height = top + rows * (PANEL + GAP)
    sheet = Image.new("RGB", (WIDTH * OVERSAMPLING, height * OVERSAMPLING), PAPER)
    pen = _Pen(sheet)
    pen.text(MARGIN, 34, f"Decoding {result.header['bundle']}", size=24, anchor="ls")
    pen.text(MARGIN, 60, _subtitle(result), size=14, colour=GREY, anchor="ls")
    _draw_bars(pen, result.cases, top=HEAD)
    if steps is not None:
        _draw_panel(pen, steps, left=MARGIN, top=top, width=WIDTH - 2 * MARGIN)
        top += PANEL + GAP
    half = (WIDTH - 2 * MARGIN - GAP) // 2
    for index, panel in enumerate(panels):
        left = MARGIN + index % 2 * (half + GAP)
        _draw_panel(pen, panel, left=left, top=top + index // 2 * (PANEL + GAP), width=half)
    return sheet.resize((WIDTH, height), Image.Resampling.LANCZOS)


class _Pen:
    """Draws on the oversampled sheet, in coordinates of the finished plot."""

    def __init__(self, sheet: Image.Image) -> None:
        from PIL import ImageDraw

        self._draw = ImageDraw.Draw(sheet)
        self._fonts: dict[int, Any] = {}

    def text(self, x: float, y: float, text: str, *, size: int = 13, colour: str = INK, anchor: str = "lm") -> None:
        self._draw.text((x * OVERSAMPLING, y * OVERSAMPLING), text, fill=colour, font=self._font(size), anchor=anchor)

    def width(self, text: str, *, size: int = 13) -> float:
        return float(self._draw.textlength(text, font=self._font(size))) / OVERSAMPLING

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        corners = [value * OVERSAMPLING for value in (left, top, right, bottom)]
        if corners[2] - corners[0] >= 1:
            self._draw.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill=colour)

    def line(self, points: Sequence[tuple[float, float]], colour: str, *, width: float = 1.0) -> None:
        scaled = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
        self._draw.line(scaled, fill=colour, width=max(1, round(width * OVERSAMPLING)), joint="curve")

    def dashes(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        length = math.dist(start, end)
        for i in range(0, int(length), 9):
            near, far = i / length, min(1.0, (i + 5) / length)
            self.line([tuple(a + t * (b - a) for a, b in zip(start, end, strict=True)) for t in (near, far)], colour)  # type: ignore[misc]

    def _font(self, size: int) -> Any:
        from PIL import ImageFont

        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size * OVERSAMPLING)
        return self._fonts[size]


def _subtitle(result: BenchResult) -> str:
    head = result.header
    parts = [f"{head['processor']}, {head['cpus']} CPUs", f"{head['rounds']} rounds", str(head["date"])[:10]]
    if result.ceilings is not None:
        rates = result.ceilings.all_threads
        parts.insert(1, f"at most {rates.gemm_gflops:.0f} GFLOP/s and {rates.gemv_gbs:.0f} GB/s")
    return "   |   ".join(parts)


def _is_parallel(one: CaseResult) -> bool:
    return any(block.settled for block in one.blocks)


def _name(one: CaseResult, cases: Sequence[CaseResult], *, decode: bool = True) -> str:
    """The name of a case, without what is the same in all cases."""
    parts = [f"batch {one.case.batch}"]
    if len({other.case.engine for other in cases}) > 1:
        parts.insert(0, one.case.engine)
    if any(other.case.guidance for other in cases):
        parts.append(f"guidance {one.case.guidance:g}")
    return ", ".join([*parts, one.case.decode] if decode else parts)


def _draw_bars(pen: _Pen, cases: Sequence[CaseResult], *, top: float) -> None:
    """One bar per case: time of an image, divided into blocks in the order in which they run."""
    order = [block.block for block in cases[0].blocks]
    names = [_name(one, cases) for one in cases]
    left = MARGIN + max(pen.width(name) for name in names) + 12
    right: float = WIDTH - MARGIN - 150
    longest = max(sum(block.ms for block in one.blocks) / one.case.batch for one in cases)
    pen.text(MARGIN, top + 14, "Time per block, ms per image", size=16)
    x: float = WIDTH - MARGIN
    for number in reversed(order):
        label = f"block {number}"
        x -= pen.width(label, size=12)
        pen.text(x, top + 14, label, size=12, colour=GREY)
        pen.box(x - 17, top + 8, x - 5, top + 20, _colour(number))
        x -= 32
    first = top + 36
    bottom = first + BAR * len(cases)
    ticks = round_ticks(longest)
    for tick in ticks:
        x = left + (right - left) * tick / longest
        pen.line([(x, first - 4), (x, bottom)], RULE)
        pen.text(x, bottom + 4, _number(tick), size=12, colour=GREY, anchor="ma")
    for index, (one, name) in enumerate(zip(cases, names, strict=True)):
        y = first + BAR * index
        if index and not one.case.same_work(cases[index - 1].case):
            pen.line([(MARGIN, y - 2), (right, y - 2)], RULE)
        pen.text(left - 12, y + BAR / 2 - 2, name, anchor="rm")
        x = left
        for block in one.blocks:
            end = x + (right - left) * block.ms / one.case.batch / longest
            pen.box(x, y + 2, end, y + BAR - 6, _colour(block.block))
            x = end
        text = f"{one.p50_ms / one.case.batch:.3g} ms"
        text += f"  ({one.speedup:.2f}x)" if one.case.decode != cases[0].case.decode else ""
        pen.text(x + 8, y + BAR / 2 - 2, text, colour=GREY)


def _step_panel(cases: Sequence[CaseResult]) -> Panel | None:
    """Time of a step over its index: one line for each case of the first sequential strategy, if any."""
    sequential = [one for one in cases if all(len(block.step_us) > 1 for block in one.blocks)]
    shown = [one for one in sequential if one.case.decode == sequential[0].case.decode]
    if not shown:
        return None
    lines = [
        Line(
            name=_name(one, cases, decode=False) + _slope_text(one),
            values=_cut(np.median([block.step_us for block in one.blocks], axis=0) / one.case.batch),
            colour=_colour(index),
        )
        for index, one in enumerate(shown)
    ]
    return Panel(title="Sequential step, us per image", across="index of the step; the first is cut", lines=lines)


def _cut(steps: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """The times with the first step cut off, which includes the start of the block."""
    return tuple(np.minimum(steps, steps[1:].max()).tolist())


def _slope_text(one: CaseResult) -> str:
    return "" if one.slope_us is None else f": {one.slope_us / one.case.batch:+.3f} us per index"


def _convergence(one: CaseResult, cases: Sequence[CaseResult]) -> Panel:
    lines = [_settled(block) for block in one.blocks if block.settled]
    patches = int(max(line.values[-1] for line in lines))
    straight = Line(name="sequential", values=tuple(range(1, patches + 1)), colour=GREY, dashed=True)
    longest = max(len(line.values) for line in lines)
    lines.append(dataclasses.replace(straight, values=straight.values[: max(longest, 2)]))
    title = f"Patches settled: {_name(one, cases)}"
    return Panel(title=title, across="calls of an image", lines=lines)


def _settled(block: BlockResult) -> Line:
    return Line(
        name=f"block {block.block}: {block.calls_mean:.1f} calls", values=block.settled, colour=_colour(block.block)
    )


def _draw_panel(pen: _Pen, panel: Panel, *, left: float, top: float, width: float) -> None:
    """Draw axes from zero, the lines, and a legend to their right."""
    pen.text(left, top + 10, panel.title, size=16)
    legend = left + width - max(pen.width(line.name, size=12) for line in panel.lines)
    x0, x1, y0, y1 = left + 40, legend - 48, top + PANEL - 34, top + 30
    most_x = max(len(line.values) for line in panel.lines) - 1
    most_y = 1.02 * max(max(line.values) for line in panel.lines)

    def at(x: float, y: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * x / max(most_x, 1), y0 + (y1 - y0) * y / most_y

    for tick in round_ticks(most_y):
        y = at(0, tick)[1]
        pen.line([(x0, y), (x1, y)], RULE)
        pen.text(x0 - 7, y, _number(tick), size=12, colour=GREY, anchor="rm")
    for tick in round_ticks(most_x, whole=True):
        x = at(tick, 0)[0]
        pen.text(x, y0 + 5, _number(tick), size=12, colour=GREY, anchor="ma")
    pen.text(x1, y0 + 20, panel.across, size=12, colour=GREY, anchor="ra")
    for line in panel.lines:
        points = [at(i, value) for i, value in enumerate(line.values)]
        if line.dashed:
            pen.dashes(points[0], points[-1], line.colour)
        else:
            pen.line(points, line.colour, width=2.2)
    for index, line in enumerate(panel.lines):
        y = y1 + 8 + 20 * index
        if line.dashed:
            pen.dashes((legend - 28, y), (legend - 8, y), line.colour)
        else:
            pen.line([(legend - 28, y), (legend - 8, y)], line.colour, width=2.2)
        pen.text(legend, y, line.name, size=12)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def round_ticks(most: float, *, whole: bool = False) -> list[float]:
    """Round numbers from 0 to `most`, about six: 1, 2, 2.5 or 5 times a power of ten apart."""
    rough = max(most, 1e-9) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(step * power for step in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if step * power >= rough)
    apart = max(apart, 1.0) if whole else apart
    return [i * apart for i in range(int(most / apart + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.10g}"
