"""Byte counts as people write and read them."""

import re

_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes of "6GiB", "512 MB", "1.5g" or a plain number; K, M, G, T are powers of 1024.

    Raises:
        ValueError: not a size.
    """
    match = _PATTERN.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is not a size; write for example 6GiB, 512MiB or a byte count")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def format_bytes(num_bytes: float) -> str:
    """Three significant digits and a binary unit: 1.37 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(num_bytes) >= 999.5 and len(units) > 1:
        num_bytes /= 1024
        del units[0]
    return f"{num_bytes:.0f} B" if units[0] == "B" else f"{num_bytes:.3g} {units[0]}"
