"""What an agent moves: tensors down, updates up. Every transfer goes on where it broke off."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fedpruner_client.cache import Cache
from fedpruner_client.connection import Connection
from fedpruner_client.outbox import FinishedUpdate
from fedpruner_common import convert, rpc
from fedpruner_common.chunks import Chunk, ChunkWriter, FileRange, read_chunks
from fedpruner_common.errors import CorruptChunk
from fedpruner_common.log import get_logger
from fedpruner_common.pb import federation_pb2 as pb

T = TypeVar("T")

_MAX_CORRUPT = 3
_STUCK_S = 10.0  # a stream that was cancelled ends at once


class Transfers:
    """The transfers of one agent, one at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._log = get_logger()
        self._watching = threading.Lock()
        self._call: Any = None  # the stream under way
        self._moved_at = 0.0
        self._cancelled_at: float | None = None

    def fetch(self, blobs: dict[str, int], cache: Cache) -> int:
        """Bring into the cache what it lacks of some blobs (hash -> bytes); returns bytes received.

        Raises:
            CorruptChunk: a blob arrived damaged several times.
            StorageError: the cache or the disk is too small.
        """
        missing = cache.missing(blobs)
        cache.make_room(sum(blobs[h] - have for h, have in missing.items()), keep=blobs)
        received = 0

        def attempt() -> None:
            nonlocal received
            while ranges := cache.missing(blobs):
                before = received
                for num_bytes in self._fetch_once(ranges, blobs, cache):
                    received += num_bytes
                if received == before and cache.missing(blobs) == ranges:
                    raise CorruptChunk("the coordinator sent nothing of what is missing")

        self._repeat(attempt, "fetch tensors")
        return received

    def _fetch_once(
        self, ranges: dict[str, int], blobs: dict[str, int], cache: Cache
    ) -> Iterator[int]:
        """One stream for all missing blobs, each from where it broke off."""
        writer: ChunkWriter | None = None
        hashes = [h for h in ranges if ranges[h] < blobs[h]]
        for content_hash in ranges.keys() - set(hashes):  # its bytes are here, nobody looked yet
            there = cache.writer(content_hash, blobs[content_hash], resume=True)
            cache.complete(content_hash, there)
        if not hashes:
            return
        connection = self._connection
        request = pb.FetchBlobsRequest(
            client_id=connection.client_id,
            session=connection.session,
            blobs=[pb.BlobRange(hash=h, offset=ranges[h]) for h in hashes],
        )
        current = -1
        try:
            for chunk in self._watched(connection.stub.FetchBlobs(request)):
                if chunk.blob >= len(hashes):
                    raise CorruptChunk(f"a chunk of blob {chunk.blob}, which was not asked for")
                content_hash = hashes[chunk.blob]
                if chunk.blob != current or writer is None:  # blobs come one after the other
                    if writer is not None:
                        writer.close()
                    current = chunk.blob
                    resume = chunk.offset > 0
                    writer = cache.writer(content_hash, blobs[content_hash], resume=resume)
                writer.write(chunk)
                if writer.received == blobs[content_hash]:
                    cache.complete(content_hash, writer)
                yield len(chunk.data)
        finally:
            if writer is not None:
                writer.close()

    def fetch_adapter(self, task_id: str, path: Path, *, max_bytes: int) -> int:
        """Write the task's part of the global adapter to `path`; returns its size.

        Raises:
            CorruptChunk: it arrived damaged several times.
        """
        connection = self._connection
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)  # another task's, or of an adapter that is old by now

        def attempt() -> int:
            writer = ChunkWriter(partial, max_bytes=max_bytes, resume=True)
            request = pb.FetchAdapterRequest(
                client_id=connection.client_id,
                session=connection.session,
                task_id=task_id,
                offset=writer.received,
            )
            try:
                for chunk in self._watched(connection.stub.FetchAdapter(request)):
                    writer.write(chunk)
            finally:
                writer.close()
            partial.replace(path)
            return writer.received

        return self._repeat(attempt, "fetch the adapter", or_else=partial.unlink)

    def push(self, update: FinishedUpdate) -> None:
        """Upload an update; repeating it does no harm, so a lost answer is no problem.

        Raises:
            StaleRound: nobody waits for it any more.
            InvalidUpdate: the coordinator refuses it.
        """
        self._repeat(lambda: self._push_once(update), "upload the update")

    def _push_once(self, update: FinishedUpdate) -> None:
        connection = self._connection
        num_bytes = update.path.stat().st_size
        header = pb.UpdateHeader(
            client_id=connection.client_id,
            session=connection.session,
            task_id=update.task_id,
            round=update.round,
            num_bytes=num_bytes,
            hash=update.hash,
        )
        convert.metrics_to_header(header, update.metrics)
        request = pb.OpenUploadRequest(header=header, wait_s=rpc.PULL_WAIT_S)
        while True:
            timeout = rpc.PULL_WAIT_S + rpc.UNARY_TIMEOUT_S
            reply = connection.stub.OpenUpload(request, timeout=timeout)
            if reply.state == pb.OpenUploadReply.STORED:
                return
            if reply.state == pb.OpenUploadReply.GRANTED:
                break
            self._log.debug("waiting to upload", reason=reply.reason)

        def messages() -> Iterator[pb.UpdateHeader | Chunk]:
            yield header
            for chunk in read_chunks(FileRange(update.path, 0, num_bytes), offset=reply.offset):
                self._note()
                yield chunk

        call = connection.stub.PushUpdate.future(messages())
        self._watch(call)
        try:
            call.result()
        finally:
            self._watch(None)

    def cancel_stalled(self, idle_s: float) -> bool:
        """End the stream under way if nothing has moved for so long; for the heartbeat's thread.

        The transfer goes on from there over another stream.

        Returns:
            Whether it has been ended for long, and whoever waits for it still waits.
        """
        with self._watching:
            now = time.monotonic()
            if self._call is None:
                return False
            if self._cancelled_at is None and now - self._moved_at > idle_s:
                self._log.warning("the transfer has stalled: trying again", for_s=round(idle_s))
                self._call.cancel()
                self._cancelled_at = now
            return self._cancelled_at is not None and now - self._cancelled_at > _STUCK_S

    def _watch(self, call: Any) -> None:
        with self._watching:
            self._call, self._moved_at = call, time.monotonic()
            self._cancelled_at = None

    def _note(self) -> None:
        self._moved_at = time.monotonic()

    def _watched(self, call: Any) -> Iterator[Chunk]:
        """The chunks of a stream, while the heartbeat's thread looks whether it still moves."""
        self._watch(call)
        try:
            for chunk in call:
                self._note()
                if chunk.data:  # an empty one says only that the coordinator is busy
                    yield chunk
        finally:
            self._watch(None)
            call.cancel()

    def _repeat(
        self, call: Callable[[], T], what: str, *, or_else: Callable[[], None] | None = None
    ) -> T:
        """Retry a transfer also when it arrived damaged, a few times.

        Args:
            call: the transfer.
            what: it does, for people.
            or_else: before a damaged one begins anew.
        """
        damaged = 0
        while True:
            try:
                return self._connection.retry(call, what)
            except CorruptChunk as error:
                damaged += 1
                if damaged == _MAX_CORRUPT:
                    raise
                self._log.warning(f"cannot {what}, trying again", reason=str(error))
                if or_else is not None:
                    or_else()
