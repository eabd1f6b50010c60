"""How both ends open the wire: options, deadlines, credentials. Every number with its reason."""

from pathlib import Path

import grpc

from fedpruner_common.errors import ConfigError

KEEPALIVE_S = 30.0  # NAT tables forget idle flows after 30 to 300 s
_MAX_PING_TIMEOUT_S = 10.0

Options = list[tuple[str, int]]


def _common_options(keepalive_s: float) -> Options:
    timeout_ms = int(1000 * min(_MAX_PING_TIMEOUT_S, keepalive_s))
    return [
        # Chunks are 1 MiB; the default 4 MiB limit stays, it is what bounds a hostile message.
        ("grpc.max_receive_message_length", 4 << 20),
        ("grpc.keepalive_time_ms", int(1000 * keepalive_s)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # Without this one the timeout above does not bound a peer that hangs.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def channel_options(keepalive_s: float = KEEPALIVE_S) -> Options:
    """Of an agent's channel: it pings after so long without a word, also while nothing goes on."""
    return [
        *_common_options(keepalive_s),
        ("grpc.http2.max_pings_without_data", 0),
        # gRPC's own pause before it connects again grows to two minutes; ours is in `retry`.
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]


def server_options(keepalive_s: float = KEEPALIVE_S) -> Options:
    """Of the coordinator: it pings as agents do, and may be pinged three times as often."""
    return [
        *_common_options(keepalive_s),
        # Below the agents' ping interval, or their pings are answered with GOAWAY. The option
        # named min_recv_ping_interval is silently ignored.
        ("grpc.http2.min_ping_interval_without_data_ms", int(1000 * keepalive_s / 3)),
        # With port reuse, gRPC's default, a second coordinator would share the port silently.
        ("grpc.so_reuseport", 0),
    ]


UNARY_TIMEOUT_S = 30.0
# How long a pull is held open. A quiet wait costs nothing; below NAT and proxy idle limits.
PULL_WAIT_S = 20
# Heartbeats in one lease: six, so that a busy 2-core board that misses a few is not lost.
HEARTBEATS_PER_LEASE = 6

_LOOPBACK = ("127.", "localhost", "[::1]", "unix:")


def is_loopback(address: str) -> bool:
    """Whether an address can only be reached from this machine."""
    return address.startswith(_LOOPBACK)


def open_channel(
    address: str,
    *,
    root_certificates: Path | None = None,
    insecure: bool = False,
    keepalive_s: float = KEEPALIVE_S,
) -> grpc.Channel:
    """A channel to the coordinator, TLS unless `insecure`.

    Raises:
        ConfigError: neither certificates nor `insecure` for an address off this machine.
    """
    options = channel_options(keepalive_s)
    if insecure or (root_certificates is None and is_loopback(address)):
        return grpc.insecure_channel(address, options=options)
    if root_certificates is None:
        raise ConfigError(
            f"{address} is not this machine: give --root-certificates CA.pem for TLS, "
            "or --insecure to send everything in the clear"
        )
    credentials = grpc.ssl_channel_credentials(root_certificates.read_bytes())
    return grpc.secure_channel(address, credentials, options=options)


def server_credentials(certfile: Path, keyfile: Path) -> grpc.ServerCredentials:
    """TLS for the coordinator from PEM files."""
    return grpc.ssl_server_credentials([(keyfile.read_bytes(), certfile.read_bytes())])
