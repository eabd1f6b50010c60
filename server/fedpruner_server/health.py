"""Whether the coordinator can do its work, by gRPC's health protocol and for `status`."""

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedpruner_common.log import get_logger
from fedpruner_server.coordinator import Coordinator

_LOOK_S = 2.0  # between looks at the disk
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Looks at the disk now and then and says what it found."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._servicer = health.aio.HealthServicer()
        self._log = get_logger()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answer health checks on this server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def watch(self) -> None:
        """For ever: note trouble with the disk, and its end."""
        storage, min_free_bytes = self._c.storage, self._c.settings.transfer.min_free_bytes
        while True:
            needed = self._c.needed_bytes
            trouble = await asyncio.to_thread(storage.trouble, min_free_bytes=needed)
            if not trouble and needed == self._c.needed_bytes:
                self._c.needed_bytes = min_free_bytes
            if trouble and not self._c.trouble:
                self._log.error(trouble)
            elif self._c.trouble and not trouble:
                self._log.info("the disk is well again")
            if trouble != self._c.trouble:
                self._c.trouble = trouble
                self._c.wake()
            serving = not trouble and self._c.state not in ("preparing", "failed")
            await self._servicer.set("", _SERVING if serving else _NOT_SERVING)
            await asyncio.sleep(_LOOK_S)

    async def close(self) -> None:
        """From here on: not serving."""
        await self._servicer.enter_graceful_shutdown()
