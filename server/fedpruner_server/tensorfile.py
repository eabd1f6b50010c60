"""safetensors files as byte ranges: what is in one, and some of it as a file of its own.

Format: 8 bytes little-endian header length, JSON header (name -> dtype, shape, data_offsets), data.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpruner_common.chunks import CHUNK_BYTES, FileRange, make_chunk
from fedpruner_common.errors import ModelError
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.pb.federation_pb2 import Chunk

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


def slice_chunks(path: Path, names: Iterable[str]) -> Iterator[Chunk]:
    """Some tensors of a safetensors file as the chunks of a smaller one.

    Holds one chunk at a time. Names that follow each other in the file are best given together.

    Raises:
        ModelError: the file is broken or ended while it was read.
        KeyError: it has no such tensor.
    """
    located = read_header(path)
    wanted = sorted((located[name] for name in names), key=lambda tensor: tensor.place.start)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in wanted:
        info = tensor.info
        offsets = [end, end := end + info.num_bytes]
        header[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces = _pieces(path, struct.pack("<Q", len(text)) + text, [tensor.place for tensor in wanted])
    offset = 0
    for data in _rechunked(pieces):
        yield make_chunk(data, blob=0, offset=offset)
        offset += len(data)


def _pieces(path: Path, head: bytes, ranges: list[FileRange]) -> Iterator[bytes]:
    yield head
    with path.open("rb", buffering=0) as file:
        for place in ranges:
            position, end = place.start, place.start + place.num_bytes
            while position < end:
                data = os.pread(file.fileno(), min(CHUNK_BYTES, end - position), position)
                if not data:
                    raise ModelError(f"{path.name} ended while it was read")
                yield data
                position += len(data)


def _rechunked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of CHUNK_BYTES, the last one shorter."""
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= CHUNK_BYTES:
            yield bytes(buffer[:CHUNK_BYTES])
            del buffer[:CHUNK_BYTES]
    if buffer:
        yield bytes(buffer)
