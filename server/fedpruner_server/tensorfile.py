"""safetensors files as byte ranges: what is in one, and some of it as a file of its own.

Format: 8 bytes little-endian header length, JSON header (name -> dtype, shape, data_offsets), data.
"""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedpruner_common.chunks import FileRange
from fedpruner_common.errors import ModelError
from fedpruner_common.manifest import TensorInfo

_MAX_HEADER_BYTES = 100 << 20  # as in the safetensors library


@dataclass(frozen=True)
class LocatedTensor:
    """A tensor and where its bytes are; the hash is empty until somebody computes it."""

    info: TensorInfo
    place: FileRange


def read_header(path: Path) -> dict[str, LocatedTensor]:
    """The tensors of one safetensors file; reads no data.

    Raises:
        ModelError: not a safetensors file, truncated, or with parts that overlap or leave gaps.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, file_bytes):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        located = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), end - begin, hash="")
            located[name] = LocatedTensor(info, FileRange(path, 8 + length + begin, end - begin))
    except (
        OSError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ModelError(f"{path.name} is not a usable safetensors file: {error}") from error
    position = 8 + length
    for tensor in sorted(located.values(), key=lambda t: (t.place.start, t.place.num_bytes)):
        if tensor.place.start != position:
            raise ModelError(
                f"{path.name}: the data of {tensor.info.name} is not where it should be"
            )
        position += tensor.place.num_bytes
    if position != file_bytes:
        what = "is truncated" if position > file_bytes else "has bytes after its end"
        raise ModelError(f"{path.name} {what}: {file_bytes} bytes, its header promises {position}")
    return located


def sliced(path: Path, names: Iterable[str]) -> tuple[bytes, list[FileRange]]:
    """Some tensors of a safetensors file as a smaller one: its first bytes, then where the rest is.

    Ranges that follow each other in the file are one.

    Raises:
        ModelError: the file is broken.
        KeyError: it has no such tensor.
    """
    located = read_header(path)
    wanted = sorted((located[name] for name in names), key=lambda tensor: tensor.place.start)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ranges: list[FileRange] = []
    end = 0
    for tensor in wanted:
        info, place = tensor.info, tensor.place
        offsets = [end, end := end + info.num_bytes]
        header[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
        if ranges and ranges[-1].start + ranges[-1].num_bytes == place.start:
            last = ranges.pop()
            place = FileRange(path, last.start, last.num_bytes + place.num_bytes)
        ranges.append(place)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, ranges
