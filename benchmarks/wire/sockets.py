"""The physical limit: the same bytes over a bare socket, between processes of the same kind.

Run as `python -m benchmarks.wire.sockets`; `sides` speaks to it. In the clear the sender uses
`os.sendfile`, so the bytes never enter its memory; with TLS (1.3, Python's `ssl`) it sends 1 MiB
slices of a mapped file. The receiver has one buffer of 1 MiB and writes it to a file where it is
asked to. The connection is there before the clock starts, as an agent's is.
"""

import mmap
import os
import socket
import ssl
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.wire.sides import serve

Json = dict[str, Any]
_BUFFER_BYTES = 1 << 20
_HOST = "127.0.0.1"
_listener: socket.socket | None = None


def listen() -> Json:
    global _listener
    _listener = socket.create_server((_HOST, 0))
    return {"port": _listener.getsockname()[1]}


def _accept(certificate: str | None, key: str | None) -> socket.socket:
    assert _listener is not None
    accepted, _ = _listener.accept()
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if certificate is None:
        return accepted
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    return context.wrap_socket(accepted, server_side=True)


def _connect(port: int, certificates: str | None) -> socket.socket:
    connected = socket.create_connection((_HOST, port))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if certificates is None:
        return connected
    context = ssl.create_default_context(cafile=certificates)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context.wrap_socket(connected, server_hostname=_HOST)


def _send(connection: socket.socket, path: str) -> None:
    with Path(path).open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if not isinstance(connection, ssl.SSLSocket):
            sent = 0
            while sent < num_bytes:
                sent += os.sendfile(connection.fileno(), file.fileno(), sent, num_bytes - sent)
            return
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            for start in range(0, num_bytes, _BUFFER_BYTES):
                with view[start : start + _BUFFER_BYTES] as part:
                    connection.sendall(part)


def _receive(connection: socket.socket, path: str | None, num_bytes: int, *, sync: bool) -> None:
    view = memoryview(bytearray(_BUFFER_BYTES))
    received = 0
    with Path(path).open("wb", buffering=0) if path else nullcontext() as file:
        while received < num_bytes:
            count = connection.recv_into(view)
            if not count:
                raise RuntimeError(f"the sender ended after {received} of {num_bytes} bytes")
            received += count
            if file is not None:
                written = 0
                while written < count:
                    written += file.write(view[written:count])
        if file is not None and sync:
            os.fsync(file.fileno())


def send_down(path: str, certificate: str | None = None, key: str | None = None) -> Json:
    """As the one that is called: send a file as soon as it is asked for."""
    with _accept(certificate, key) as connection:
        connection.recv(1)
        _send(connection, path)
        connection.recv(1)  # the other end has all of it
        cipher = connection.cipher() if isinstance(connection, ssl.SSLSocket) else None
    return {"cipher": cipher}


def take_down(port: int, num_bytes: int, path: str | None, certificates: str | None = None) -> Json:
    """As the one that calls: ask for it; the time until it is here."""
    with _connect(port, certificates) as connection:
        begin = time.perf_counter()
        connection.sendall(b"?")
        _receive(connection, path, num_bytes, sync=False)
        seconds = time.perf_counter() - begin
        connection.sendall(b"!")
    return {"seconds": seconds, "bytes": num_bytes}


def take_up(
    num_bytes: int,
    path: str | None,
    certificate: str | None = None,
    key: str | None = None,
    sync: bool = False,
) -> Json:
    """As the one that is called: take a file and say when it is there."""
    with _accept(certificate, key) as connection:
        _receive(connection, path, num_bytes, sync=sync)
        connection.sendall(b"!")
    return {}


def send_up(port: int, path: str, certificates: str | None = None) -> Json:
    """As the one that calls: send a file; the time until the other end says it is there."""
    with _connect(port, certificates) as connection:
        begin = time.perf_counter()
        _send(connection, path)
        connection.recv(1)
        return {"seconds": time.perf_counter() - begin, "bytes": Path(path).stat().st_size}


if __name__ == "__main__":
    serve(
        {
            "listen": listen,
            "send_down": send_down,
            "take_down": take_down,
            "take_up": take_up,
            "send_up": send_up,
        }
    )
