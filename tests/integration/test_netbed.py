"""The test's own network does what it says; without root, skips and says why."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from netbed import Host, Net, why_not
from proxy import Proxy

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no network bed: {why_not()}")

QUIET_S = 0.05
PATIENCE_S = 30.0
# A server that says its port, sends back what it gets, and ignores SIGTERM if told so.
ECHO = """
import signal, socket, sys
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        end, _ = server.accept()
        with end:
            while data := end.recv(65536):
                end.sendall(data)
"""


@pytest.fixture
def net() -> Iterator[Net]:
    with Net() as net:
        yield net


def echo(host: Host, *options: str) -> tuple["subprocess.Popen[str]", int]:
    process = host.popen(
        [sys.executable, "-c", ECHO, host.address, *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    return process, int(process.stdout.readline())


@contextlib.contextmanager
def tcp(client: Host, server: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection between two hosts."""
    with server.socket() as listener, client.socket() as near:
        for end in (listener, near):
            end.settimeout(PATIENCE_S)
        listener.bind((server.address, 0))
        listener.listen()
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        with far:
            far.settimeout(PATIENCE_S)
            yield near, far


@contextlib.contextmanager
def udp(*hosts: Host) -> Iterator[list[socket.socket]]:
    """A socket with an address on each host."""
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(host.socket(socket.SOCK_DGRAM)) for host in hosts]
        for end, host in zip(ends, hosts, strict=True):
            end.settimeout(PATIENCE_S)
            end.bind((host.address, 0))
        yield ends


def receive(end: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (more := end.recv(num_bytes - len(data))):
        data += more
    return data


def hears_nothing(end: socket.socket) -> bool:
    end.settimeout(QUIET_S)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(PATIENCE_S)
    return False


def test_a_program_on_one_host_answers_another_host_and_not_this_machine(net):
    _, port = echo(net["server"])
    for name in ("agent-0", "agent-1"):
        with net[name].socket() as end:
            end.settimeout(PATIENCE_S)
            end.connect((net["server"].address, port))
            end.sendall(b"hello")
            assert receive(end, 5) == b"hello"
        assert net.link(name, "server").num_carried > 0
        assert net.link("server", name).num_carried > 0
    with net["server"].socket() as loopback, socket.socket() as outside:
        with pytest.raises(ConnectionRefusedError):  # the program bound the host's address only
            loopback.connect(("127.0.0.1", port))
        with pytest.raises(OSError, match="Cannot assign requested address"):
            outside.bind((net["server"].address, 0))


def test_programs_see_only_their_host_and_no_proxies(net, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://nobody.invalid:1")
    monkeypatch.setenv("KEPT", "kept")
    code = "import os, socket; print(os.getpid(), *(n for _, n in socket.if_nameindex()))"
    code += "; print(os.environ.get('HTTPS_PROXY'), os.environ['KEPT'])"
    process = net["agent-0"].popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert said.split("\n")[:2] == [f"{process.pid} lo tun0", "None kept"]


def test_the_prefix_runs_a_program_in_there_without_popen(net):
    host = net["agent-1"]
    code = "import socket, sys; socket.socket().bind((sys.argv[1], 0))"
    subprocess.run([*host.prefix, sys.executable, "-c", code, host.address], check=True)


def test_delay_is_of_one_direction_only(net):
    net.shape("agent-0", "server", both_ways=False, delay_s=1.0)
    with udp(net["agent-0"], net["server"]) as (agent, server):
        begun_s = time.monotonic()
        agent.sendto(b"slow", server.getsockname())
        server.sendto(b"fast", agent.getsockname())
        assert agent.recv(10) == b"fast"
        assert net.link("agent-0", "server").num_carried == 0
        assert server.recv(10) == b"slow"
        assert time.monotonic() - begun_s >= 1.0


def test_loss_takes_its_share_of_the_packets(net):
    net.shape("agent-0", "server", loss=0.5)
    link = net.link("agent-0", "server")
    with udp(net["agent-0"], net["server"], net["agent-1"]) as (agent, server, other):
        for number in range(200):
            agent.sendto(bytes([number]), server.getsockname())
        # The router takes an agent's packets in order: after this one, it has seen them all.
        agent.sendto(b"last", other.getsockname())
        assert other.recv(10) == b"last"
        assert link.num_carried + link.num_dropped == 200
        assert 50 < link.num_carried < 150
        for _ in range(link.num_carried):
            assert len(server.recv(10)) == 1
        assert hears_nothing(server)


def test_tcp_comes_through_loss_whole(net):
    net.shape("agent-0", "server", loss=0.02)
    with tcp(net["agent-0"], net["server"]) as (client, server):
        client.sendall(bytes(range(250)) * 1000)
        client.shutdown(socket.SHUT_WR)
        assert receive(server, 250_001) == bytes(range(250)) * 1000
    assert net.link("agent-0", "server").num_dropped > 0


def test_rate_limits_a_transfer(net):
    net.shape("agent-0", "server", both_ways=False, bytes_per_s=500_000)
    with tcp(net["agent-0"], net["server"]) as (client, server):
        begun_s = time.monotonic()
        client.sendall(bytes(200_000))
        receive(server, 200_000)
        assert time.monotonic() - begun_s > 0.35  # 0.4 s and headers, less the last packet


def test_a_full_queue_drops_packets(net):
    net.shape("agent-0", "server", bytes_per_s=1000.0, queue_s=0.5)
    with udp(net["agent-0"], net["server"]) as (agent, server):
        for _ in range(20):
            agent.sendto(bytes(172), server.getsockname())  # 200 with headers: 0.2 s
        net.link("agent-0", "server").wait_for(dropped=1)
        assert len(server.recv(1000)) == 172


def test_a_cut_loses_packets_silently_and_tcp_goes_on_after_mend(net):
    link = net.link("agent-0", "server")
    with (
        tcp(net["agent-0"], net["server"]) as (client, server),
        tcp(net["agent-1"], net["server"]) as others,
    ):
        net.cut("agent-0", "server")
        client.sendall(b"late")
        link.wait_for(dropped=2)  # the kernel has sent it again in vain
        assert hears_nothing(server)
        assert hears_nothing(client)
        others[0].sendall(b"not cut")
        assert receive(others[1], 7) == b"not cut"
        net.mend("agent-0", "server")
        assert receive(server, 4) == b"late"


def test_a_cut_may_be_of_one_direction_only(net):
    net.cut("server", "agent-0", both_ways=False)
    with udp(net["agent-0"], net["server"]) as (agent, server):
        agent.sendto(b"up", server.getsockname())
        assert server.recv(10) == b"up"
        server.sendto(b"down", agent.getsockname())
        net.link("server", "agent-0").wait_for(dropped=1)
        assert hears_nothing(agent)


def test_a_cut_loses_what_is_still_under_way(net):
    net.shape("agent-0", "server", delay_s=0.5)
    link = net.link("agent-0", "server")
    with udp(net["agent-0"], net["server"], net["agent-1"]) as (agent, server, other):
        agent.sendto(b"lost", server.getsockname())
        agent.sendto(b"later", other.getsockname())
        assert other.recv(10) == b"later"
        net.cut("agent-0", "server")
        link.wait_for(dropped=1)
        assert link.num_carried == 0


def test_what_is_sent_into_a_cut_is_lost_even_if_it_would_arrive_after_mend(net):
    net.shape("agent-0", "server", delay_s=100.0)
    net.cut("agent-0", "server")
    with udp(net["agent-0"], net["server"]) as (agent, server):
        agent.sendto(b"lost", server.getsockname())
        net.link("agent-0", "server").wait_for(dropped=1)


def test_a_connect_into_a_cut_gets_no_answer_at_all(net):
    net.cut("agent-0", "server")
    with net["agent-0"].socket() as client:
        client.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            client.connect((net["server"].address, 9))
    net.link("agent-0", "server").wait_for(dropped=1)


def test_a_proxy_is_a_door_from_the_test_into_a_host_that_no_cut_closes(net):
    server = net["server"]
    _, port = echo(server)
    net.cut("agent-0", "server")
    net.cut("agent-1", "server")
    with Proxy(f"{server.address}:{port}", make_socket=server.socket) as door:
        host, outer_port = door.address.rsplit(":", 1)
        with socket.create_connection((host, int(outer_port)), PATIENCE_S) as end:
            end.sendall(b"hello")
            assert receive(end, 5) == b"hello"


def test_nothing_is_left_of_it_even_when_a_test_fails(monkeypatch):
    monkeypatch.setattr("netbed._END_S", 0.2)

    def machine() -> tuple[object, ...]:
        names = os.listdir("/run/netns") if Path("/run/netns").exists() else None
        return (
            sorted(os.listdir("/proc/self/fd")),
            socket.if_nameindex(),
            Path("/proc/mounts").read_text(),
            names,
        )

    before = machine()
    programs: list[subprocess.Popen[str]] = []
    namespaces: set[int] = set()

    def fail() -> None:
        with Net() as net:
            programs.extend((echo(net["server"])[0], echo(net["agent-0"], "stubborn")[0]))
            namespaces.update(os.fstat(h.namespace_fd).st_ino for h in net.hosts.values())
            assert namespaces & namespaces_in_use()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.returncode for p in programs] == [-signal.SIGTERM, -signal.SIGKILL]
    assert not namespaces & namespaces_in_use()
    assert machine() == before


def namespaces_in_use() -> set[int]:
    """Inode numbers of the network namespaces that any process is in."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.add((process / "ns" / "net").stat().st_ino)
    return found


def test_a_net_that_cannot_be_made_leaves_nothing():
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Invalid argument"):
        Net(mtu=-1)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_without_root_it_says_why_not():
    program = "import netbed, os; os.setuid(65534); print(netbed.why_not())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "network namespaces need root", done.stderr
