"""What agents can call: decode, ask the coordinator, encode."""

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fedpruner_common import convert
from fedpruner_common.adapters import to_peft
from fedpruner_common.chunks import ChunkWriter, read_chunks
from fedpruner_common.convert_statistics import statistics_from_pb
from fedpruner_common.errors import CorruptChunk, InvalidUpdate
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.pb.federation_pb2_grpc import FederationServicer
from fedpruner_common.rpc import HEARTBEATS_PER_LEASE, STREAM_IDLE_S
from fedpruner_common.task import ProbeTask, Task
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.core.validation import max_update_bytes
from fedpruner_server.tasks import Tasks, Waiting
from fedpruner_server.tensorfile import slice_chunks

# Becomes a file name and a label in logs and metrics.
_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_BLOBS_PER_CALL = 10_000


class Federation(FederationServicer):
    """The agents' service."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._tasks = Tasks(coordinator)
        self._blocks = coordinator.blocks
        self._storage = coordinator.storage

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
        interval_s = self._tasks.lease_s / HEARTBEATS_PER_LEASE
        return pb.RegisterReply(session=device.session, heartbeat_interval_s=interval_s)

    async def Heartbeat(self, request: pb.HeartbeatRequest, _: Any) -> pb.HeartbeatReply:
        device = self._tasks.device(request.client_id, request.session)
        device.activity = request.activity[:80]
        device.step, device.num_steps = request.step, request.num_steps
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

    async def FetchBlobs(self, request: pb.FetchBlobsRequest, _: Any) -> AsyncIterator[pb.Chunk]:
        device = self._tasks.device(request.client_id, request.session)
        if len(request.blobs) > _MAX_BLOBS_PER_CALL:
            raise InvalidUpdate(
                f"{len(request.blobs)} blobs in one call, at most {_MAX_BLOBS_PER_CALL}"
            )
        for index, blob in enumerate(request.blobs):
            for chunk in read_chunks(
                self._blocks.locate(blob.hash), blob=index, offset=blob.offset
            ):
                self._tasks.count_down(device, base=len(chunk.data))
                yield chunk

    async def FetchAdapter(
        self, request: pb.FetchAdapterRequest, _: Any
    ) -> AsyncIterator[pb.Chunk]:
        device = self._tasks.device(request.client_id, request.session)
        path, shapes = self._tasks.adapter_of(device, request.task_id)
        for chunk in slice_chunks(path, map(to_peft, shapes)):
            self._tasks.count_down(device, adapter=len(chunk.data))
            yield chunk

    async def PushUpdate(
        self, requests: AsyncIterator[pb.PushUpdateRequest], _: Any
    ) -> pb.PushUpdateReply:
        header = (await _next_message(requests)).header
        device = self._tasks.device(header.client_id, header.session)
        if not self._tasks.check_update(device, task_id=header.task_id, round_number=header.round):
            return pb.PushUpdateReply()  # stored before: the agent did not hear the answer
        shapes = self._tasks.update_shapes(device, header.task_id)
        limit = max_update_bytes(shapes)
        if header.num_bytes > limit:
            raise InvalidUpdate(
                f"an update of {header.num_bytes} bytes, at most {limit} for this task"
            )
        folder = self._storage.update_path(header.round, device.client_id).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as temporary:
            received = Path(temporary) / "update"
            await _receive(requests, received, num_bytes=header.num_bytes)
            metrics = convert.metrics_from_header(header)
            await self._tasks.store_update(
                device, received, task_id=header.task_id, metrics=metrics
            )
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


async def _next_message(requests: AsyncIterator[pb.PushUpdateRequest]) -> pb.PushUpdateRequest:
    """The next message of an upload.

    Raises:
        InvalidUpdate: the stream ended or stalled.
    """
    try:
        return await asyncio.wait_for(anext(requests), STREAM_IDLE_S)
    except StopAsyncIteration:
        raise InvalidUpdate("the update ended before all its promised bytes") from None
    except asyncio.TimeoutError:
        raise InvalidUpdate(f"no message for {STREAM_IDLE_S:.0f} s") from None


async def _receive(
    requests: AsyncIterator[pb.PushUpdateRequest], path: Path, *, num_bytes: int
) -> None:
    """Write the promised bytes of an upload to disk, not one more."""
    writer = ChunkWriter(path, max_bytes=num_bytes)
    try:
        while writer.received < num_bytes:
            writer.write((await _next_message(requests)).chunk)
        try:
            await asyncio.wait_for(anext(requests), STREAM_IDLE_S)
            raise CorruptChunk(f"more than the promised {num_bytes} bytes")
        except StopAsyncIteration:
            pass
    finally:
        await asyncio.to_thread(writer.close, sync=True)
