"""Bytes of a file <-> stream of chunks, each with its offset and checksum.

A chunk is about 1 MiB: throughput is flat from 512 KiB up, memory per stream and the delay of other
calls grow with it, and gRPC's default message limit of 4 MiB stays far. `wire` puts chunks on the
wire.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash
from blake3 import blake3

from fedpruner_common.errors import CorruptChunk, StorageError

CHUNK_BYTES = 1 << 20

Data = bytes | memoryview


@dataclass(frozen=True)
class FileRange:
    """Some bytes of a file."""

    path: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Chunk:
    """Some bytes of a blob on their way.

    Attributes:
        blob: index that the receiver knows the blob by.
        offset: of the bytes in the blob.
        data: the bytes; may be a view of a buffer that is used again for the next chunk.
        checksum: XXH3-64 of the bytes.
    """

    blob: int
    offset: int
    data: Data
    checksum: int


def make_chunk(data: Data, *, blob: int, offset: int) -> Chunk:
    return Chunk(blob, offset, data, xxhash.xxh3_64_intdigest(data))


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
                raise ended_early(source, offset)
            yield make_chunk(data, blob=blob, offset=offset)
            offset += len(data)


def ended_early(source: FileRange, offset: int) -> CorruptChunk:
    """The error of a file that is shorter than its range."""
    return CorruptChunk(f"{source.path.name} ended {source.num_bytes - offset} bytes early")


def hash_file(path: Path) -> str:
    """BLAKE3 of a file's bytes, hex."""
    digest = blake3()
    with path.open("rb", buffering=0) as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


class ChunkWriter:
    """Appends the chunks of one blob to a file; refuses gaps, overruns and damage.

    Attributes:
        received: bytes in the file so far; where a broken stream resumes.
    """

    def __init__(self, path: Path, *, max_bytes: int, resume: bool = False) -> None:
        """Open `path` for at most `max_bytes`; with `resume`, keep what is there.

        Raises:
            StorageError: the disk is full, read-only or gone.
        """
        self._path = path
        self._max_bytes = max_bytes
        self._digest = blake3()
        self.received = 0
        try:
            self._file = path.open("r+b" if resume and path.exists() else "w+b", buffering=0)
            if resume:
                while data := self._file.read(CHUNK_BYTES):
                    self._digest.update(data)
                    self.received += len(data)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, chunk: Chunk) -> None:
        """Append one chunk.

        Raises:
            CorruptChunk: wrong offset, wrong checksum, or more bytes than were promised.
            StorageError: the disk is full, read-only or gone.
        """
        data = chunk.data
        if chunk.offset != self.received:
            raise CorruptChunk(f"expected the chunk at offset {self.received}, got {chunk.offset}")
        if self.received + len(data) > self._max_bytes:
            raise CorruptChunk(f"more than the promised {self._max_bytes} bytes")
        if xxhash.xxh3_64_intdigest(data) != chunk.checksum:
            raise CorruptChunk(f"checksum of the chunk at offset {chunk.offset} differs")
        self._digest.update(data)
        view = memoryview(data)
        try:
            while view:
                written = self._file.write(view)
                view = view[written:]
        except OSError as error:
            # Nothing half: what is in the file is what was counted.
            os.ftruncate(self._file.fileno(), self.received)
            raise _cannot_write(self._path, error) from error
        self.received += len(data)

    def hexdigest(self) -> str:
        """BLAKE3 of all bytes in the file, hex."""
        return self._digest.hexdigest()

    def close(self, *, sync: bool = False) -> None:
        """Close the file; with `sync`, only after its bytes are on disk.

        Raises:
            StorageError: they cannot be brought there.
        """
        try:
            if sync and not self._file.closed:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        finally:
            self._file.close()


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}")
