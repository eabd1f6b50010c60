"""A TCP proxy between two programs that breaks the network on demand, at the byte a test names.

It works above TCP, so the kernel acknowledges what the proxy has not passed on: a sender sees
silence from its peer, never a missing acknowledgement. For that, and for lost packets, see
`netbed.py`, which needs root; this needs nothing.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

_CHUNK_BYTES = 64 * 1024
_UNDER_WAY_BYTES = 8 * 1024 * 1024  # of one connection and direction, while there is a delay
_RATE_STEP_S = 0.02
_ANSWER_S = 30.0
_END = b""
_RESET = None

T = TypeVar("T")


@dataclass
class _Way:
    """One direction through the proxy, shared by all connections."""

    num_bytes: int = 0
    lost_bytes: int = 0
    limit_bytes: int | None = None
    swallows: bool = False
    free_at_s: float = 0.0

    def is_frozen(self) -> bool:
        return self.limit_bytes is not None and self.num_bytes >= self.limit_bytes


class _Half:
    """One direction of one connection: what was read and is not yet passed on."""

    def __init__(self, way: _Way, source: socket.socket, target: socket.socket) -> None:
        self.way, self.source, self.target = way, source, target
        self.queue: deque[tuple[float, bytes | None]] = deque()  # (due, bytes or end or reset)
        self.queued_bytes = 0
        self.has_read_all = False
        self.has_passed_end = False
        self.has_lost = False
        self.source_is_broken = False
        self.target_is_broken = False

    def put(self, due_s: float, data: bytes | None) -> None:
        self.queue.append((due_s, data))
        self.queued_bytes += len(data or b"")

    def take(self, num_bytes: int) -> None:
        """Remove so many bytes from the front, or a whole end or reset."""
        due_s, data = self.queue.popleft()
        self.queued_bytes -= num_bytes
        if data and num_bytes < len(data):
            self.queue.appendleft((due_s, data[num_bytes:]))


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket, up: _Way, down: _Way) -> None:
        self.client, self.server = client, server
        self.up, self.down = _Half(up, client, server), _Half(down, server, client)
        self.over = asyncio.Event()
        self.is_reset = False
        self.is_forgotten = False
        self.forwarded_at_s = asyncio.get_running_loop().time()
        self.task: asyncio.Task[None] | None = None
        self._change = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        self._change.set_result(None)
        self._change = asyncio.get_running_loop().create_future()

    async def change(self, timeout_s: float | None = None) -> None:
        """Wait until something about this connection, or a setting, is different."""
        await asyncio.wait([self._change], timeout=timeout_s)

    def has_lost(self) -> bool:
        return self.up.has_lost or self.down.has_lost


class Proxy:
    """Passes TCP connections on to `target`; `up` is from the client to it, `down` is back.

    Every control may be called from any thread; when it returns, it holds for live and for new
    connections. `cut`, `swallow` and `freeze` last until `mend`; each call of the last two says it
    for both directions. Where both hold for one, bytes are lost rather than kept.

    What cannot be had above TCP: a client's connect succeeds in the kernel before the proxy knows
    of it. Where a handshake could not come through, the connection is accepted and goes nowhere:
    for good while a direction is swallowed, until `mend` while one is frozen. If nobody listens at
    the target, the client gets a reset after its connect. `delay_s` does not delay the handshake.

    Attributes:
        address: `127.0.0.1:port`, the same for the proxy's whole life, cuts included.
        target: `host:port` for new connections; may be set, as when a server comes back elsewhere.
    """

    def __init__(
        self,
        target: str,
        *,
        idle_cut_s: float | None = None,
        bytes_per_s: float | None = None,
        delay_s: float = 0.0,
        make_socket: Callable[[], socket.socket] = socket.socket,
    ) -> None:
        """Listen.

        Args:
            target: `host:port`.
            idle_cut_s: see the property, as for the next two.
            bytes_per_s: rate of each direction.
            delay_s: latency of each direction.
            make_socket: makes the sockets towards the target; `netbed.Host.socket` gives the
                test's process a door into a host's network namespace.
        """
        self.target = target
        self._make_socket = make_socket
        self._up, self._down = _Way(), _Way()
        self._idle_cut_s, self._bytes_per_s, self._delay_s = None, None, 0.0
        self._num_connections = 0
        self._num_forgotten = 0
        self._counted = threading.Condition()
        self._connections: set[_Connection] = set()
        self._failures: list[BaseException] = []
        self._is_cut = False
        # Keeps the port for us while nobody listens there.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._holder.getsockname())
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(
            lambda _, about: self._failures.append(
                about.get("exception") or RuntimeError(about["message"])
            )
        )
        self._listener = self._listen()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.idle_cut_s, self.bytes_per_s, self.delay_s = idle_cut_s, bytes_per_s, delay_s

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset all connections and stop; again is no error.

        Raises:
            RuntimeError: the proxy itself failed at some time, so what it did proves nothing.
        """
        if self._loop.is_closed():
            return
        self._do(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ANSWER_S)
        self._holder.close()
        self._loop.close()
        if self._failures:
            raise RuntimeError("the proxy failed") from self._failures[0]

    # What a test does to the network.

    def cut(self) -> None:
        """Reset all connections (RST to both ends) and refuse new ones until `mend`."""
        self._do(self._cut())

    def swallow(self, *, up: bool = True, down: bool = True) -> None:
        """Partition the network silently: bytes that way are read and thrown away until `mend`.

        So are ends and resets of connections, and what `delay_s` still kept under way. The sender
        never stalls, as it would behind a lost route once its buffers are full. A direction of
        a connection that has lost something passes nothing on any more.
        """
        self._do(self._swallow(up, down))

    def freeze(self, *, up: bool = True, down: bool = True) -> None:
        """Stall: nothing goes that way until `mend`, and nothing is lost.

        Of each connection and direction the proxy keeps 64 KiB, or 8 MiB if there is a delay, and
        reads no more, so senders stall when the kernel's buffers are full, too.
        """
        self._do(self._freeze(0 if up else None, 0 if down else None))

    def freeze_at(self, *, up: int | None = None, down: int | None = None) -> None:
        """Stall as `freeze` does, once exactly so many bytes in all went that way (None: never).

        With `wait_for_bytes` of the same number, a test is in the middle of a transfer for sure.
        """
        self._do(self._freeze(up, down))

    def mend(self) -> None:
        """Undo `cut`, `swallow` and `freeze`.

        Connections that lost something while swallowed are reset: a proxy cannot make good a lost
        byte. Those that were silent all the time live on; those cut for idling stay forgotten.
        """
        self._do(self._mend())

    @property
    def idle_cut_s(self) -> float | None:
        """Silence after which a connection is forgotten, as from a NAT's table; None: never.

        From then on whatever comes is thrown away, and neither end hears anything, not even of the
        other's end. New connections work.
        """
        return self._idle_cut_s

    @idle_cut_s.setter
    def idle_cut_s(self, value: float | None) -> None:
        self._do(self._set(_idle_cut_s=_positive("idle_cut_s", value)))

    @property
    def bytes_per_s(self) -> float | None:
        """Rate of each direction, which all connections share; None: as fast as it can."""
        return self._bytes_per_s

    @bytes_per_s.setter
    def bytes_per_s(self, value: float | None) -> None:
        self._do(self._set(_bytes_per_s=_positive("bytes_per_s", value)))

    @property
    def delay_s(self) -> float:
        """Latency added each way; bytes already under way keep theirs."""
        return self._delay_s

    @delay_s.setter
    def delay_s(self, value: float) -> None:
        if value < 0:
            raise ValueError(f"delay_s must not be negative, got {value}")
        self._do(self._set(_delay_s=value))

    # What a test sees.

    @property
    def connections(self) -> int:
        """Connections accepted so far."""
        return self._num_connections

    @property
    def open_connections(self) -> int:
        """Connections the proxy still holds, forgotten ones included."""
        return len(self._connections)

    @property
    def forgotten(self) -> int:
        """Connections forgotten so far because they were idle."""
        return self._num_forgotten

    @property
    def bytes_up(self) -> int:
        """Bytes handed to the target's side so far."""
        return self._up.num_bytes

    @property
    def bytes_down(self) -> int:
        """Bytes handed to the clients' side so far."""
        return self._down.num_bytes

    @property
    def lost_up(self) -> int:
        """Bytes from clients thrown away so far."""
        return self._up.lost_bytes

    @property
    def lost_down(self) -> int:
        """Bytes from the target thrown away so far."""
        return self._down.lost_bytes

    def wait_for_bytes(self, *, up: int = 0, down: int = 0, timeout_s: float = 30.0) -> None:
        """Block until at least so many bytes, counted from the beginning, went that way.

        Raises:
            TimeoutError: fewer did; the message says how many.
        """
        self._wait_for(
            lambda: self.bytes_up >= up and self.bytes_down >= down,
            f"{up} bytes up and {down} down",
            timeout_s,
        )

    def wait_for_lost(self, *, up: int = 0, down: int = 0, timeout_s: float = 30.0) -> None:
        """Block until at least so many bytes were thrown away; raises as `wait_for_bytes` does."""
        self._wait_for(
            lambda: self.lost_up >= up and self.lost_down >= down,
            f"{up} lost bytes up and {down} down",
            timeout_s,
        )

    def wait_for_connections(self, num: int, *, timeout_s: float = 30.0) -> None:
        """Block until so many were accepted; raises as `wait_for_bytes` does."""
        self._wait_for(lambda: self.connections >= num, f"{num} connections", timeout_s)

    def wait_for_forgotten(self, num: int, *, timeout_s: float = 30.0) -> None:
        """Block until so many connections were forgotten; raises as `wait_for_bytes` does."""
        self._wait_for(lambda: self.forgotten >= num, f"{num} forgotten connections", timeout_s)

    def _wait_for(self, is_so: Callable[[], bool], what: str, timeout_s: float) -> None:
        with self._counted:
            if not self._counted.wait_for(is_so, timeout_s):
                raise TimeoutError(
                    f"expected {what} within {timeout_s} s; so far {self.bytes_up} bytes up, "
                    f"{self.bytes_down} down, {self.lost_up} lost up, {self.lost_down} lost down, "
                    f"{self.connections} connections, {self.forgotten} forgotten"
                )

    # The rest runs in the proxy's thread.

    def _do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_ANSWER_S)

    async def _cut(self) -> None:
        if not self._is_cut:
            self._is_cut = True
            self._loop.remove_reader(self._listener)
            self._listener.close()
        await self._kill(self._connections)

    async def _swallow(self, up: bool, down: bool) -> None:
        self._up.swallows, self._down.swallows = up, down
        self._wake()

    async def _freeze(self, up: int | None, down: int | None) -> None:
        self._up.limit_bytes, self._down.limit_bytes = up, down
        self._wake()

    async def _mend(self) -> None:
        for way in (self._up, self._down):
            way.swallows, way.limit_bytes = False, None
        await self._kill({c for c in self._connections if c.has_lost() and not c.is_forgotten})
        if self._is_cut:
            self._is_cut = False
            self._listener = self._listen()
        self._wake()

    async def _set(self, **settings: float | None) -> None:
        vars(self).update(settings)
        self._up.free_at_s = self._down.free_at_s = 0.0  # else a very low rate held on
        for connection in self._connections:
            self._watch(connection)
        self._wake()

    def _wake(self) -> None:
        for connection in self._connections:
            connection.wake()

    async def _kill(self, connections: set[_Connection]) -> None:
        tasks = {c.task for c in connections if c.task}
        for connection in connections:
            if connection.task and not connection.is_reset:
                connection.is_reset = True
                connection.task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in list(connections):  # a task that never began has closed nothing
            self._finish(connection)

    def _listen(self) -> socket.socket:
        listener = socket.create_server(self._holder.getsockname(), backlog=128)
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)
        return listener

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = self._listener.accept()
            try:
                server = self._make_socket()
            except BaseException:
                _reset(client)
                raise
            connection = _Connection(client, server, self._up, self._down)
            for end in (client, connection.server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.add(connection)
            connection.task = self._start(connection, self._run(connection))
            self._watch(connection)
            with self._counted:
                self._num_connections += 1
                self._counted.notify_all()

    def _watch(self, connection: _Connection) -> None:
        """Forget it when it has been silent for too long, and look again then if it has not."""
        if self._idle_cut_s is None or connection.is_forgotten:
            return
        left_s = connection.forwarded_at_s + self._idle_cut_s - self._loop.time()
        if left_s > 0:
            self._loop.call_later(left_s, self._watch, connection)
        elif connection in self._connections:
            connection.is_forgotten = True
            connection.wake()
            with self._counted:
                self._num_forgotten += 1
                self._counted.notify_all()

    async def _run(self, connection: _Connection) -> None:
        """One connection's life; its sockets are closed only after nobody watches them."""
        tasks: list[asyncio.Task[None]] = []
        try:
            is_connected = await self._connect(connection)
            for half in (connection.up, connection.down) if is_connected else (connection.up,):
                tasks.append(self._start(connection, self._read(connection, half)))
                tasks.append(self._start(connection, self._write(connection, half)))
            await connection.over.wait()
        except OSError:  # nobody listens at the target
            connection.is_reset = True
        except asyncio.CancelledError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            self._finish(connection)

    def _start(
        self, connection: _Connection, coroutine: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()):
                self._failures.append(error)
                connection.over.set()

        task = self._loop.create_task(coroutine)
        task.add_done_callback(ended)
        return task

    def _finish(self, connection: _Connection) -> None:
        for end in (connection.client, connection.server):
            if connection.is_reset and end.fileno() != -1:
                _reset(end)
            end.close()
        self._connections.discard(connection)

    async def _connect(self, connection: _Connection) -> bool:
        """Reach the target; False if no handshake gets through, ever."""
        ways = (self._up, self._down)
        while any(way.is_frozen() for way in ways):
            if connection.is_forgotten or any(way.swallows for way in ways):
                break
            await connection.change()
        if connection.is_forgotten or any(way.swallows for way in ways):
            connection.up.has_lost = True
            return False
        host, port = self.target.rsplit(":", 1)
        await self._loop.sock_connect(connection.server, (host, int(port)))
        return True

    def _loses(self, connection: _Connection, half: _Half) -> bool:
        return half.has_lost or half.way.swallows or connection.is_forgotten

    async def _read(self, connection: _Connection, half: _Half) -> None:
        """Read from the source into the queue, no faster than the rate and the target allow."""
        way = half.way
        while not half.has_read_all:
            room_bytes = _UNDER_WAY_BYTES if self._delay_s else _CHUNK_BYTES
            if half.queued_bytes >= room_bytes:
                await connection.change()
                continue
            if (wait_s := way.free_at_s - self._loop.time()) > 0:
                await connection.change(wait_s)
                continue
            rate = self._bytes_per_s
            step_bytes = _CHUNK_BYTES if rate is None else max(1, int(rate * _RATE_STEP_S))
            try:
                data: bytes | None = half.source.recv(min(_CHUNK_BYTES, step_bytes))
            except BlockingIOError:
                await self._ready(connection, half.source, is_read=True)
                continue
            except OSError:
                data = _RESET
            if not data:
                half.has_read_all = True
                data = _RESET if half.source_is_broken else data
            now_s = self._loop.time()
            if rate is not None:
                begun_s = max(way.free_at_s, now_s - _RATE_STEP_S)  # makes good a late wake-up
                way.free_at_s = begun_s + len(data or b"") / rate
            half.put(now_s + self._delay_s, data)
            connection.wake()

    async def _write(self, connection: _Connection, half: _Half) -> None:
        """Pass the queue on to the target, or throw it away."""
        while True:
            if not half.queue:
                await connection.change()
                continue
            due_s, data = half.queue[0]
            if self._loses(connection, half):
                half.has_lost = True
                half.take(len(data or b""))
                self._count(half.way, lost_bytes=len(data or b""))
                connection.wake()
                continue
            wait_s = due_s - self._loop.time()
            if half.way.is_frozen() or wait_s > 0:
                await connection.change(wait_s if wait_s > 0 else None)
                continue
            if data is _RESET:
                connection.is_reset = True
                connection.over.set()
                return
            await self._pass_on(connection, half, data)

    async def _pass_on(self, connection: _Connection, half: _Half, data: bytes) -> None:
        limit_bytes = half.way.limit_bytes
        if limit_bytes is not None:
            data = data[: limit_bytes - half.way.num_bytes]
        num_bytes = len(data)
        try:
            if data == _END:
                half.has_passed_end = True
                half.target.shutdown(socket.SHUT_WR)
            elif not half.target_is_broken:
                num_bytes = half.target.send(data)
        except BlockingIOError:
            await self._ready(connection, half.target, is_read=False)
            return
        except OSError:
            self._target_broke(connection, half)
        half.take(num_bytes)
        if not half.target_is_broken:
            connection.forwarded_at_s = self._loop.time()
            self._count(half.way, num_bytes=num_bytes)
        connection.wake()
        if connection.up.has_passed_end and connection.down.has_passed_end:
            connection.over.set()

    def _target_broke(self, connection: _Connection, half: _Half) -> None:
        """Let the reset travel back to the source, behind what the target sent before."""
        half.target_is_broken = True
        back = connection.down if half is connection.up else connection.up
        back.source_is_broken = True
        if back.has_read_all:
            back.put(self._loop.time() + self._delay_s, _RESET)

    async def _ready(self, connection: _Connection, end: socket.socket, *, is_read: bool) -> None:
        """Wait until the socket can be read or written, or anything else has changed."""
        add = self._loop.add_reader if is_read else self._loop.add_writer
        remove = self._loop.remove_reader if is_read else self._loop.remove_writer
        add(end, connection.wake)
        try:
            await connection.change()
        finally:
            remove(end)

    def _count(self, way: _Way, *, num_bytes: int = 0, lost_bytes: int = 0) -> None:
        with self._counted:
            way.num_bytes += num_bytes
            way.lost_bytes += lost_bytes
            self._counted.notify_all()


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and value <= 0:
        raise ValueError(f"{name} must be positive or None, got {value}")
    return value


def _reset(end: socket.socket) -> None:
    """Close without lingering: the kernel sends RST instead of FIN."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
