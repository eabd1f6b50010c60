"""The coordinator as the agent sees it: calls that retry, and our own exceptions."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

from fedpruner_client.config import AgentSettings
from fedpruner_common import convert, rpc
from fedpruner_common.errors import (
    Busy,
    FedPrunerError,
    Unauthenticated,
    Unavailable,
    UnknownClient,
)
from fedpruner_common.log import get_logger
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.statistics import Statistics
from fedpruner_common.status import error_of
from fedpruner_common.task import ProbeTask, Task
from fedpruner_common.wire import federation_stub

T = TypeVar("T")

_MAX_BUGS = 3  # of the coordinator, in one call


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
    """One agent's connection; safe to use from its heartbeat thread too.

    Attributes:
        client_id: the device's name.
        offer: what it brings, as it is told with the next question.
        stub: the coordinator's methods.
        session: what the coordinator knows the device by; empty before it joined.
        run_id: of the coordinator's run.
        heartbeat_interval_s: between signs of life.
        lease_s: after so long without one the coordinator gives the device up.
    """

    def __init__(self, settings: AgentSettings, offer: Offer) -> None:
        """Prepare to connect; the first call opens the channel."""
        self._settings = settings
        self.client_id = settings.client_id
        self.offer = offer
        self._channel = rpc.open_channel(
            settings.server,
            root_certificates=settings.root_certificates,
            insecure=settings.insecure,
            keepalive_s=settings.keepalive_s,
        )
        self.stub = federation_stub(self._channel)
        self.session = ""
        self.run_id = ""
        self.heartbeat_interval_s = 1.0  # until the coordinator says
        self.lease_s = rpc.HEARTBEATS_PER_LEASE * self.heartbeat_interval_s
        self._registering = threading.RLock()  # joining retries, and retrying asks for the session
        self._log = get_logger()

    def close(self) -> None:
        self._channel.close()

    def register(self, *, instead_of: str | None = None, patient: bool = True) -> str:
        """Join, or join again, and return the session.

        Args:
            instead_of: the session that was refused; if another thread has renewed it meanwhile,
                nothing happens.
            patient: try again until the coordinator answers.
        """
        with self._registering:
            if instead_of is not None and instead_of != self.session:
                return self.session
            request = pb.RegisterRequest(
                client_id=self.client_id,
                memory_budget_bytes=self.offer.memory_budget_bytes,
                floor_bytes=self.offer.floor_bytes,
                memory_kind=self.offer.memory_kind,
                read_bytes_per_s=self.offer.read_bytes_per_s,
            )

            def call() -> pb.RegisterReply:
                return self.stub.Register(request, timeout=rpc.UNARY_TIMEOUT_S)

            reply = self.retry(call, "join") if patient else _once(call)
            self.run_id = reply.run_id
            self.heartbeat_interval_s = reply.heartbeat_interval_s
            self.lease_s = reply.lease_s or rpc.HEARTBEATS_PER_LEASE * reply.heartbeat_interval_s
            self.session = reply.session
            return self.session

    def heartbeat(
        self, *, task_id: str, activity: str, step: int, num_steps: int, train_loss: float
    ) -> str:
        """Tell that this device lives; returns the task if it is still wanted. Does not retry."""
        request = pb.HeartbeatRequest(
            client_id=self.client_id,
            session=self.session,
            activity=activity,
            step=step,
            num_steps=num_steps,
            train_loss=train_loss,
            task_id=task_id,
        )
        reply = _once(lambda: self.stub.Heartbeat(request, timeout=rpc.UNARY_TIMEOUT_S))
        task: str = reply.task_id
        return task

    def pull(self, *, wait_s: float) -> Task | ProbeTask | Waiting | Finished:
        """The next task, or why there was none for so long."""

        def call() -> pb.PullTaskReply:
            request = pb.PullTaskRequest(
                client_id=self.client_id,
                session=self.session,
                wait_s=wait_s,
                memory_budget_bytes=self.offer.memory_budget_bytes,
            )
            return self.stub.PullTask(request, timeout=wait_s + rpc.UNARY_TIMEOUT_S)

        reply = self.retry(call, "ask for a task")
        kind = reply.WhichOneof("reply")
        if kind == "task":
            return convert.task_from_pb(reply.task)
        if kind == "probe":
            return convert.probe_from_pb(reply.probe)
        return Finished(reply.finished) if kind == "finished" else Waiting(reply.waiting)

    def push_statistics(self, task_id: str, statistics: Statistics) -> None:
        """Tell the coordinator about the layers."""
        # With numpy, which an agent that is never asked does without.
        from fedpruner_common.convert_statistics import statistics_to_pb

        def call() -> None:
            request = pb.PushStatisticsRequest(
                client_id=self.client_id, session=self.session, task_id=task_id
            )
            statistics_to_pb(statistics, request)
            self.stub.PushStatistics(request, timeout=rpc.UNARY_TIMEOUT_S)

        self.retry(call, "send the statistics")

    def report_failure(self, task_id: str, reason: str, *, out_of_memory: bool = False) -> None:
        """Tell the coordinator not to wait for this task. Does not retry.

        Args:
            task_id: of the task.
            reason: for people.
            out_of_memory: a smaller one may do.
        """
        request = pb.ReportFailureRequest(
            client_id=self.client_id,
            session=self.session,
            task_id=task_id,
            reason=reason,
            out_of_memory=out_of_memory,
            memory_budget_bytes=self.offer.memory_budget_bytes,
        )
        _once(lambda: self.stub.ReportFailure(request, timeout=rpc.UNARY_TIMEOUT_S))

    def _renewed_since(self, session: str) -> bool:
        """Whether our own agent has another session by now; waits while it is joining."""
        with self._registering:
            return session != self.session

    def retry(self, call: Callable[[], T], what: str) -> T:
        """Call until the coordinator answers: pauses double up to the limit, with jitter.

        Args:
            call: raises grpc.RpcError when it fails.
            what: it does, for people.

        Raises:
            FedPrunerError: the coordinator's refusal.
            Unavailable: it failed more often than `max_retries`.
        """
        failures = bugs = 0
        while True:
            session = self.session
            try:
                return call()
            except grpc.RpcError as rpc_error:
                error: FedPrunerError = error_of(rpc_error)
            except grpc.FutureCancelledError:  # by our own thread that looks for stalled transfers
                error = Unavailable("the transfer had stalled")
            if isinstance(error, UnknownClient) and session:  # the coordinator was restarted
                self.register(instead_of=session)
                continue
            if isinstance(error, Unauthenticated) and self._renewed_since(session):
                continue  # our other thread joined again while this call was under way
            bugs += type(error) is FedPrunerError
            if not isinstance(error, (Unavailable, Busy)) and not 0 < bugs <= _MAX_BUGS:
                raise error
            failures += 1
            limit = self._settings.max_retries
            if limit is not None and failures > limit:
                server = self._settings.server
                raise Unavailable(f"cannot {what}: {server} failed {failures} times: {error}")
            pause = min(self._settings.max_wait_time, 0.5 * 2 ** min(failures - 1, 16))
            pause *= random.uniform(0.5, 1.0)
            if failures == 1 or pause > 5:
                self._log.warning(
                    f"cannot {what}, trying again", server=self._settings.server, reason=str(error)
                )
            time.sleep(pause)


def _once(call: Callable[[], T]) -> T:
    """The answer of a call, or our own exception."""
    try:
        return call()
    except grpc.RpcError as error:
        raise error_of(error) from error
