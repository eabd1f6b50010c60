"""An agent without a model: it can say anything."""

from pathlib import Path
from typing import Any

import grpc
from programs import Program

from fedpruner_common import rpc
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.pb.federation_pb2_grpc import FederationStub
from fedpruner_common.status import error_of

GIB = 1 << 30


class FakeAgent:
    """Registered, with room for everything; its calls raise what a real agent's would."""

    def __init__(self, address: str, client_id: str) -> None:
        self.client_id = client_id
        self.channel = grpc.insecure_channel(address, options=rpc.CHANNEL_OPTIONS)
        self.stub = FederationStub(self.channel)
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
