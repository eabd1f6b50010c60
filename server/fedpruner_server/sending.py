"""Reading what is sent, without ever holding up the event loop for a disk.

Bytes that the system has in memory are copied at once; only those that have to come from the disk
are read in a thread. Cold weights on a slow disk then delay nobody's heartbeat.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from fedpruner_common.chunks import CHUNK_BYTES, Chunk, FileRange, ended_early, make_chunk


class Reader:
    """Reads byte ranges of files into one buffer; close it."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        self._path: Path | None = None
        self._fd = -1
        self._opened = ExitStack()
        self._flags = getattr(os, "RWF_NOWAIT", 0)

    def close(self) -> None:
        self._opened.close()
        self._path = None

    async def read(self, path: Path, position: int, num_bytes: int) -> memoryview:
        """At most so many bytes of a file, and at most a chunk; valid until the next call."""
        if path != self._path:
            self.close()
            self._fd = os.open(path, os.O_RDONLY)
            self._opened.callback(os.close, self._fd)
            self._path = path
        view = self._buffer[:num_bytes]
        if self._flags:
            try:
                count = os.preadv(self._fd, [view], position, self._flags)
                if count == len(view):
                    return view
            except BlockingIOError:
                pass  # not in memory
            except OSError:  # this file system does not know the flag
                self._flags = 0
        count = await asyncio.to_thread(os.preadv, self._fd, [view], position)
        return view[:count]


async def send_ranges(parts: Sequence[tuple[FileRange, int]]) -> AsyncGenerator[Chunk, None]:
    """Several ranges as blobs, each from its offset on; a chunk is valid until the next.

    Raises:
        CorruptChunk: a file ended before its range did.
    """
    with closing(Reader()) as reader:
        for blob, (source, offset) in enumerate(parts):
            while offset < source.num_bytes:
                start = source.start + offset
                data = await reader.read(source.path, start, source.num_bytes - offset)
                if not data:
                    raise ended_early(source, offset)
                yield make_chunk(data, blob=blob, offset=offset)
                offset += len(data)


async def send_joined(
    head: bytes, ranges: Iterable[FileRange], *, offset: int
) -> AsyncGenerator[Chunk, None]:
    """Some bytes, then some ranges of files, as one blob from `offset` on, in even chunks.

    Raises:
        CorruptChunk: a file ended before its range did.
    """
    buffer = bytearray()
    position = 0  # of the end of the buffer, counted from the blob's start
    begin = offset

    def take(data: bytes | memoryview) -> None:
        nonlocal position
        skip = max(0, min(len(data), begin - position))
        buffer.extend(data[skip:])
        position += len(data)

    def cut(num_bytes: int) -> Chunk:
        nonlocal offset
        chunk = make_chunk(bytes(buffer[:num_bytes]), blob=0, offset=offset)
        del buffer[:num_bytes]
        offset += num_bytes
        return chunk

    take(head)
    with closing(Reader()) as reader:
        for source in ranges:
            skipped = max(0, min(source.num_bytes, begin - position))
            position += skipped
            while skipped < source.num_bytes:
                start = source.start + skipped
                data = await reader.read(source.path, start, source.num_bytes - skipped)
                if not data:
                    raise ended_early(source, skipped)
                skipped += len(data)
                take(data)
                while len(buffer) >= CHUNK_BYTES:
                    yield cut(CHUNK_BYTES)
    while buffer:
        yield cut(min(CHUNK_BYTES, len(buffer)))
