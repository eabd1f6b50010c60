"""Settings -> parts wired together, running until done or told to stop."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
from grpc import aio

from fedpruner_common.errors import ConfigError, FedPrunerError
from fedpruner_common.log import get_logger
from fedpruner_common.pb.admin_pb2_grpc import add_AdminServicer_to_server
from fedpruner_common.rpc import (
    HEARTBEATS_PER_LEASE,
    PULL_WAIT_S,
    is_loopback,
    server_credentials,
    server_options,
)
from fedpruner_common.wire import add_federation
from fedpruner_server.admin import Admin
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.config import ServerSettings
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.health import Health
from fedpruner_server.interceptors import ErrorInterceptor
from fedpruner_server.run import Run
from fedpruner_server.servicer import Federation
from fedpruner_server.storage import Storage

_DRAIN_S = 5.0
_FAREWELL_S = PULL_WAIT_S + 5.0
_SAID_GOODBYE = "said goodbye"

_log = get_logger()


async def serve(settings: ServerSettings) -> int:
    """Run the coordinator; returns the exit code.

    Raises:
        FedPrunerError: it cannot start, or the run cannot go on.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    storage = Storage(settings.state_dir)
    try:
        blocks = await asyncio.to_thread(
            BlockStore, settings.model.resolve(), hash_cache=settings.state_dir / "hashes.json"
        )
        coordinator = Coordinator(settings, storage, blocks)
        health = Health(coordinator)
        options = server_options(settings.keepalive_s)
        server = aio.server(interceptors=[ErrorInterceptor()], options=options)
        add_federation(Federation(coordinator), server)
        add_AdminServicer_to_server(Admin(coordinator), server)
        health.add_to(server)
        port = _listen(server, settings)
        async with _serving_health(health, settings.health_server_address):
            await server.start()
            host = settings.listen.rpartition(":")[0]
            # Whoever starts us waits for this line; everything else goes to stderr.
            print(f"fedpruner-server listening on {host}:{port}", flush=True)
            try:
                return await _until_done(coordinator, stop, stay=settings.stay)
            finally:
                await health.close()
                await server.stop(_DRAIN_S)
    finally:
        storage.close()


@asynccontextmanager
async def _serving_health(health: Health, address: str | None) -> AsyncIterator[None]:
    """Watches over the health, and answers checks at an address of their own if there is one."""
    watching = asyncio.create_task(health.watch())
    server = aio.server(options=server_options())
    try:
        if address:
            health.add_to(server)
            _bind(lambda: server.add_insecure_port(address), address)
            await server.start()
        yield
    finally:
        watching.cancel()
        await server.stop(None)


def _listen(server: aio.Server, settings: ServerSettings) -> int:
    """Bind the port; TLS, or in the clear where that is meant."""
    address = settings.listen
    if settings.ssl_certfile and settings.ssl_keyfile:
        credentials = server_credentials(settings.ssl_certfile, settings.ssl_keyfile)
        return _bind(lambda: server.add_secure_port(address, credentials), address)
    if not settings.insecure and not is_loopback(address):
        raise ConfigError(
            f"{address} can be reached from other machines: give --ssl-certfile and "
            "--ssl-keyfile, or --insecure to talk in the clear"
        )
    if not is_loopback(address):
        _log.warning("no TLS: everything on the wire can be read and changed", listen=address)
    return _bind(lambda: server.add_insecure_port(address), address)


def _bind(bind: Callable[[], int], address: str) -> int:
    try:
        port = bind()
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"cannot listen on {address}: {error}") from error
    if port == 0:
        raise ConfigError(f"cannot listen on {address}: is the port in use?")
    return port


async def _until_done(coordinator: Coordinator, stop: asyncio.Event, *, stay: bool) -> int:
    """Conduct the run; end early on a signal. A stopped run goes on at the next start."""
    conducting = asyncio.create_task(Run(coordinator).conduct())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({conducting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not conducting.done():
        _log.info("stopping; the run goes on when this server is started again")
        conducting.cancel()
        await asyncio.wait({conducting})
        return 0
    error = conducting.exception()
    if isinstance(error, FedPrunerError):
        coordinator.tell("failed", f"the run failed: {error}")
    elif error is not None:
        coordinator.tell("failed", "the run failed: internal error, see the coordinator's log")
        _log.error("bug in the run", exc_info=error)
    if stay:
        await stopping
    else:
        stopping.cancel()
        await _farewell(coordinator)
    return 0 if error is None else 1


async def _farewell(coordinator: Coordinator) -> None:
    """Let every living agent hear that the run is over, for a bounded time.

    After a restart that includes those of the last round who have not come back yet: without an
    answer they would ask for ever.
    """
    registry, storage = coordinator.registry, coordinator.storage
    missing = set() if storage.fact(_SAID_GOODBYE) else coordinator.last_seen_working()
    deadline = time.monotonic() + _FAREWELL_S
    while time.monotonic() < deadline:
        now = time.monotonic()
        # One without the memory for any submodel has ended, unless it still beats: then it waits.
        fresh = 2 * registry.lease_s / HEARTBEATS_PER_LEASE
        waiting = [
            device
            for device in registry.devices.values()
            if not device.told_finished
            and (not device.unfit or now - device.last_seen < fresh)
            and registry.state(device, now=now) != "lost"
        ]
        if not waiting and missing <= registry.devices.keys():
            break
        await coordinator.changed(0.2)
    storage.remember(_SAID_GOODBYE, True)


def main(settings: ServerSettings) -> int:
    """Run the coordinator in a fresh event loop; returns the exit code."""
    grpc.aio.init_grpc_aio()
    os.umask(0o077)  # adapters and updates are nobody else's business
    return asyncio.run(serve(settings))
