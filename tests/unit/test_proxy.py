"""The proxy that breaks connections in other tests does what it says.

Each test holds both ends of its connections itself. What must not arrive is looked for after the
proxy has counted it; a silent end is watched for `QUIET_S` besides.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from proxy import Proxy

QUIET_S = 0.05
PATIENCE_S = 30.0
MUCH = 32 * 1024 * 1024  # bytes; more than the proxy and the kernel keep under way


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        yield server


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[Proxy]:
    with Proxy(address_of(listener)) as proxy:
        yield proxy


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()
    return f"{host}:{port}"


def connect(proxy: Proxy) -> socket.socket:
    host, port = proxy.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), PATIENCE_S)


@contextlib.contextmanager
def connected(
    proxy: Proxy, listener: socket.socket
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through the proxy: the client's and the server's."""
    with connect(proxy) as client:
        server, _ = listener.accept()
        with server:
            server.settimeout(PATIENCE_S)
            yield client, server


def receive(end: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (more := end.recv(num_bytes - len(data))):
        data += more
    return data


def hears_nothing(end: socket.socket) -> bool:
    """No bytes, no end, no reset for a moment."""
    end.settimeout(QUIET_S)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(PATIENCE_S)
    return False


def send_for_ever(end: socket.socket) -> None:
    while True:
        end.sendall(bytes(1000))


def assert_reset(end: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        end.recv(1)


def assert_refused_late(proxy: Proxy) -> None:
    """The kernel accepts, then comes a reset: before or after the client's connect returns."""
    with pytest.raises(ConnectionResetError), connect(proxy) as client:
        client.recv(1)


def assert_works(client: socket.socket, server: socket.socket) -> None:
    client.sendall(b"ping")
    assert receive(server, 4) == b"ping"
    server.sendall(b"pong!")
    assert receive(client, 5) == b"pong!"


@contextlib.contextmanager
def sending(end: socket.socket, num_bytes: int) -> Iterator[None]:
    """Send so many bytes beside the test, which may break the connection meanwhile."""

    def send() -> None:
        with contextlib.suppress(OSError):
            end.sendall(bytes(num_bytes))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_bytes_pass_both_ways_and_are_counted(proxy, listener):
    with connected(proxy, listener) as (client, server):
        assert_works(client, server)
        proxy.wait_for_bytes(up=4, down=5)
        assert (proxy.connections, proxy.bytes_up, proxy.bytes_down) == (1, 4, 5)
        with connected(proxy, listener) as other:
            assert_works(*other)
            proxy.wait_for_bytes(up=8, down=10)
            assert (proxy.connections, proxy.bytes_up, proxy.bytes_down) == (2, 8, 10)


def test_much_data_arrives_whole_and_in_order(proxy, listener):
    data = bytes(range(251)) * 20_000
    with connected(proxy, listener) as (client, server):

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        assert receive(server, len(data) + 1) == data
        thread.join()
    proxy.wait_for_bytes(up=len(data))
    assert proxy.bytes_up == len(data)


def test_one_direction_may_end_before_the_other(proxy, listener):
    with connected(proxy, listener) as (client, server):
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive(server, 100) == b"question"
        server.sendall(b"answer")
        server.close()
        assert receive(client, 100) == b"answer"


def test_a_reset_goes_on_to_the_other_end(proxy, listener):
    with connected(proxy, listener) as (client, server):
        assert_works(client, server)
        server.sendall(b"x")
        proxy.wait_for_bytes(down=6)
        client.close()  # with an unread byte: the kernel sends RST
        assert_reset(server)


def test_a_server_that_goes_on_to_a_client_that_has_gone_is_reset(proxy, listener):
    with connected(proxy, listener) as (client, server):
        client.close()
        assert receive(server, 1) == b""
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_for_ever(server)


def test_a_target_where_nobody_listens_resets_the_client_and_may_be_replaced(proxy, listener):
    address = proxy.target
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        proxy.target = address_of(nobody)
    assert_refused_late(proxy)
    proxy.target = address
    with connected(proxy, listener) as ends:
        assert_works(*ends)


def test_waiting_for_more_bytes_than_come_says_how_many_came(proxy, listener):
    with connected(proxy, listener) as (client, server):
        assert_works(client, server)
        with pytest.raises(TimeoutError, match=r"expected 0 bytes up and 6 down .* 5 down"):
            proxy.wait_for_bytes(down=6, timeout_s=QUIET_S)


def test_cut_resets_both_ends_and_refuses_new_ones_until_mend(proxy, listener):
    with connected(proxy, listener) as (client, server):
        assert_works(client, server)
        proxy.cut()
        assert_reset(client)
        assert_reset(server)
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
            proxy.cut()  # again is no error
    proxy.mend()
    with connected(proxy, listener) as ends:
        assert_works(*ends)
    assert proxy.connections == 2


def test_cut_while_clients_connect_leaves_no_connection(proxy):
    with contextlib.ExitStack() as clients:
        ends = [clients.enter_context(connect(proxy)) for _ in range(50)]
        proxy.cut()
        for end in ends:
            assert_reset(end)
    assert proxy.open_connections == 0


@pytest.mark.parametrize("way", ["up", "down"])
def test_cut_in_the_middle_of_a_transfer_at_the_byte_a_test_names(proxy, listener, way):
    middle = 1_000_000
    proxy.freeze_at(**{way: middle})
    with connected(proxy, listener) as ends:
        source, target = ends if way == "up" else ends[::-1]
        with sending(source, 2 * middle):
            got = receive(target, middle)
            proxy.wait_for_bytes(**{way: middle})
            assert hears_nothing(target)
            assert (len(got), getattr(proxy, f"bytes_{way}")) == (middle, middle)
            proxy.cut()
        assert_reset(target)


def test_after_freezing_at_a_byte_mend_lets_the_rest_through(proxy, listener):
    proxy.freeze_at(up=3)
    with connected(proxy, listener) as (client, server):
        client.sendall(b"abcdef")
        assert receive(server, 3) == b"abc"
        server.sendall(b"not frozen this way")
        assert receive(client, 19) == b"not frozen this way"
        proxy.mend()
        assert receive(server, 3) == b"def"


def test_swallow_up_loses_what_the_client_says_and_nothing_else(proxy, listener):
    with connected(proxy, listener) as (client, server):
        assert_works(client, server)
        proxy.swallow(down=False)
        client.sendall(b"lost")
        proxy.wait_for_lost(up=4)
        server.sendall(b"heard")
        assert receive(client, 5) == b"heard"
        assert hears_nothing(server)
        assert (proxy.bytes_up, proxy.lost_up, proxy.lost_down) == (4, 4, 0)


def test_swallow_down_loses_what_the_server_says_and_nothing_else(proxy, listener):
    with connected(proxy, listener) as (client, server):
        assert_works(client, server)
        proxy.swallow(up=False)
        server.sendall(b"lost")
        proxy.wait_for_lost(down=4)
        client.sendall(b"heard")
        assert receive(server, 5) == b"heard"
        assert hears_nothing(client)
        assert (proxy.lost_up, proxy.lost_down) == (0, 4)


def test_a_sender_into_a_partition_never_stalls_and_its_end_is_not_heard(proxy, listener):
    with connected(proxy, listener) as (client, server):
        proxy.swallow()
        client.sendall(bytes(MUCH))
        client.close()
        proxy.wait_for_lost(up=MUCH)
        assert hears_nothing(server)
        proxy.mend()
        assert_reset(server)


def test_a_partition_loses_what_was_stuck_in_a_full_pipe(proxy, listener):
    with connected(proxy, listener) as (client, server), sending(client, MUCH):
        proxy.wait_for_bytes(up=1)
        proxy.swallow()  # nobody reads at the other end: the send is over only if bytes vanish
        proxy.wait_for_lost(up=1)
        assert server.recv(1) == b"\0"


def test_mend_resets_connections_that_lost_something_and_spares_the_others(proxy, listener):
    with (
        connected(proxy, listener) as (unlucky_client, unlucky_server),
        connected(proxy, listener) as silent,
    ):
        proxy.swallow()
        unlucky_client.sendall(b"lost")
        proxy.wait_for_lost(up=4)
        proxy.mend()
        assert_reset(unlucky_client)
        assert_reset(unlucky_server)
        assert_works(*silent)
        with connected(proxy, listener) as new:
            assert_works(*new)


@pytest.mark.parametrize("way", ["up", "down"])
def test_no_handshake_gets_through_a_partition_not_even_one_way(proxy, listener, way):
    proxy.swallow(up=way == "up", down=way == "down")
    with connect(proxy) as client:
        client.sendall(b"anybody?")
        proxy.wait_for_lost(up=8)
        assert hears_nothing(client)
        listener.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            listener.accept()
        listener.settimeout(PATIENCE_S)
        proxy.mend()
        assert_reset(client)
    with connected(proxy, listener) as ends:
        assert_works(*ends)


@pytest.mark.parametrize("way", ["up", "down"])
def test_freeze_keeps_what_is_sent_that_way_until_mend(proxy, listener, way):
    with connected(proxy, listener) as ends:
        assert_works(*ends)
        source, target = ends if way == "up" else ends[::-1]
        proxy.freeze(up=way == "up", down=way == "down")
        source.sendall(b"late")
        source.shutdown(socket.SHUT_WR)
        target.sendall(b"not frozen")
        assert receive(source, 10) == b"not frozen"
        assert hears_nothing(target)
        proxy.mend()
        assert receive(target, 100) == b"late"
        assert (proxy.lost_up, proxy.lost_down) == (0, 0)


def test_a_sender_into_a_frozen_link_stalls_and_loses_nothing(proxy, listener):
    with connected(proxy, listener) as (client, server):
        proxy.freeze()
        client.settimeout(QUIET_S)
        num_sent = 0
        with contextlib.suppress(TimeoutError):
            while num_sent < MUCH:
                num_sent += client.send(bytes(65536))
        assert num_sent < MUCH
        proxy.mend()
        assert len(receive(server, num_sent)) == num_sent


def test_a_connection_made_while_frozen_reaches_the_server_after_mend(proxy, listener):
    proxy.freeze()
    with connect(proxy) as client:
        client.sendall(b"hello")
        proxy.wait_for_connections(1)
        listener.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            listener.accept()
        listener.settimeout(PATIENCE_S)
        proxy.mend()
        server, _ = listener.accept()
        with server:
            server.settimeout(PATIENCE_S)
            assert receive(server, 5) == b"hello"


def test_what_is_frozen_and_then_swallowed_is_lost(proxy, listener):
    with connected(proxy, listener) as (client, server):
        proxy.freeze()
        client.sendall(b"lost")
        proxy.swallow()
        proxy.wait_for_lost(up=4)
        proxy.mend()
        assert_reset(server)


def test_an_idle_connection_is_forgotten_without_a_word_to_either_end(proxy, listener):
    with connected(proxy, listener) as (client, server):
        assert_works(client, server)
        proxy.idle_cut_s = 0.1
        proxy.wait_for_forgotten(1)
        proxy.idle_cut_s = None
        client.sendall(b"lost")
        server.sendall(b"lost too")
        proxy.wait_for_lost(up=4, down=8)
        assert hears_nothing(client)
        assert hears_nothing(server)
        client.close()
        assert hears_nothing(server)
        proxy.mend()  # does not bring it back
        assert hears_nothing(server)
        with connected(proxy, listener) as ends:
            assert_works(*ends)
        assert proxy.forgotten == 1


def test_a_connection_in_use_is_not_forgotten(proxy, listener):
    with connected(proxy, listener) as busy, connected(proxy, listener):
        proxy.idle_cut_s = 1.5
        while proxy.forgotten == 0:  # the idle one
            assert_works(*busy)
            assert hears_nothing(busy[0])
        assert_works(*busy)
        assert proxy.forgotten == 1


def test_each_direction_has_its_rate_and_a_new_one_holds_at_once(proxy, listener):
    proxy.bytes_per_s = 200_000
    with connected(proxy, listener) as (client, server):
        begun_s = time.monotonic()
        client.sendall(bytes(60_000))
        server.sendall(bytes(60_000))
        proxy.wait_for_bytes(up=60_000, down=60_000)
        took_s = time.monotonic() - begun_s
        # The last step of 4000 bytes goes when 56,000 have had their 0.28 s, less a step's 0.02 s.
        assert took_s > 0.25
        proxy.bytes_per_s = 0.01
        client.sendall(bytes(1000))  # one goes at once, the next after 100 s
        proxy.wait_for_bytes(up=60_001)
        proxy.bytes_per_s = None
        proxy.wait_for_bytes(up=61_000, timeout_s=PATIENCE_S)


def test_connections_share_the_rate_of_a_direction(proxy, listener):
    proxy.bytes_per_s = 200_000
    with (
        connected(proxy, listener) as (first, _),
        connected(proxy, listener) as (second, _),
    ):
        begun_s = time.monotonic()
        first.sendall(bytes(30_000))
        second.sendall(bytes(30_000))
        proxy.wait_for_bytes(up=60_000)
        assert time.monotonic() - begun_s > 0.25


def test_delay_is_added_each_way_and_does_not_limit_what_is_under_way(proxy, listener):
    proxy.delay_s = 0.2
    with connected(proxy, listener) as (client, server):
        begun_s = time.monotonic()
        assert_works(client, server)
        assert time.monotonic() - begun_s >= 0.4
        # Alone, each of these 60 chunks would wait for 0.2 s: 12 s.
        with sending(client, 60 * 65536):
            begun_s = time.monotonic()
            assert len(receive(server, 60 * 65536)) == 60 * 65536
            assert time.monotonic() - begun_s < 6.0


def test_swallow_loses_what_is_still_under_way(proxy, listener):
    proxy.delay_s = 60.0
    with connected(proxy, listener) as (client, _):
        client.sendall(b"lost")
        proxy.swallow()
        proxy.wait_for_lost(up=4)
        assert proxy.bytes_up == 0


@pytest.mark.parametrize("setting", ["idle_cut_s", "bytes_per_s", "delay_s"])
def test_a_setting_that_makes_no_sense_is_refused_by_name(proxy, setting):
    with pytest.raises(ValueError, match=f"{setting} must .* got -1"):
        setattr(proxy, setting, -1)


def test_close_resets_what_is_open_and_may_be_said_twice(listener):
    proxy = Proxy(address_of(listener))
    with connected(proxy, listener) as (client, server):
        assert_works(client, server)
        proxy.close()
        proxy.close()
        assert_reset(client)
        assert_reset(server)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)


def test_a_failure_of_the_proxy_itself_does_not_go_unnoticed(listener):
    def broken() -> socket.socket:
        raise RuntimeError("no sockets today")

    proxy = Proxy(address_of(listener), make_socket=broken)
    assert_refused_late(proxy)
    with pytest.raises(RuntimeError, match="the proxy failed") as failure:
        proxy.close()
    assert "no sockets today" in str(failure.value.__cause__)
