"""The agent's connection against a coordinator that answers by script."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedpruner_client.config import AgentSettings
from fedpruner_client.connection import Connection, Finished, Offer
from fedpruner_common.errors import Unauthenticated, UnknownClient
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.pb.federation_pb2_grpc import (
    FederationServicer,
    add_FederationServicer_to_server,
)
from fedpruner_common.status import CODE_KEY, status_of


class Coordinator(FederationServicer):
    """Knows one session, the newest; the events say and decide when it answers.

    Attributes:
        pulls: sessions that asked for a task.
    """

    def __init__(self) -> None:
        self.session = ""
        self.known = True
        self.joined = 0
        self.pulls: list[str] = []
        self.pull_arrived, self.answer_pull = threading.Event(), threading.Event()
        self.pull_refused, self.answer_join = threading.Event(), threading.Event()
        self.answer_pull.set()
        self.answer_join.set()

    def Register(self, _request: pb.RegisterRequest, _context: Any) -> pb.RegisterReply:
        self.joined += 1
        self.known = True
        self.session = session = f"session {self.joined}"
        self.answer_pull.set()
        self.answer_join.wait(30)
        return pb.RegisterReply(session=session, heartbeat_interval_s=1.0)

    def PullTask(self, request: pb.PullTaskRequest, context: Any) -> pb.PullTaskReply:
        self.pulls.append(request.session)
        self.pull_arrived.set()
        self.answer_pull.wait(30)
        if not self.known or request.session != self.session:
            error = Unauthenticated if self.known else UnknownClient
            context.set_trailing_metadata(((CODE_KEY, error.code),))
            context.add_callback(self.pull_refused.set)
            context.abort(status_of(error("")), "refused")
        return pb.PullTaskReply(finished="done")


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
def connection(coordinator: Coordinator, tmp_path: Path) -> Iterator[Connection]:
    server = grpc.server(ThreadPoolExecutor(4))
    add_FederationServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    settings = AgentSettings(
        server=f"127.0.0.1:{port}", data=[tmp_path / "x.txt"], name="one", max_retries=0
    )
    connection = Connection(settings, Offer(1 << 30, 1 << 20, "rss"))
    yield connection
    connection.close()
    server.stop(0)


def test_a_call_refused_while_the_heartbeat_joins_again_is_made_again(
    coordinator: Coordinator, connection: Connection
) -> None:
    connection.register()
    coordinator.answer_pull.clear()
    coordinator.answer_join.clear()
    with ThreadPoolExecutor(2) as threads:
        pull = threads.submit(connection.pull, wait_s=1)
        assert coordinator.pull_arrived.wait(10)
        # The coordinator has the new session before this device knows of it, and refuses the old.
        joining = threads.submit(connection.register, instead_of="session 1")
        assert coordinator.pull_refused.wait(10)
        coordinator.answer_join.set()
        assert joining.result(10) == "session 2"
        assert pull.result(10) == Finished("done")
    assert coordinator.pulls == ["session 1", "session 2"]
    assert coordinator.joined == 2


def test_a_second_agent_of_the_same_name_ends_the_first(
    coordinator: Coordinator, connection: Connection
) -> None:
    connection.register()
    coordinator.session = "of somebody else"
    with pytest.raises(Unauthenticated, match="refused"):
        connection.pull(wait_s=1)
    assert coordinator.joined == 1


def test_a_coordinator_that_forgot_is_joined_again(
    coordinator: Coordinator, connection: Connection
) -> None:
    connection.register()
    coordinator.known = False
    assert connection.pull(wait_s=1) == Finished("done")
    assert coordinator.pulls == ["session 1", "session 2"]
