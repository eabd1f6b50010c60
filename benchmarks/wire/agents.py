"""The agents' side: the product's own transfers, and many simple agents where many are needed.

Run as `python -m benchmarks.wire.agents`; `sides` speaks to it. Single transfers go through the
product's `Connection`, `Transfers` and `Cache`. Where there are many agents they are coroutines of
one process, each with a connection of its own, the product's options and its codec: what they ask
of a coordinator is the same, but they keep nothing.
"""

# ruff: noqa: E402
from fedpruner_common import malloc

malloc.set_for_wire()  # before gRPC allocates anything

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3
from grpc import aio

from benchmarks.wire.sides import serve
from fedpruner_client.cache import Cache
from fedpruner_client.config import AgentSettings
from fedpruner_client.connection import Connection, Offer
from fedpruner_client.outbox import FinishedUpdate
from fedpruner_client.transfers import Transfers
from fedpruner_common import rpc
from fedpruner_common.chunks import CHUNK_BYTES, Chunk, hash_file, make_chunk
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.task import Task, UpdateMetrics
from fedpruner_common.wire import federation_stub

Json = dict[str, Any]
_ROOM = Offer(memory_budget_bytes=64 << 30, floor_bytes=1 << 30, memory_kind="rss")
_METRICS = UpdateMetrics(8, 1024, 2.0, 1.0, 0, 1.0)
_PATIENCE_S = 20.0


# One at a time, as the product does it.

_connections: list[Connection] = []
_tasks: list[Task] = []
_update = Path()


def join(
    address: str, certificates: str | None, folder: str, num_agents: int, name: str = "agent"
) -> Json:
    """Connect this many agents, which are used one after the other."""
    for index in range(len(_connections), num_agents):
        settings = AgentSettings(
            server=address,
            data=[Path(folder)],
            name=f"{name}-{index:03}",
            root_certificates=Path(certificates) if certificates else None,
        )
        connection = Connection(settings, _ROOM)
        connection.register()
        _connections.append(connection)
    return {}


def fetch(blobs: dict[str, int], folder: str) -> Json:
    """Bring blobs into a cache that is empty; the time until all are verified and in place."""
    cache = Cache(Path(folder), limit_bytes=64 << 30)
    begin = time.perf_counter()
    received = Transfers(_connections[0]).fetch(blobs, cache)
    return {"seconds": time.perf_counter() - begin, "bytes": received}


def take_tasks(folder: str) -> Json:
    """Get every agent's task, and one adapter that is to be everyone's update."""
    global _update
    for connection in _connections:
        while not isinstance(task := connection.pull(wait_s=_PATIENCE_S), Task):
            pass
        _tasks.append(task)
    _update = Path(folder) / "update.safetensors"
    transfers = Transfers(_connections[0])
    size = transfers.fetch_adapter(_tasks[0].task_id, _update, max_bytes=4 << 30)
    return {"bytes": size, "path": str(_update)}


def push(agents: list[int]) -> Json:
    """Upload these agents' updates, one after the other."""
    begin = time.perf_counter()
    digest = hash_file(_update)  # as the outbox does when training has ended
    hashed = time.perf_counter()
    for index in agents:
        connection, task = _connections[index], _tasks[index]
        update = FinishedUpdate(
            connection.run_id, task.task_id, task.round, _METRICS, _update, digest
        )
        Transfers(connection).push(update)
    return {"seconds": time.perf_counter() - hashed, "hash_seconds": hashed - begin}


# Many at once.


@dataclass
class _Agent:
    """A coroutine's worth of an agent."""

    client_id: str
    channel: aio.Channel
    stub: Any
    session: str = ""
    task: pb.Task = field(default_factory=pb.Task)
    adapter: bytes = b""

    async def register(self) -> None:
        request = pb.RegisterRequest(
            client_id=self.client_id,
            memory_budget_bytes=_ROOM.memory_budget_bytes,
            floor_bytes=_ROOM.floor_bytes,
            memory_kind=_ROOM.memory_kind,
        )
        self.session = (await self.stub.Register(request)).session

    async def download(self, blobs: dict[str, int], at_most: int) -> int:
        request = pb.FetchBlobsRequest(
            client_id=self.client_id,
            session=self.session,
            blobs=[pb.BlobRange(hash=h, offset=0) for h in blobs],
        )
        call = self.stub.FetchBlobs(request)
        received = 0
        async for chunk in call:
            received += len(chunk.data)
            if received >= at_most:
                call.cancel()
                break
        return received

    async def pull(self) -> bool:
        """Wait for a task; False when the run is over."""
        request = pb.PullTaskRequest(
            client_id=self.client_id, session=self.session, wait_s=_PATIENCE_S
        )
        while True:
            reply = await self.stub.PullTask(request)
            kind = reply.WhichOneof("reply")
            if kind == "task":
                self.task = reply.task
                return True
            if kind == "finished":
                return False

    async def fetch_adapter(self) -> None:
        request = pb.FetchAdapterRequest(
            client_id=self.client_id, session=self.session, task_id=self.task.task_id
        )
        call = self.stub.FetchAdapter(request)
        self.adapter = b"".join([bytes(chunk.data) async for chunk in call])

    async def push(self) -> None:
        """Send the adapter back as it came."""
        header = pb.UpdateHeader(
            client_id=self.client_id,
            session=self.session,
            task_id=self.task.task_id,
            round=self.task.round,
            num_bytes=len(self.adapter),
            hash=blake3(self.adapter).hexdigest(),
            num_examples=_METRICS.num_examples,
            num_tokens=_METRICS.num_tokens,
            train_loss_first=_METRICS.train_loss_first,
            train_loss_last=_METRICS.train_loss_last,
            train_s=_METRICS.train_s,
        )
        while True:
            request = pb.OpenUploadRequest(header=header, wait_s=_PATIENCE_S)
            reply = await self.stub.OpenUpload(request)
            if reply.state == pb.OpenUploadReply.STORED:
                return
            if reply.state == pb.OpenUploadReply.GRANTED:
                break
        await self.stub.PushUpdate(self._messages(header))

    async def _messages(self, header: pb.UpdateHeader) -> AsyncIterator[pb.UpdateHeader | Chunk]:
        yield header
        view = memoryview(self.adapter)
        for offset in range(0, len(view), CHUNK_BYTES):
            yield make_chunk(view[offset : offset + CHUNK_BYTES], blob=0, offset=offset)


_loop = asyncio.new_event_loop()
_crowd: list[_Agent] = []


def gather(address: str, certificates: str | None, num_agents: int) -> Json:
    """Connect a crowd of this many agents, instead of the one before."""

    async def do() -> None:
        for agent in _crowd:
            await agent.channel.close()
        _crowd.clear()
        # Without it gRPC would send all of them over one connection.
        options = [*rpc.channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        for index in range(num_agents):
            if certificates:
                trusted = grpc.ssl_channel_credentials(Path(certificates).read_bytes())
                channel = aio.secure_channel(address, trusted, options=options)
            else:
                channel = aio.insecure_channel(address, options=options)
            stub = federation_stub(channel)
            _crowd.append(_Agent(f"agent-{index:03}", channel, stub))
        await asyncio.gather(*(agent.register() for agent in _crowd))

    _loop.run_until_complete(do())
    return {}


def download(blobs: dict[str, int], at_most: int) -> Json:
    """All of the crowd download at once, each at most so much, and throw it away."""

    async def do() -> int:
        return sum(await asyncio.gather(*(a.download(blobs, at_most) for a in _crowd)))

    begin = time.perf_counter()
    received = _loop.run_until_complete(do())
    return {"seconds": time.perf_counter() - begin, "bytes": received}


def ready() -> Json:
    """All of the crowd have a task and its adapter."""

    async def one(agent: _Agent) -> None:
        await agent.pull()
        await agent.fetch_adapter()

    async def do() -> None:
        await asyncio.gather(*map(one, _crowd))

    _loop.run_until_complete(do())
    return {"bytes": len(_crowd[0].adapter)}


def upload(begin: int, end: int) -> Json:
    """These of the crowd upload at once."""

    async def do() -> None:
        await asyncio.gather(*(agent.push() for agent in _crowd[begin:end]))

    began = time.perf_counter()
    _loop.run_until_complete(do())
    return {"seconds": time.perf_counter() - began}


def rounds() -> Json:
    """Go through rounds until the run is over.

    Returns:
        `begins`: when the first agent had its task of each round; `ends`: when the last one's
        update was taken. Seconds of one clock.
    """
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}

    async def one(agent: _Agent) -> None:
        while await agent.pull():
            number = agent.task.round
            begins.setdefault(number, time.perf_counter())
            await agent.fetch_adapter()
            await agent.push()
            ends[number] = time.perf_counter()

    async def do() -> None:
        await asyncio.gather(*map(one, _crowd))

    _loop.run_until_complete(do())
    return {
        "begins": [begins[number] for number in sorted(begins)],
        "ends": [ends[number] for number in sorted(ends)],
        "bytes": len(_crowd[0].adapter),
    }


if __name__ == "__main__":
    asyncio.set_event_loop(_loop)
    serve(
        {
            "join": join,
            "fetch": fetch,
            "take_tasks": take_tasks,
            "push": push,
            "gather": gather,
            "download": download,
            "ready": ready,
            "upload": upload,
            "rounds": rounds,
        }
    )
