"""Asking a running coordinator."""

from pathlib import Path
from typing import Any

import grpc

from fedpruner_common import rpc
from fedpruner_common.errors import Unavailable
from fedpruner_common.pb import admin_pb2 as pb
from fedpruner_common.pb.admin_pb2_grpc import AdminStub
from fedpruner_common.status import error_of

_TIMEOUT_S = 10.0


class AdminClient:
    """One coordinator."""

    def __init__(
        self, server: str, *, root_certificates: Path | None = None, insecure: bool = False
    ) -> None:
        self._server = server
        self._channel = rpc.open_channel(
            server, root_certificates=root_certificates, insecure=insecure
        )
        self._stub = AdminStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def status(self) -> pb.StatusReply:
        return self._call(self._stub.Status, pb.StatusRequest())

    def devices(self) -> pb.DevicesReply:
        return self._call(self._stub.Devices, pb.DevicesRequest())

    def rounds(self) -> pb.RoundsReply:
        return self._call(self._stub.Rounds, pb.RoundsRequest())

    def plan(self, *, memory_budget_bytes: int, floor_bytes: int) -> pb.PlanReply:
        request = pb.PlanRequest(memory_budget_bytes=memory_budget_bytes, floor_bytes=floor_bytes)
        return self._call(self._stub.Plan, request)

    def _call(self, method: Any, request: Any) -> Any:
        """The answer.

        Raises:
            Unavailable: nobody answers; the message says what to check.
            FedPrunerError: the coordinator refused.
        """
        try:
            return method(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as rpc_error:
            error = error_of(rpc_error)
        if isinstance(error, Unavailable) and "still" not in str(error):
            raise Unavailable(
                f"no coordinator answers at {self._server}: is fedpruner-server running, and is "
                f"--server right? ({error})"
            )
        raise error
