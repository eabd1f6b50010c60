"""Uploads go to disk as they arrive: where they broke off they go on, also after a restart."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from fedpruner_common.chunks import Chunk, ChunkWriter
from fedpruner_common.errors import CorruptChunk, InvalidUpdate
from fedpruner_common.wire import Upload
from fedpruner_server.transfers import Pace, Pulse

_SMALL_BYTES = 64 << 10  # is written faster than handed to a thread


@dataclass(frozen=True)
class Incoming:
    """An update on its way.

    Attributes:
        path: what of it has arrived.
        num_bytes: of the whole.
        hash: BLAKE3 of the whole, hex.
    """

    path: Path
    num_bytes: int
    hash: str

    def offset(self) -> int:
        """Bytes that need not travel again."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return size if size <= self.num_bytes else 0


async def receive(
    messages: AsyncIterator[Upload],
    incoming: Incoming,
    pulse: Pulse,
    pace: Pace,
    on_bytes: Callable[[int], None],
) -> ChunkWriter:
    """Write the promised bytes of an upload to its file, not one more.

    A large chunk is written in a thread while the next one arrives, so a slow disk holds up nobody.

    Returns:
        The writer, for `complete`.

    Raises:
        CorruptChunk: a chunk is damaged, or there are more than were promised.
        InvalidUpdate: it ended early, or a message is no chunk.
        StorageError: the disk is full.
    """
    if incoming.offset():  # what is there has to be hashed
        writer = await asyncio.to_thread(_open, incoming, resume=True)
    else:
        writer = _open(incoming, resume=False)
    writing: asyncio.Future[None] | None = None
    promised = writer.received
    try:
        async for chunk in messages:
            if not isinstance(chunk, Chunk):
                raise InvalidUpdate("an upload with a second header")
            pulse.beat()
            on_bytes(len(chunk.data))
            promised += len(chunk.data)
            if promised > incoming.num_bytes:
                raise CorruptChunk(f"more than the promised {incoming.num_bytes} bytes")
            if writing is not None:
                await writing
                writing = None
            if len(chunk.data) <= _SMALL_BYTES:
                writer.write(chunk)
            else:
                writing = asyncio.ensure_future(asyncio.to_thread(writer.write, chunk))
            await pace.moved(len(chunk.data))
        if writing is not None:
            await writing
        if writer.received < incoming.num_bytes:
            raise InvalidUpdate("the update ended before all its promised bytes")
        return writer
    except BaseException:
        if writing is not None and not writing.done():
            await asyncio.wait({writing})
        writer.close()
        raise


def _open(incoming: Incoming, *, resume: bool) -> ChunkWriter:
    return ChunkWriter(incoming.path, max_bytes=incoming.num_bytes, resume=resume)


def complete(writer: ChunkWriter, incoming: Incoming) -> None:
    """Bring an upload whose bytes have all arrived to disk, and look whether it is what it should.

    Raises:
        CorruptChunk: it is not; then nothing of it is kept.
        StorageError: the disk is full.
    """
    writer.close(sync=True)
    if writer.hexdigest() != incoming.hash:
        incoming.path.unlink(missing_ok=True)
        raise CorruptChunk("the update arrived with other content than its hash promised")
