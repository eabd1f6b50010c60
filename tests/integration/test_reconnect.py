"""Connections that break, stall and lie, between real programs: the run goes on, byte for byte."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from invariants import check
from lightbed import BASE_BYTES, MIB, UPDATE_BYTES, Bed, ended_well, wait_until
from proxy import Proxy

from fedpruner_client.config import AgentSettings
from fedpruner_client.connection import Connection, Offer
from fedpruner_common import rpc
from fedpruner_common.errors import Unavailable

# What may travel twice when a connection breaks: a chunk under way, and the talk beside it.
SLACK_BYTES = 2 * MIB


@pytest.fixture
def clean() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["plain", "tls"])
def security(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], ...]:
    """Settings of the coordinator and of the agents."""
    if request.param == "plain":
        return {}, {}
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(str(paths["ca"]))
    certificate.cert_chain_pems[0].write_to_path(str(paths["cert"]))
    certificate.private_key_pem.write_to_path(str(paths["key"]))
    server = {"ssl_certfile": paths["cert"], "ssl_keyfile": paths["key"]}
    return server, {"root_certificates": paths["ca"]}


def test_a_download_goes_on_at_its_byte_after_the_coordinator_was_killed(
    bed: Bed, clean: ExitStack, security: tuple[dict[str, Any], ...]
) -> None:
    at_server, at_agent = security
    server = bed.server(**at_server)
    proxy = clean.enter_context(Proxy(bed.address))
    proxy.freeze_at(down=BASE_BYTES // 2)
    agent = bed.agent("one", proxy.address, **at_agent)
    proxy.wait_for_bytes(down=BASE_BYTES // 2)
    wait_until(lambda: bed.arrived("one") > BASE_BYTES // 2 - 2 * MIB, "the first half is there")
    server.kill()
    had, sent = bed.arrived("one"), proxy.bytes_down
    server = bed.server(**at_server)
    proxy.mend()
    ended_well(server, agent)
    base_bytes = bed.arrived("one")
    sent = had + (proxy.bytes_down - sent)
    assert base_bytes + UPDATE_BYTES < sent < base_bytes + 1.2 * UPDATE_BYTES + SLACK_BYTES
    check(bed.state_dir, bed.config, num_rounds=1)


def test_an_upload_goes_on_at_its_byte_after_the_coordinator_was_killed(
    bed: Bed, clean: ExitStack, security: tuple[dict[str, Any], ...]
) -> None:
    at_server, at_agent = security
    server = bed.server(**at_server)
    proxy = clean.enter_context(Proxy(bed.address))
    proxy.freeze_at(up=UPDATE_BYTES // 2)
    agent = bed.agent("one", proxy.address, **at_agent)
    proxy.wait_for_bytes(up=UPDATE_BYTES // 2)
    wait_until(lambda: bed.arriving() >= MIB, "a part of the update is on disk")
    server.kill()
    had, sent = bed.arriving(), proxy.bytes_up
    server = bed.server(**at_server)
    proxy.mend()
    ended_well(server, agent)
    (size,) = (row["bytes_up"] for row in bed.rows("client"))
    assert size > UPDATE_BYTES
    assert size - had <= proxy.bytes_up - sent < size - had + MIB // 2
    check(bed.state_dir, bed.config, num_rounds=1)


# gRPC pings once a second at most.
IDLE_CUT_S = 2.0  # the NAT's
AWAKE_S, TOO_RARE_S = 1.0, 2.5  # keepalive
FAR_APART = {"lease_s": 300, "min_available_clients": 2}  # heartbeats: only keepalive speaks


@pytest.mark.parametrize("keepalive_s", [AWAKE_S, TOO_RARE_S])
def test_a_nat_that_forgets_idle_connections_is_kept_awake_or_found_out(
    bed: Bed, clean: ExitStack, keepalive_s: float
) -> None:
    server = bed.server(run=FAR_APART, keepalive_s=3 * keepalive_s)
    proxy = clean.enter_context(Proxy(bed.address, idle_cut_s=IDLE_CUT_S))
    agent = bed.agent("one", proxy.address, keepalive_s=keepalive_s)
    agent.wait_for("joined")
    if keepalive_s == AWAKE_S:
        threading.Event().wait(1.5 * IDLE_CUT_S)
        assert (proxy.forgotten, proxy.connections) == (0, 1)
    else:
        proxy.wait_for_forgotten(1)
        # A ping after so long, as much again for its answer, and a moment to connect.
        proxy.wait_for_connections(2, timeout_s=2 * keepalive_s + 3)
    other = bed.agent("two")
    ended_well(server, agent, other)
    assert bed.outcomes() == {"one": ("stored", ""), "two": ("stored", "")}
    check(bed.state_dir, bed.config, num_rounds=1)


def test_without_keepalive_a_forgotten_connection_is_not_found_out(
    bed: Bed, clean: ExitStack
) -> None:
    bed.server(run=FAR_APART, keepalive_s=60)
    proxy = clean.enter_context(Proxy(bed.address, idle_cut_s=IDLE_CUT_S))
    agent = bed.agent("one", proxy.address, keepalive_s=60)
    agent.wait_for("joined")
    proxy.wait_for_forgotten(1)
    with pytest.raises(TimeoutError, match="expected 2 connections"):
        proxy.wait_for_connections(2, timeout_s=2 * TOO_RARE_S + 1)


@pytest.mark.parametrize(("up", "down"), [(True, False), (False, True), (True, True)])
def test_a_network_that_is_silent_in_one_direction_or_both_is_left_and_the_download_goes_on(
    bed: Bed, clean: ExitStack, up: bool, down: bool
) -> None:
    server = bed.server(keepalive_s=1)
    proxy = clean.enter_context(Proxy(bed.address))
    proxy.freeze_at(down=BASE_BYTES // 2)
    agent = bed.agent("one", proxy.address, keepalive_s=1)
    proxy.wait_for_bytes(down=BASE_BYTES // 2)
    sent = proxy.bytes_down
    proxy.mend()
    proxy.bytes_per_s = 8 * MIB
    proxy.swallow(up=up, down=down)
    agent.wait_for("cannot fetch tensors, trying again")
    had = bed.arrived("one")
    proxy.bytes_per_s = None
    proxy.mend()
    ended_well(server, agent)
    assert had >= BASE_BYTES // 4
    assert proxy.bytes_down - sent < BASE_BYTES + 1.2 * UPDATE_BYTES + 2 * SLACK_BYTES
    check(bed.state_dir, bed.config, num_rounds=1)


def test_a_coordinator_that_hangs_for_longer_than_lease_and_keepalive_loses_nobody(
    bed: Bed, clean: ExitStack
) -> None:
    server = bed.server(run={"lease_s": 2}, keepalive_s=1)
    proxy = clean.enter_context(Proxy(bed.address))
    proxy.freeze_at(down=BASE_BYTES // 2)
    agent = bed.agent("one", proxy.address, keepalive_s=1)
    proxy.wait_for_bytes(down=BASE_BYTES // 2)
    os.kill(server.pid, signal.SIGSTOP)
    proxy.mend()
    agent.wait_for("cannot fetch tensors, trying again")
    threading.Event().wait(2.5)
    os.kill(server.pid, signal.SIGCONT)
    ended_well(server, agent)
    assert bed.outcomes() == {"one": ("stored", "")}
    assert "lost" not in server.output()
    check(bed.state_dir, bed.config, num_rounds=1)


def connection_to(address: str, **settings: Any) -> Connection:
    options = AgentSettings(server=address, data=[Path("nothing")], name="one", **settings)
    return Connection(options, Offer(4 << 30, 1 << 20, "rss"))


def test_pauses_between_retries_double_up_to_the_limit_and_differ_between_agents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("fedpruner_client.connection.time.sleep", pauses.append)

    class Refused(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "nobody listens"

        def trailing_metadata(self) -> tuple[()]:
            return ()

    def refuse() -> None:
        raise Refused

    runs = []
    for _ in range(2):
        connection = connection_to("127.0.0.1:9", max_retries=30, max_wait_time=8)
        with pytest.raises(Unavailable, match=r"cannot join: 127.0.0.1:9 failed 31 times"):
            connection.retry(refuse, "join")
        connection.close()
        runs.append(pauses.copy())
        pauses.clear()
    for run in runs:
        assert len(run) == 30
        for number, pause in enumerate(run):
            longest = min(8, 0.5 * 2**number)
            assert longest / 2 <= pause <= longest
    assert all(one != other for one, other in zip(*runs, strict=True))


def test_agents_may_ping_three_times_as_often_as_the_coordinator_and_not_much_more() -> None:
    """More is answered with GOAWAY, which ends the calls under way."""

    async def never(_: bytes, __: Any) -> None:
        await asyncio.Event().wait()

    async def ended(keepalive_s: float, ping_s: float) -> bool:
        """Whether a call is ended within a few pings."""
        server = grpc.aio.server(options=rpc.server_options(keepalive_s))
        handlers = {"Wait": grpc.unary_unary_rpc_method_handler(never)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        options = rpc.channel_options(ping_s)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            call = channel.unary_unary("/test/Wait")(b"")
            done, _ = await asyncio.wait({asyncio.ensure_future(call.code())}, timeout=8)
            if done:
                assert await call.details() == "Too many pings"
            call.cancel()
        await server.stop(0)
        return bool(done)

    async def both() -> list[bool]:
        return await asyncio.gather(ended(3.0, 1.0), ended(30.0, 1.0))

    assert asyncio.run(both()) == [False, True]


def test_keepalive_bounds_how_long_a_peer_may_hang_at_both_ends() -> None:
    for options in (rpc.channel_options(30), rpc.server_options(30)):
        values = dict(options)
        assert values["grpc.keepalive_time_ms"] == 30_000
        # The second is the one that ends a connection to a process that hangs.
        assert values["grpc.keepalive_timeout_ms"] == 10_000
        assert values["grpc.http2.ping_timeout_ms"] == 10_000
        assert values["grpc.keepalive_permit_without_calls"] == 1
    assert dict(rpc.server_options(30))["grpc.http2.min_ping_interval_without_data_ms"] == 10_000
