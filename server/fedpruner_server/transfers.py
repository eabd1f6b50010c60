"""How many transfers at once, how fast, and which of them have stalled.

Memory per transfer is bounded by chunks and flow control, so bounding their number bounds the
coordinator's memory, however many devices there are. Uploads are let in by `OpenUpload` before a
byte is sent: a limit inside the upload's own handler would come after gRPC has buffered its first
megabytes.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

from fedpruner_common.chunks import Chunk, make_chunk
from fedpruner_common.errors import Busy, Unavailable

_BEGIN_S = 30.0  # a slot that nobody begins to use for so long is somebody else's
_LOOKS_PER_IDLE = 4
_STILL_WAITING_S = 10.0  # between signs of life to those who wait
_NOTHING = make_chunk(b"", blob=0, offset=0)


@contextmanager
def watched(idle_s: float) -> Iterator["Pulse"]:
    """Ends what happens within the `with` block when the pulse has not beaten for so long.

    Raises:
        Unavailable: it did stop.
    """
    pulse = Pulse(idle_s)
    try:
        yield pulse
    except asyncio.CancelledError:
        if pulse.stopped:
            reason = f"nothing has moved for {idle_s:g} s: the transfer was ended"
            raise Unavailable(reason) from None
        raise
    finally:
        pulse.close()


class Pulse:
    """A sign of life of one transfer; see `watched`.

    Attributes:
        stopped: it has been missed.
    """

    def __init__(self, idle_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._idle_s = idle_s
        self._last = self._loop.time()
        self._look_again()
        self.stopped = False

    def beat(self) -> None:
        """Something moved."""
        self._last = self._loop.time()

    def close(self) -> None:
        self._timer.cancel()

    def _look_again(self) -> None:
        self._timer = self._loop.call_later(self._idle_s / _LOOKS_PER_IDLE, self._look)

    def _look(self) -> None:
        if self._loop.time() - self._last < self._idle_s:
            self._look_again()
            return
        self.stopped = True
        assert self._task is not None
        self._task.cancel()


class Pace:
    """Slows a transfer down to a rate."""

    def __init__(self, bytes_per_s: float) -> None:
        """Begin now; 0 is as fast as it goes."""
        self._bytes_per_s = bytes_per_s
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._num_bytes = 0

    async def moved(self, num_bytes: int) -> None:
        """Wait until so many bytes more are within the rate."""
        if not self._bytes_per_s:
            return
        self._num_bytes += num_bytes
        ahead_s = self._num_bytes / self._bytes_per_s - (self._loop.time() - self._began)
        if ahead_s > 0:
            await asyncio.sleep(ahead_s)


class UploadSlots:
    """Who may upload now; first come, first served."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._granted: dict[str, asyncio.TimerHandle | None] = {}  # no timer: the upload has begun
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()
        self._active: dict[str, asyncio.Task[Any]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def acquire(self, client_id: str, *, wait_s: float) -> bool:
        """Whether a client got a slot, or has one, within so long."""
        full = self._waiting or len(self._granted) >= self._num_slots
        if client_id not in self._granted and full:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((client_id, turn))
            try:
                await asyncio.wait_for(turn, wait_s)
            except asyncio.TimeoutError:
                return False
            finally:
                self._waiting = deque(w for w in self._waiting if w[1] is not turn)
        if client_id not in self._active:
            self._grant(client_id)
        return True

    def _grant(self, client_id: str) -> None:
        """Give or keep a slot that must be used soon."""
        timer = self._granted.get(client_id)
        if timer is not None:
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._granted[client_id] = loop.call_later(_BEGIN_S, self._release, client_id)

    def _release(self, client_id: str) -> None:
        timer = self._granted.pop(client_id, None)
        if timer is not None:
            timer.cancel()
        self._let_in()

    def _let_in(self) -> None:
        """Give free slots to those who have waited longest."""
        while self._waiting and len(self._granted) < self._num_slots:
            client_id, turn = self._waiting.popleft()
            if not turn.done():
                self._grant(client_id)
                turn.set_result(None)

    @asynccontextmanager
    async def use(self, client_id: str) -> AsyncIterator[None]:
        """An upload within the client's slot. An older one of the same client is ended first: its
        connection is most likely dead, and nobody has noticed yet.

        Raises:
            Busy: it has no slot.
        """
        if client_id not in self._granted:
            raise Busy("ask for an upload slot first")
        timer = self._granted[client_id]
        if timer is not None:
            timer.cancel()
        self._granted[client_id] = None
        older = self._active.get(client_id)
        task = asyncio.current_task()
        assert task is not None
        self._active[client_id] = task
        if older is not None:
            older.cancel()
            await asyncio.wait({older})
        try:
            yield
        finally:
            if self._active.get(client_id) is task:
                del self._active[client_id]
                self._release(client_id)


class Downloads:
    """Bounds what goes down: how many streams at once, and how fast each."""

    def __init__(self, num_streams: int, *, bytes_per_s: float, idle_s: float) -> None:
        self._free = asyncio.Semaphore(num_streams)
        self._bytes_per_s = bytes_per_s
        self._idle_s = idle_s

    async def in_turn(
        self,
        chunks: AsyncGenerator[Chunk, None],
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> AsyncIterator[Chunk]:
        """The same chunks when their turn has come; empty ones while they wait for it.

        A reader that takes nothing for too long is hung up on: its task is cancelled, and what this
        makes of it, if it is told, says why.

        Args:
            chunks: to send.
            on_bytes: is told the size of each, 0 while they wait.
        """
        async for _ in self._turn():
            on_bytes(0)
            yield _NOTHING
        try:
            with watched(self._idle_s) as pulse:
                pace = Pace(self._bytes_per_s)
                async with aclosing(chunks):
                    async for chunk in chunks:
                        on_bytes(len(chunk.data))
                        yield chunk
                        pulse.beat()
                        await pace.moved(len(chunk.data))
        finally:
            self._free.release()

    async def _turn(self) -> AsyncIterator[None]:
        """Ends when a stream may begin; yields now and then until it does."""
        free = asyncio.ensure_future(self._free.acquire())
        try:
            while not free.done():
                await asyncio.wait({free}, timeout=_STILL_WAITING_S)
                if not free.done():
                    yield
        except BaseException:
            if free.done() and not free.cancelled():
                self._free.release()
            free.cancel()
            raise
