"""Bytes of a file <-> stream of chunks, each with its offset and checksum.

A chunk is about 1 MiB: throughput is flat from 512 KiB up, memory per stream and the delay of other
calls grow with it, and gRPC's default message limit of 4 MiB stays far.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fedpruner_common.errors import CorruptChunk
from fedpruner_common.pb.federation_pb2 import Chunk

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRange:
    """Some bytes of a file."""

    path: Path
    start: int
    num_bytes: int


def read_chunks(source: FileRange, *, blob: int = 0, offset: int = 0) -> Iterator[Chunk]:
    """The bytes of a range from `offset` on, as chunks.

    Reads with pread: memory stays one chunk, and a file that shrinks is an error instead of a
    SIGBUS.

    Args:
        source: where the bytes are.
        blob: index that the receiver knows them by.
        offset: bytes of the range the receiver has already.

    Raises:
        CorruptChunk: the file ended before the range did.
    """
    with source.path.open("rb", buffering=0) as file:
        while offset < source.num_bytes:
            wanted = min(CHUNK_BYTES, source.num_bytes - offset)
            data = os.pread(file.fileno(), wanted, source.start + offset)
            if not data:
                raise CorruptChunk(
                    f"{source.path.name} ended {source.num_bytes - offset} bytes early"
                )
            yield make_chunk(data, blob=blob, offset=offset)
            offset += len(data)


def make_chunk(data: bytes, *, blob: int, offset: int) -> Chunk:
    return Chunk(blob=blob, offset=offset, data=data, checksum=xxhash.xxh3_64_intdigest(data))


class ChunkWriter:
    """Appends the chunks of one blob to a file; refuses gaps, overruns and damage.

    Attributes:
        received: bytes in the file so far; where a broken stream resumes.
    """

    def __init__(self, path: Path, *, max_bytes: int, resume: bool = False) -> None:
        """Open `path` for at most `max_bytes`; with `resume`, keep what is there."""
        self._file = path.open("ab" if resume else "wb", buffering=0)
        self._max_bytes = max_bytes
        self.received = self._file.tell() if resume else 0

    def write(self, chunk: Chunk) -> None:
        """Append one chunk.

        Raises:
            CorruptChunk: wrong offset, wrong checksum, or more bytes than were promised.
        """
        data = chunk.data
        if chunk.offset != self.received:
            raise CorruptChunk(f"expected the chunk at offset {self.received}, got {chunk.offset}")
        if self.received + len(data) > self._max_bytes:
            raise CorruptChunk(f"more than the promised {self._max_bytes} bytes")
        if xxhash.xxh3_64_intdigest(data) != chunk.checksum:
            raise CorruptChunk(f"checksum of the chunk at offset {chunk.offset} differs")
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self.received += len(data)

    def close(self, *, sync: bool = False) -> None:
        """Close the file; with `sync`, only after its bytes are on disk."""
        if sync:
            os.fsync(self._file.fileno())
        self._file.close()
