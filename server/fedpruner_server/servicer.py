"""What agents can call: decode, ask the coordinator, encode."""

import re
import time
from collections.abc import AsyncIterator
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fedpruner_common import convert
from fedpruner_common.adapters import to_peft
from fedpruner_common.chunks import Chunk, FileRange
from fedpruner_common.convert_statistics import statistics_from_pb
from fedpruner_common.errors import InvalidUpdate
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.pb.federation_pb2_grpc import FederationServicer
from fedpruner_common.rpc import HEARTBEATS_PER_LEASE, PULL_WAIT_S
from fedpruner_common.task import ProbeTask, Task
from fedpruner_common.wire import Upload
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.receiving import receive
from fedpruner_server.sending import send_joined, send_ranges
from fedpruner_server.tasks import Claim, Tasks, Waiting
from fedpruner_server.tensorfile import sliced
from fedpruner_server.transfers import Downloads, Pace, UploadSlots, watched

# Becomes a file name and a label in logs and metrics.
_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_BLOBS_PER_CALL = 10_000


class Federation(FederationServicer):
    """The agents' service."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._tasks = Tasks(coordinator)
        self._blocks = coordinator.blocks
        self._options = options = coordinator.settings.transfer
        self._uploads = UploadSlots(options.max_uploads)
        self._downloads = Downloads(
            options.max_downloads, bytes_per_s=options.max_bytes_per_s, idle_s=options.idle_s
        )

    async def Register(self, request: pb.RegisterRequest, _: Any) -> pb.RegisterReply:
        if not _CLIENT_ID.fullmatch(request.client_id):
            raise InvalidUpdate(
                f"client id {request.client_id[:80]!r}: expected 1 to 64 letters, digits, '_.-'"
            )
        device = self._tasks.register(
            request.client_id,
            memory_budget_bytes=request.memory_budget_bytes,
            floor_bytes=request.floor_bytes,
            memory_kind=request.memory_kind,
            read_bytes_per_s=request.read_bytes_per_s,
        )
        lease_s = self._tasks.lease_s
        return pb.RegisterReply(
            session=device.session,
            heartbeat_interval_s=lease_s / HEARTBEATS_PER_LEASE,
            lease_s=lease_s,
            run_id=self._tasks.run_id,
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, _: Any) -> pb.HeartbeatReply:
        device = self._tasks.device(request.client_id, request.session)
        device.does(
            request.activity[:80],
            step=request.step,
            num_steps=request.num_steps,
            now=time.monotonic(),
        )
        device.train_loss = request.train_loss or device.train_loss
        return pb.HeartbeatReply(task_id=self._tasks.still_wanted(device, request.task_id))

    async def PullTask(self, request: pb.PullTaskRequest, _: Any) -> pb.PullTaskReply:
        device = self._tasks.device(request.client_id, request.session)
        answer = await self._tasks.pull(
            device, request.wait_s, memory_budget_bytes=request.memory_budget_bytes
        )
        if isinstance(answer, Task):
            return pb.PullTaskReply(task=convert.task_to_pb(answer))
        if isinstance(answer, ProbeTask):
            return pb.PullTaskReply(probe=convert.probe_to_pb(answer))
        if isinstance(answer, Waiting):
            return pb.PullTaskReply(waiting=answer.reason)
        return pb.PullTaskReply(finished=answer.reason)

    async def FetchBlobs(self, request: pb.FetchBlobsRequest, _: Any) -> AsyncIterator[Chunk]:
        device = self._tasks.device(request.client_id, request.session)
        if len(request.blobs) > _MAX_BLOBS_PER_CALL:
            raise InvalidUpdate(
                f"{len(request.blobs)} blobs in one call, at most {_MAX_BLOBS_PER_CALL}"
            )
        parts = [(self._blocks.locate(blob.hash), blob.offset) for blob in request.blobs]
        return self._downloads.in_turn(
            send_ranges(parts), lambda num_bytes: self._tasks.count_down(device, base=num_bytes)
        )

    async def FetchAdapter(self, request: pb.FetchAdapterRequest, _: Any) -> AsyncIterator[Chunk]:
        device = self._tasks.device(request.client_id, request.session)
        path, shapes = self._tasks.adapter_of(device, request.task_id)
        head, ranges = _part_of_adapter(path, tuple(shapes))
        return self._downloads.in_turn(
            send_joined(head, ranges, offset=request.offset),
            lambda num_bytes: self._tasks.count_down(device, adapter=num_bytes),
        )

    async def OpenUpload(self, request: pb.OpenUploadRequest, _: Any) -> pb.OpenUploadReply:
        header = request.header
        device = self._tasks.device(header.client_id, header.session)
        wait_s = min(PULL_WAIT_S, request.wait_s)
        incoming = await self._tasks.incoming_in_time(device, _claim(header), wait_s)
        if incoming is None:
            return pb.OpenUploadReply(state=pb.OpenUploadReply.STORED)
        if await self._uploads.acquire(device.client_id, wait_s=wait_s):
            return pb.OpenUploadReply(state=pb.OpenUploadReply.GRANTED, offset=incoming.offset())
        reason = f"{self._uploads.num_waiting + 1} devices wait to upload"
        return pb.OpenUploadReply(state=pb.OpenUploadReply.WAIT, reason=reason)

    async def PushUpdate(self, requests: AsyncIterator[Upload], _: Any) -> pb.PushUpdateReply:
        options = self._options
        with watched(options.idle_s) as pulse:
            header = await anext(requests, None)
            if header is None or isinstance(header, Chunk):
                raise InvalidUpdate("an upload begins with its header")
            device = self._tasks.device(header.client_id, header.session)
            claim = _claim(header)
            incoming = self._tasks.incoming(device, claim)
            if incoming is None:
                return pb.PushUpdateReply()  # stored before: the agent did not hear the answer
            async with self._uploads.use(device.client_id):
                count = partial(self._tasks.count_up, device)
                pace = Pace(options.max_bytes_per_s)
                writer = await receive(requests, incoming, pulse, pace, count)
                with closing(writer):
                    await self._tasks.store_update(device, incoming, claim, writer)
        return pb.PushUpdateReply()

    async def PushStatistics(
        self, request: pb.PushStatisticsRequest, _: Any
    ) -> pb.PushStatisticsReply:
        device = self._tasks.device(request.client_id, request.session)
        try:
            statistics = statistics_from_pb(request)
        except ValueError as error:
            raise InvalidUpdate(f"the statistics make no sense: {error}") from error
        self._tasks.store_statistics(device, request.task_id, statistics)
        return pb.PushStatisticsReply()

    async def ReportFailure(
        self, request: pb.ReportFailureRequest, _: Any
    ) -> pb.ReportFailureReply:
        device = self._tasks.device(request.client_id, request.session)
        self._tasks.task_failed(
            device,
            task_id=request.task_id,
            reason=request.reason[:500],
            out_of_memory=request.out_of_memory,
            memory_budget_bytes=request.memory_budget_bytes,
        )
        return pb.ReportFailureReply()


def _claim(header: pb.UpdateHeader) -> Claim:
    return Claim(
        task_id=header.task_id,
        round=header.round,
        num_bytes=header.num_bytes,
        hash=header.hash,
        metrics=convert.metrics_from_header(header),
    )


@lru_cache(maxsize=32)
def _part_of_adapter(path: Path, names: tuple[str, ...]) -> tuple[bytes, tuple[FileRange, ...]]:
    """Some modules of a global adapter, whose file never changes; many devices ask for the same."""
    head, ranges = sliced(path, map(to_peft, names))
    return head, tuple(ranges)
