"""Hosts of a test's own on one machine: network namespaces, and a router between them in Python.

Every host has one TUN device, whose packets this process reads, delays, loses or passes on. So
no kernel module is needed (many kernels have no netem), no package (nsenter is in util-linux), and
nothing has a name or a mount: a namespace lives as long as a file descriptor of this process and
the programs in it, and cannot outlive a killed test. The machine's own network is not touched.

It carries some 100 MB/s at most, less on a busy machine: for what is right, not for how fast.
"""

import contextlib
import ctypes
import fcntl
import functools
import heapq
import itertools
import os
import random
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, TypeVar

_CLONE_NEWNET = 0x40000000
_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000  # linux/if_tun.h
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C  # linux/sockios.h
_SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8922, 0x8943
_IFF_UP = 0x1
_QUEUE_PACKETS = 10_000
_PREFIX = "198.18.0"  # kept free for tests of networks, RFC 2544
_MAX_PACKET_BYTES = 65536
_BURST = 64
_END_S = 10.0

T = TypeVar("T")


@dataclass
class Link:
    """The way from one host to another. Settings may be changed at any time, by any thread.

    Attributes:
        delay_s: added to every packet that sets out from now on.
        loss: share of packets that get lost, 0 to 1.
        bytes_per_s: rate, headers included; None: as fast as it can.
        queue_s: a packet that would wait longer than this for its turn is dropped.
        is_cut: every packet is lost without a word, those under way too.
        num_carried: packets delivered so far.
        num_dropped: packets lost so far, for whatever reason.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float | None = None
    queue_s: float = 0.25
    is_cut: bool = False
    num_carried: int = 0
    num_dropped: int = 0
    _free_at_s: float = 0.0
    _counted: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def wait_for(self, *, carried: int = 0, dropped: int = 0, timeout_s: float = 30.0) -> None:
        """Block until at least so many packets, counted from the beginning, were dealt with so.

        Raises:
            TimeoutError: fewer were; the message says how many.
        """
        with self._counted:
            if not self._counted.wait_for(
                lambda: self.num_carried >= carried and self.num_dropped >= dropped, timeout_s
            ):
                raise TimeoutError(
                    f"expected {carried} packets carried and {dropped} dropped within "
                    f"{timeout_s} s; so far {self.num_carried} and {self.num_dropped}"
                )

    def _count(self, *, carried: int = 0, dropped: int = 0) -> None:
        with self._counted:
            self.num_carried += carried
            self.num_dropped += dropped
            self._counted.notify_all()


class Host:
    """A network namespace with one address. Made by `Net`.

    Attributes:
        name: as given to `Net`.
        address: its IPv4 address on the test's network; loopback is up, too.
        prefix: put before a command, runs it in here, with the process id that Popen says; for
            programs that are started otherwise than by `popen`, while the `Net` is open.
    """

    def __init__(self, name: str, address: str, mtu: int) -> None:
        self.name, self.address = name, address
        self.processes: list[subprocess.Popen[Any]] = []
        self.namespace_fd, self.tun_fd = _in_thread(lambda: _make_namespace(address, mtu))
        path = f"--net=/proc/{os.getpid()}/fd/{self.namespace_fd}"
        self.prefix = [shutil.which("nsenter") or "nsenter", path, "--"]

    def popen(self, argv: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Run a program in here; `Net.close` ends it.

        Without another `env` it gets ours less the proxies, which cannot be reached from here;
        without another `stdin` it gets none. It leads a session of its own.
        """
        options.setdefault("env", _without_proxies(os.environ))
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("start_new_session", True)
        process = subprocess.Popen([*self.prefix, *argv], **options)
        self.processes.append(process)
        return process

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the test's own process whose network is the one in here."""

        def make() -> socket.socket:
            _check(_libc().setns(self.namespace_fd, _CLONE_NEWNET), "setns")
            return socket.socket(socket.AF_INET, kind)

        return _in_thread(make)

    def end(self) -> None:
        """End the programs that `popen` started, the last one first."""
        while self.processes:
            process = self.processes.pop()
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def close(self) -> None:
        """Let go of the namespace, which is gone with the last program in it."""
        for fd in (self.tun_fd, self.namespace_fd):
            os.close(fd)


class Net:
    """Hosts that reach each other through a router in a thread, on links that a test breaks.

    `with Net() as net: net["server"].popen(...)`. When it ends, however it ends, its programs,
    devices and namespaces are gone.
    """

    def __init__(
        self,
        names: Sequence[str] = ("server", "agent-0", "agent-1"),
        *,
        mtu: int = 1500,
        seed: int = 0,
    ) -> None:
        """Make the hosts and start to carry packets, with nothing in their way.

        Args:
            names: of the hosts; at most 200.
            mtu: largest packet in bytes; a large one carries more bytes a second.
            seed: of the losses.

        Raises:
            OSError: it cannot be had here; see `why_not`.
        """
        self.hosts: dict[str, Host] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._by_address: dict[bytes, Link] = {}  # source and destination, 4 bytes each
        self._random = random.Random(seed)
        self._heap: list[tuple[float, int, int, bytes, Link]] = []
        self._number = itertools.count()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stop_reader, self._stop_writer = os.pipe()
        try:
            for number, name in enumerate(names, start=2):
                self.hosts[name] = Host(name, f"{_PREFIX}.{number}", mtu)
            for a, b in itertools.permutations(self.hosts.values(), 2):
                link = self._links[a.name, b.name] = Link()
                self._by_address[socket.inet_aton(a.address) + socket.inet_aton(b.address)] = link
            self._thread = threading.Thread(target=self._route, name="netbed", daemon=True)
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Net":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def link(self, source: str, target: str) -> Link:
        """The way from one host to another; the way back is another link."""
        return self._links[source, target]

    def shape(
        self, a: str, b: str, *, both_ways: bool = True, **settings: float | bool | None
    ) -> None:
        """Set attributes of `Link` for the way from `a` to `b`, and the way back."""
        for link in (self.link(a, b), self.link(b, a))[: 2 if both_ways else 1]:
            for name, value in settings.items():
                if name not in ("delay_s", "loss", "bytes_per_s", "queue_s", "is_cut"):
                    raise ValueError(f"a link has no setting {name}")
                setattr(link, name, value)

    def cut(self, a: str, b: str, *, both_ways: bool = True) -> None:
        """Lose everything between two hosts without a word, or only what goes from `a` to `b`."""
        self.shape(a, b, both_ways=both_ways, is_cut=True)

    def mend(self, a: str, b: str) -> None:
        """Undo `cut`, both ways. TCP then sends again what was lost."""
        self.shape(a, b, is_cut=False)

    def close(self) -> None:
        """End the programs, stop the router, remove the hosts; again is no error.

        Raises:
            RuntimeError: the router itself failed at some time, so what it did proves nothing.
        """
        for host in reversed(self.hosts.values()):
            host.end()
        if self._stop_writer != -1:
            os.close(self._stop_writer)
            if self._thread:
                self._thread.join()
            os.close(self._stop_reader)
            self._stop_writer = -1
        for name in list(self.hosts):
            self.hosts.pop(name).close()
        if self._failure:
            failure, self._failure = self._failure, None
            raise RuntimeError("the router failed") from failure

    # The router's thread.

    def _route(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._stop_reader, selectors.EVENT_READ)
                for host in self.hosts.values():
                    selector.register(host.tun_fd, selectors.EVENT_READ)
                self._route_until_stopped(selector)
        except BaseException as error:
            self._failure = error

    def _route_until_stopped(self, selector: selectors.BaseSelector) -> None:
        devices = {socket.inet_aton(h.address): h.tun_fd for h in self.hosts.values()}
        while True:
            while self._heap and self._heap[0][0] <= monotonic():
                _, _, device, packet, link = heapq.heappop(self._heap)
                _deliver(device, packet, link)
            wait_s = max(0.0, self._heap[0][0] - monotonic()) if self._heap else None
            for key, _ in selector.select(wait_s):
                if key.fd == self._stop_reader:
                    return
                for _ in range(_BURST):
                    try:
                        packet = os.read(key.fd, _MAX_PACKET_BYTES)
                    except BlockingIOError:
                        break
                    way = self._by_address.get(packet[12:20])
                    if packet[0] >> 4 == 4 and way:  # not IPv6's own chatter, not broadcasts
                        self._send(devices[packet[16:20]], packet, way)

    def _send(self, device: int, packet: bytes, link: Link) -> None:
        """Lose the packet, deliver it, or note when to."""
        now_s = due_s = monotonic()
        if link.is_cut or (link.loss and self._random.random() < link.loss):
            link._count(dropped=1)
            return
        if link.bytes_per_s:
            start_s = max(now_s, link._free_at_s)
            if start_s - now_s > link.queue_s:
                link._count(dropped=1)
                return
            due_s = link._free_at_s = start_s + len(packet) / link.bytes_per_s
        due_s += link.delay_s
        if due_s <= now_s:
            _deliver(device, packet, link)
        else:
            heapq.heappush(self._heap, (due_s, next(self._number), device, packet, link))


def _deliver(device: int, packet: bytes, link: Link) -> None:
    if not link.is_cut:
        with contextlib.suppress(BlockingIOError):
            os.write(device, packet)
            link._count(carried=1)
            return
    link._count(dropped=1)


@functools.cache
def why_not() -> str | None:
    """What keeps a `Net` from being had here, for a test to skip with; None if nothing does."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("nsenter") is None:
        return "no nsenter (package util-linux)"
    if not Path(_TUN).exists():
        return f"no {_TUN}"
    try:
        with Net(("host",)) as net:
            process = net["host"].popen(["true"], stderr=subprocess.PIPE, text=True)
            _, error = process.communicate(timeout=30)
    except OSError as problem:
        return f"no network namespace of our own: {problem}"
    return f"nsenter fails: {error.strip()}" if process.returncode else None


def _without_proxies(environment: "os._Environ[str]") -> dict[str, str]:
    return {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}


def _in_thread(work: Callable[[], T]) -> T:
    """Do it in a thread of its own, which may then go to another namespace: only it does."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="netbed-namespace")
    thread.start()
    thread.join()
    return outcome.result()


def _make_namespace(address: str, mtu: int) -> tuple[int, int]:
    """File descriptors of a new namespace, which this thread then is in, and of its device."""
    _check(_libc().unshare(_CLONE_NEWNET), "unshare")
    with contextlib.ExitStack() as undo:
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        undo.callback(os.close, namespace)
        tun = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
        undo.callback(os.close, tun)
        fcntl.ioctl(tun, _TUNSETIFF, _request("tun0", struct.pack("H", _IFF_TUN | _IFF_NO_PI)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            for device, what, value in (
                ("lo", _SIOCSIFFLAGS, struct.pack("H", _IFF_UP)),
                ("tun0", _SIOCSIFADDR, _internet(address)),
                ("tun0", _SIOCSIFNETMASK, _internet("255.255.255.0")),
                ("tun0", _SIOCSIFMTU, struct.pack("i", mtu)),
                ("tun0", _SIOCSIFTXQLEN, struct.pack("i", _QUEUE_PACKETS)),
                ("tun0", _SIOCSIFFLAGS, struct.pack("H", _IFF_UP)),
            ):
                fcntl.ioctl(control, what, _request(device, value))
        undo.pop_all()
    return namespace, tun


def _request(device: str, value: bytes) -> bytes:
    """A `struct ifreq`, 40 bytes: a name of 16 and the value."""
    return struct.pack("16s24s", device.encode(), value)


def _internet(address: str) -> bytes:
    """A `struct sockaddr_in`."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
