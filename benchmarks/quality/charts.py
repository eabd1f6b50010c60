"""Charts as SVG: a row per name, a mark with whiskers per series, the numbers beside it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.quality.statistics import Interval
from benchmarks.quality.words import number, spread

_COLORS = ("#1f6fb2", "#c2570c")  # told apart by those who see no red or green; shapes differ too
_WIDTH, _LEFT, _PLOT, _TOP, _ROW = 920, 250, 400, 92, 28


@dataclass(frozen=True)
class Series:
    """One mark per row of a chart.

    Attributes:
        label: in the legend.
        values: row -> interval; rows may be missing.
        form: of the numbers beside the chart.
    """

    label: str
    values: Mapping[str, Interval]
    form: str


def chart(
    title: str,
    axis: str,
    series: Sequence[Series],
    *,
    lines: Sequence[tuple[float, str]],
    best_first: Callable[[float], float],
) -> str:
    """An SVG with a row per name, a mark and whiskers per series, and the numbers beside it.

    It brings its own light ground, so that it reads the same on a dark page. An interval that
    leaves the axis ends in an arrow.

    Args:
        title: of the chart.
        axis: label with its unit.
        series: at most two; rows are sorted by the first that has them.
        lines: places on the axis to mark, with their names.
        best_first: key of a mean that sorts the rows.
    """
    names_of_rows = list(dict.fromkeys(row for one in series for row in one.values))

    def order(row: str) -> tuple[bool, float]:
        value = next(one.values[row].mean for one in series if row in one.values)
        return not math.isfinite(value), best_first(value) if math.isfinite(value) else 0.0

    rows = sorted(names_of_rows, key=order)
    low, high = axis_range(series, [at for at, _ in lines])
    bottom = _TOP + _ROW * max(1, len(rows))
    height = bottom + 56

    def x_of(value: float) -> float:
        return _LEFT + _PLOT * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222222">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(spoken(title, series))}</desc>",
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#fbfbf9"/>',
        _text(20, 28, title, 'font-size="17" font-weight="bold"'),
    ]
    for tick in ticks(low, high):
        x = x_of(tick)
        parts.append(_line(x, _TOP, x, bottom, "#e2e2dd"))
        parts.append(_text(x, bottom + 18, f"{tick:g}".replace("-", "−"), 'text-anchor="middle"'))
    for at, label in lines:
        parts.append(_line(x_of(at), _TOP - 4, x_of(at), bottom, "#555555"))
        extra = 'text-anchor="middle" fill="#555555" font-size="12"'
        parts.append(_text(x_of(at), _TOP - 10, label, extra))
    parts.append(_text(_LEFT + _PLOT / 2, bottom + 42, axis, 'text-anchor="middle"'))
    for index, one in enumerate(series):
        column = _LEFT + _PLOT + 20 + 120 * index
        parts.append(_mark(index, column + 5, _TOP - 39))
        parts.append(_text(column + 16, _TOP - 34, one.label, 'font-weight="bold"'))
        parts.append(_text(column, _TOP - 10, "mean, n", 'font-size="12" fill="#555555"'))
    for index, row in enumerate(rows):
        middle = _TOP + _ROW * (index + 0.5)
        parts.append(_text(_LEFT - 12, middle + 4, row, 'text-anchor="end"'))
        for which, one in enumerate(series):
            if row not in one.values:
                continue
            value = one.values[row]
            y = middle + (0 if len(series) == 1 else 10 * which - 5)
            if math.isfinite(value.mean):
                parts += _whiskers(which, value, y, x_of)
            column = _LEFT + _PLOT + 20 + 120 * which
            label = f"{number(value.mean, one.form)}, n = {value.num}"
            parts.append(_text(column, middle + 4, label, f'fill="{_COLORS[which]}"'))
    if not rows:
        parts.append(_text(_LEFT + _PLOT / 2, _TOP + 18, "no runs yet", 'text-anchor="middle"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def spoken(title: str, series: Sequence[Series]) -> str:
    """What a chart shows, in words."""
    parts = [
        f"{one.label}: "
        + "; ".join(
            f"{row} {spread(v, one.form).replace('[', '(').replace(']', ')')}, n = {v.num}"
            for row, v in one.values.items()
        )
        for one in series
    ]
    return f"{title}. " + (". ".join(parts) or "No runs yet") + "."


def axis_range(series: Sequence[Series], marked: Sequence[float]) -> tuple[float, float]:
    """Ends of the axis: all means, and intervals as far as they do not dwarf these."""
    intervals = [v for one in series for v in one.values.values() if math.isfinite(v.mean)]
    means = [*(v.mean for v in intervals), *marked]
    low, high = min(means), max(means)
    room = 0.25 * (high - low) or 1.0
    ends = [e for v in intervals for e in (v.low, v.high) if math.isfinite(e)]
    lowest = max(min([low, *ends]), low - room)
    highest = min(max([high, *ends]), high + room)
    margin = 0.04 * (highest - lowest) or 1.0
    return lowest - margin, highest + margin


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers of the range."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(s for s in (step / 10, step / 5, step / 2, step, 2 * step) if (high - low) / s < 10)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _whiskers(
    which: int, value: Interval, y: float, x_of: Callable[[float], float]
) -> Iterable[str]:
    color = _COLORS[which]
    if math.isfinite(value.low) and math.isfinite(value.high):
        ends = [x_of(value.low), x_of(value.high)]
        left, right = max(ends[0], _LEFT), min(ends[1], _LEFT + _PLOT)
        yield _line(left, y, right, y, color, 2)
        for end, cut, way in ((ends[0], left, 1), (ends[1], right, -1)):
            if end == cut:
                yield _line(cut, y - 4, cut, y + 4, color, 2)
            else:
                points = f"{cut:.1f},{y} {cut + 7 * way:.1f},{y - 4} {cut + 7 * way:.1f},{y + 4}"
                yield f'<polygon points="{points}" fill="{color}"/>'
    yield _mark(which, x_of(value.mean), y)


def _mark(which: int, x: float, y: float) -> str:
    if which == 0:
        return f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{_COLORS[0]}"/>'
    return f'<rect x="{x - 4:.1f}" y="{y - 4}" width="8" height="8" fill="{_COLORS[1]}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: int = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(text)}</text>'
