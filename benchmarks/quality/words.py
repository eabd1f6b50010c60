"""Numbers and names as the page of results writes them."""

import math
from collections.abc import Iterable, Sequence

from benchmarks.quality.statistics import Interval

# Columns of words.
_WORDS = (
    "method",
    "change",
    "tried (rate: loss)",
    "remark",
    "the default is",
    "the change",
    "size",
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right; a blank line ends it."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join("---" if name in _WORDS else "--:" for name in header) + "|")
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(value: float, form: str) -> str:
    """A number in a format; words for one that is not finite."""
    return format(value, form).replace("-", "−") if math.isfinite(value) else "diverged"


def spread(interval: Interval, form: str) -> str:
    """`mean [low, high]`; a dash for no value, no brackets for one."""
    if interval.num == 0:
        return "–"
    if math.isnan(interval.low):
        return f"{number(interval.mean, form)} [–]"
    low, high = number(interval.low, form), number(interval.high, form)
    return f"{number(interval.mean, form)} [{low}, {high}]"


def p_text(p: float | None) -> str:
    return "–" if p is None else f"{p:.3g}"


def names(methods: Iterable[str]) -> str:
    """`a`, `b`; or: none."""
    return ", ".join(f"`{name}`" for name in methods) or "none"


def counted(num: int, noun: str) -> str:
    return f"{num} {noun}" + ("" if num == 1 else "s")


def range_text(values: Iterable[int]) -> str:
    """`3 to 6`, or `6` where all are the same."""
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
