"""Bars as SVG: groups of them, each with its range and its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_COLORS = ("#1f6fb2", "#c2570c", "#8a8a84")  # told apart by those who see no red or green
_WIDTH, _LEFT, _PLOT, _TOP, _BAR, _GAP = 860, 190, 470, 64, 20, 14


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: beside it.
        value, low, high: median and range.
        text: what is written at its end.
        color: index of its kind.
    """

    label: str
    value: float
    low: float
    high: float
    text: str
    color: int


def bars(title: str, axis: str, groups: Sequence[Sequence[Bar]]) -> str:
    """An SVG with a bar per row, whiskers from lowest to highest, groups apart.

    It brings its own light ground, so that it reads the same on a dark page.
    """
    every = [bar for group in groups for bar in group]
    scale = _PLOT / (1.05 * max((bar.high for bar in every), default=1.0))
    height = _TOP + _BAR * len(every) + _GAP * len(groups) + 40
    spoken = "; ".join(f"{bar.label} {bar.text}" for bar in every)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222222">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(f'{title}, {axis}: {spoken}.')}</desc>",
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#fbfbf9"/>',
        f'<text x="20" y="28" font-size="17" font-weight="bold">{escape(title)}</text>',
        f'<text x="20" y="48" fill="#555555">{escape(axis)}</text>',
    ]
    y = float(_TOP)
    for group in groups:
        for bar in group:
            middle, color = y + _BAR / 2, _COLORS[bar.color % len(_COLORS)]
            end = _LEFT + scale * bar.value
            parts += [
                f'<text x="{_LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end">'
                f"{escape(bar.label)}</text>",
                f'<rect x="{_LEFT}" y="{y + 3:.1f}" width="{end - _LEFT:.1f}" '
                f'height="{_BAR - 6}" fill="{color}"/>',
                f'<line x1="{_LEFT + scale * bar.low:.1f}" y1="{middle:.1f}" '
                f'x2="{_LEFT + scale * bar.high:.1f}" y2="{middle:.1f}" stroke="#222222"/>',
                f'<text x="{_LEFT + scale * bar.high + 8:.1f}" y="{middle + 4:.1f}">'
                f"{escape(bar.text)}</text>",
            ]
            y += _BAR
        y += _GAP
    return "\n".join([*parts, "</svg>"]) + "\n"
