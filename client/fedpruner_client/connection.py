"""The coordinator as the agent sees it: calls that retry and resume, and our own exceptions."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from fedpruner_client.cache import Cache
from fedpruner_client.config import AgentSettings
from fedpruner_common import convert, rpc
from fedpruner_common.chunks import ChunkWriter, FileRange, read_chunks
from fedpruner_common.errors import (
    Busy,
    CorruptChunk,
    FedPrunerError,
    Unauthenticated,
    Unavailable,
    UnknownClient,
)
from fedpruner_common.log import get_logger
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.pb.federation_pb2_grpc import FederationStub
from fedpruner_common.statistics import Statistics
from fedpruner_common.status import error_of
from fedpruner_common.task import ProbeTask, Task, UpdateMetrics

T = TypeVar("T")

_MAX_CORRUPT = 3


@dataclass(frozen=True)
class Offer:
    """What a device brings.

    Attributes:
        memory_budget_bytes: its training process may use this much.
        floor_bytes: of which it needs this before any model.
        memory_kind: `rss`, `cuda` or `unified`.
        read_bytes_per_s: how fast it brings in layers that are not in memory; 0 where unknown.
    """

    memory_budget_bytes: int
    floor_bytes: int
    memory_kind: str
    read_bytes_per_s: int = 0


@dataclass(frozen=True)
class Waiting:
    reason: str


@dataclass(frozen=True)
class Finished:
    reason: str


class Connection:
    """One agent's connection; safe to use from its heartbeat thread too."""

    def __init__(self, settings: AgentSettings, offer: Offer) -> None:
        """Prepare to connect; the first call opens the channel."""
        self._settings = settings
        self._client_id = settings.client_id
        self.offer = offer
        channel = rpc.open_channel(
            settings.server,
            root_certificates=settings.root_certificates,
            insecure=settings.insecure,
        )
        self._channel = channel
        self._stub = FederationStub(channel)
        self._session = ""
        self.heartbeat_interval_s = 1.0  # until the coordinator says
        self._registering = threading.RLock()  # joining retries, and retrying asks for the session
        self._log = get_logger()

    def close(self) -> None:
        self._channel.close()

    def register(self, *, instead_of: str | None = None) -> str:
        """Join, or join again, and return the session.

        Args:
            instead_of: the session that was refused; if another thread has renewed it meanwhile,
                nothing happens.
        """
        with self._registering:
            if instead_of is not None and instead_of != self._session:
                return self._session
            request = pb.RegisterRequest(
                client_id=self._client_id,
                memory_budget_bytes=self.offer.memory_budget_bytes,
                floor_bytes=self.offer.floor_bytes,
                memory_kind=self.offer.memory_kind,
                read_bytes_per_s=self.offer.read_bytes_per_s,
            )
            reply = self._retry(
                lambda: self._stub.Register(request, timeout=rpc.UNARY_TIMEOUT_S), "join"
            )
            self._session = reply.session
            self.heartbeat_interval_s = reply.heartbeat_interval_s
            return self._session

    @property
    def session(self) -> str:
        return self._session

    def heartbeat(
        self, *, task_id: str, activity: str, step: int, num_steps: int, train_loss: float
    ) -> str:
        """Tell that this device lives; returns the task if it is still wanted. Does not retry."""
        request = pb.HeartbeatRequest(
            client_id=self._client_id,
            session=self._session,
            activity=activity,
            step=step,
            num_steps=num_steps,
            train_loss=train_loss,
            task_id=task_id,
        )
        try:
            reply = self._stub.Heartbeat(request, timeout=rpc.UNARY_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_of(error) from error
        task: str = reply.task_id
        return task

    def pull(self, *, wait_s: float) -> Task | ProbeTask | Waiting | Finished:
        """The next task, or why there was none for so long."""

        def call() -> pb.PullTaskReply:
            request = pb.PullTaskRequest(
                client_id=self._client_id,
                session=self._session,
                wait_s=wait_s,
                memory_budget_bytes=self.offer.memory_budget_bytes,
            )
            return self._stub.PullTask(request, timeout=wait_s + rpc.UNARY_TIMEOUT_S)

        reply = self._retry(call, "ask for a task")
        kind = reply.WhichOneof("reply")
        if kind == "task":
            return convert.task_from_pb(reply.task)
        if kind == "probe":
            return convert.probe_from_pb(reply.probe)
        return Finished(reply.finished) if kind == "finished" else Waiting(reply.waiting)

    def fetch(self, blobs: dict[str, int], cache: Cache) -> int:
        """Bring into the cache what it lacks of some blobs (hash -> bytes); returns bytes received.

        Raises:
            CorruptChunk: the same blob arrived damaged several times.
            StorageError: the cache is too small.
        """
        missing = cache.missing(blobs)
        cache.make_room(sum(blobs[h] - have for h, have in missing.items()), keep=blobs)
        received = 0
        corrupt = 0

        def attempt() -> bool:
            nonlocal received, corrupt
            ranges = cache.missing(blobs)
            if not ranges:
                return True
            try:
                for num_bytes in self._fetch_once(ranges, blobs, cache):
                    received += num_bytes
            except CorruptChunk as error:
                corrupt += 1
                if corrupt >= _MAX_CORRUPT:
                    raise
                self._log.warning("fetching again", reason=str(error))
            return not cache.missing(blobs)

        while not self._retry(attempt, "fetch tensors"):
            pass
        return received

    def _fetch_once(
        self, ranges: dict[str, int], blobs: dict[str, int], cache: Cache
    ) -> Iterator[int]:
        """One stream for all missing blobs, each from where it broke off."""
        hashes = list(ranges)
        for content_hash in [h for h in hashes if ranges[h] == blobs[h]]:
            cache.complete(content_hash)  # all bytes had arrived, nobody had looked at them
            hashes.remove(content_hash)
        request = pb.FetchBlobsRequest(
            client_id=self._client_id,
            session=self._session,
            blobs=[pb.BlobRange(hash=h, offset=ranges[h]) for h in hashes],
        )
        writers: dict[int, ChunkWriter] = {}
        call = self._stub.FetchBlobs(request)
        try:
            for chunk in call:
                if chunk.blob >= len(hashes):
                    raise CorruptChunk(f"a chunk of blob {chunk.blob}, which was not asked for")
                content_hash = hashes[chunk.blob]
                if chunk.blob not in writers:
                    resume = ranges[content_hash] > 0
                    writers[chunk.blob] = cache.writer(
                        content_hash, blobs[content_hash], resume=resume
                    )
                writer = writers[chunk.blob]
                writer.write(chunk)
                yield len(chunk.data)
                if writer.received == blobs[content_hash]:
                    writer.close()
                    cache.complete(content_hash)
        finally:
            call.cancel()
            for writer in writers.values():
                writer.close()

    def fetch_adapter(self, task_id: str, path: Path, *, max_bytes: int) -> int:
        """Write the task's part of the global adapter to `path`; returns its size."""

        def attempt() -> int:
            request = pb.FetchAdapterRequest(
                client_id=self._client_id, session=self._session, task_id=task_id
            )
            writer = ChunkWriter(path, max_bytes=max_bytes)
            try:
                for chunk in self._stub.FetchAdapter(request):
                    writer.write(chunk)
            finally:
                writer.close()
            return writer.received

        return self._retry(attempt, "fetch the adapter")

    def push(self, task: Task, metrics: UpdateMetrics, path: Path) -> None:
        """Upload an update; repeating it does no harm, so a lost answer is no problem."""

        def messages() -> Iterator[pb.PushUpdateRequest]:
            num_bytes = path.stat().st_size
            header = pb.UpdateHeader(
                client_id=self._client_id,
                session=self._session,
                task_id=task.task_id,
                round=task.round,
                num_bytes=num_bytes,
            )
            convert.metrics_to_header(header, metrics)
            yield pb.PushUpdateRequest(header=header)
            for chunk in read_chunks(FileRange(path, 0, num_bytes)):
                yield pb.PushUpdateRequest(chunk=chunk)

        self._retry(lambda: self._stub.PushUpdate(messages()), "upload the update")

    def push_statistics(self, task_id: str, statistics: Statistics) -> None:
        """Tell the coordinator about the layers."""
        # With numpy, which an agent that is never asked does without.
        from fedpruner_common.convert_statistics import statistics_to_pb

        def call() -> None:
            request = pb.PushStatisticsRequest(
                client_id=self._client_id, session=self._session, task_id=task_id
            )
            statistics_to_pb(statistics, request)
            self._stub.PushStatistics(request, timeout=rpc.UNARY_TIMEOUT_S)

        self._retry(call, "send the statistics")

    def report_failure(self, task_id: str, reason: str, *, out_of_memory: bool = False) -> None:
        """Tell the coordinator not to wait for this task. Does not retry.

        Args:
            task_id: of the task.
            reason: for people.
            out_of_memory: a smaller one may do.
        """
        request = pb.ReportFailureRequest(
            client_id=self._client_id,
            session=self._session,
            task_id=task_id,
            reason=reason,
            out_of_memory=out_of_memory,
            memory_budget_bytes=self.offer.memory_budget_bytes,
        )
        try:
            self._stub.ReportFailure(request, timeout=rpc.UNARY_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def _renewed_since(self, session: str) -> bool:
        """Whether our own agent has another session by now; waits while it is joining."""
        with self._registering:
            return session != self._session

    def _retry(self, call: Callable[[], T], what: str) -> T:
        """Call until the coordinator answers: pauses double up to the limit, with jitter."""
        failures = 0
        while True:
            session = self._session
            try:
                return call()
            except grpc.RpcError as rpc_error:
                error: FedPrunerError = error_of(rpc_error)
            if isinstance(error, UnknownClient) and session:  # the coordinator was restarted
                self.register(instead_of=session)
                continue
            if isinstance(error, Unauthenticated) and self._renewed_since(session):
                continue  # our other thread joined again while this call was under way
            if not isinstance(error, (Unavailable, Busy)):
                raise error
            failures += 1
            limit = self._settings.max_retries
            if limit is not None and failures > limit:
                server = self._settings.server
                raise Unavailable(f"cannot {what}: {server} failed {failures} times: {error}")
            pause = min(self._settings.max_wait_time, 0.5 * 2 ** min(failures, 16))
            pause *= random.uniform(0.5, 1.0)
            if failures == 1 or pause > 5:
                self._log.warning(
                    f"cannot {what}, trying again", server=self._settings.server, reason=str(error)
                )
            time.sleep(pause)
