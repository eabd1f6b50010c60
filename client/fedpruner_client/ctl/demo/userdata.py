"""The user's own files as private and held-out parts for the demo's devices."""

import random
from pathlib import Path

from fedpruner_common.errors import DataError

_HELD_OUT_EVERY = 5
_PARAGRAPHS_PER_DOCUMENT = 20


def split_user_data(
    files: tuple[Path, ...], folder: Path, *, num_parts: int
) -> list[tuple[Path, Path]]:
    """(training file, held-out file) per device.

    Several files are one device each. One file is dealt out in unequal parts, in its own order, so
    that whatever structure it has becomes a difference between the devices.

    Raises:
        DataError: a file cannot be read or has too few rows.
    """
    if len(files) > 1:
        return [_write(path.stem, *_split(_rows(path), path), path, folder) for path in files]
    (path,) = files
    rows = _rows(path)
    total = num_parts * (num_parts + 1) // 2
    pairs, start = [], 0
    for part in range(num_parts):
        end = len(rows) * (part + 1) * (part + 2) // 2 // total
        train, held_out = _split(rows[start:end], path)
        pairs.append(_write(f"{path.stem}-{part + 1}", train, held_out, path, folder))
        start = end
    return pairs[::-1]


def _rows(path: Path) -> list[str]:
    """Lines of a JSONL file, or groups of paragraphs of a text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if path.suffix == ".jsonl":
        return [line for line in text.splitlines() if line.strip()]
    paragraphs = text.split("\n\n")
    step = _PARAGRAPHS_PER_DOCUMENT
    return ["\n\n".join(paragraphs[i : i + step]) for i in range(0, len(paragraphs), step)]


def _split(rows: list[str], path: Path) -> tuple[list[str], list[str]]:
    if len(rows) < _HELD_OUT_EVERY:
        raise DataError(
            f"{path} has too few rows for a training and a held-out part on every device"
        )
    rows = list(rows)
    random.Random(0).shuffle(rows)
    train = [row for index, row in enumerate(rows) if index % _HELD_OUT_EVERY]
    return train, rows[::_HELD_OUT_EVERY]


def _write(
    name: str, train: list[str], held_out: list[str], source: Path, folder: Path
) -> tuple[Path, Path]:
    paths = []
    separator = "\n" if source.suffix == ".jsonl" else "\n\n"
    for part, rows in (("private", train), ("held_out", held_out)):
        path = folder / part / f"{name}{source.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(separator.join(rows) + "\n", encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]
