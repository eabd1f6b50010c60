"""An agent without a model: it can say anything."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3
from programs import Program

from fedpruner_common import rpc
from fedpruner_common.chunks import CHUNK_BYTES, Chunk, make_chunk
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.status import error_of
from fedpruner_common.wire import federation_stub

GIB = 1 << 30


class FakeAgent:
    """Registered, with room for everything; its calls raise what a real agent's would."""

    def __init__(self, address: str, client_id: str) -> None:
        self.client_id = client_id
        self.channel = grpc.insecure_channel(address, options=rpc.channel_options())
        self.stub = federation_stub(self.channel)
        reply = self.call(
            self.stub.Register,
            pb.RegisterRequest(
                client_id=client_id,
                memory_budget_bytes=4 * GIB,
                floor_bytes=GIB,
                memory_kind="rss",
            ),
        )
        self.session = reply.session

    @staticmethod
    def call(method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=30)
        except grpc.RpcError as error:
            raise error_of(error) from None

    def send(self, header: pb.UpdateHeader, chunks: Iterable[Chunk]) -> None:
        """Upload these chunks, whatever was promised."""
        request = pb.OpenUploadRequest(header=header, wait_s=15)
        reply = self.call(self.stub.OpenUpload, request)
        if reply.state != pb.OpenUploadReply.STORED:
            assert reply.state == pb.OpenUploadReply.GRANTED, reply
            self.call(self.stub.PushUpdate, chain([header], chunks))

    def send_file(self, header: pb.UpdateHeader, data: bytes) -> None:
        """Upload a file; the header's size and hash are filled in where they are not given."""
        header.num_bytes = header.num_bytes or len(data)
        header.hash = header.hash or blake3(data).hexdigest()
        self.send(
            header,
            (
                make_chunk(data[offset : offset + CHUNK_BYTES], blob=0, offset=offset)
                for offset in range(0, len(data), CHUNK_BYTES)
            ),
        )

    def pull(self, kind: str) -> Any:
        """The next answer of this kind; waits through `waiting`."""
        request = pb.PullTaskRequest(client_id=self.client_id, session=self.session, wait_s=15)
        while True:
            reply = self.call(self.stub.PullTask, request)
            found = reply.WhichOneof("reply")
            if found == kind:
                return getattr(reply, kind)
            assert found == "waiting", reply


def start_server(folder: Path, config: Path) -> Program:
    """A coordinator for all tests of a module, which has to end it."""
    return Program(
        folder,
        "server",
        "fedpruner_server.cli",
        "run",
        *("--config", str(config)),
        *("--state-dir", str(folder / "state")),
    )
