"""What both ends of a gRPC connection agree on: sizes, keepalive, and how errors travel.

One table maps our errors to status codes and back. An error arrives as the class of the table's
row it left by, so the caller still knows whether to retry, to mend a setting or to alarm.
"""

from __future__ import annotations

import ssl

import grpc

from fedml import __version__
from fedml.errors import (
    ConfigError,
    FedmlError,
    OtherVersion,
    PermissionDenied,
    Refused,
    Unreachable,
    Untrusted,
)
from fedml.identity.clocks import is_issued_by
from fedml.protocol.codec import MAX_MESSAGE, PROTOCOL
from fedml.transport.flow import PATIENCE

_LOOK = 5.0  # seconds
Options = list[tuple[str, int]]

_SIZES: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
]
_KEEPALIVE: Options = [
    # Also what the kernel waits for an answer to what it sent: on a slow line that may be long.
    ("grpc.keepalive_timeout_ms", int(PATIENCE * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CLIENT_OPTIONS: Options = [
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.keepalive_time_ms", 20_000),
    # A link decides itself when to try again; the channel shall not sit out a long pause.
    ("grpc.initial_reconnect_backoff_ms", 200),
    # Despite its name, how long a handshake may take: long at a far site, or when hundreds dial.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]
SERVER_OPTIONS: Options = [
    *_SIZES,
    *_KEEPALIVE,
    # Beats tell sooner who fell silent; this only clears away, and a thousand sites feel it.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a shared port
    ("grpc.max_concurrent_streams", 64),
]

_TABLE: tuple[tuple[type[FedmlError], grpc.StatusCode], ...] = (  # first match wins
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (Unreachable, grpc.StatusCode.UNAVAILABLE),
    (Untrusted, grpc.StatusCode.DATA_LOSS),
    (Refused, grpc.StatusCode.FAILED_PRECONDITION),
    (FedmlError, grpc.StatusCode.FAILED_PRECONDITION),
)
_FOREIGN: dict[grpc.StatusCode, type[FedmlError]] = {  # codes that gRPC itself gives
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Refused,
}
_BACK = {code: kind for kind, code in reversed(_TABLE)} | {
    grpc.StatusCode.FAILED_PRECONDITION: Refused
}


def shown_certificate(address: str, ca: bytes) -> bytes | None:
    """Return the certificate (PEM) that is shown at `address`, valid now or not, if `ca` issued it.

    For a word on a handshake that failed, and for nothing else. Blocks for seconds at most.
    """
    host, _, port = address.rpartition(":")
    try:
        shown = ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=_LOOK).encode()
    except (OSError, ValueError):
        return None
    return shown if is_issued_by(shown, ca) else None


def status_of(error: FedmlError) -> tuple[grpc.StatusCode, str]:
    """Return the status code and the text by which `error` travels."""
    code = next(code for kind, code in _TABLE if isinstance(error, kind))
    return code, str(error)[:2000]


def error_of(address: str, error: grpc.RpcError) -> FedmlError:
    """Return the error that a failed call to `address` stands for.

    Codes of no row (cancelled, timed out, a peer that broke off) mean the call may be repeated.
    """
    assert isinstance(error, grpc.aio.AioRpcError)
    code, text = error.code(), error.details() or error.code().name
    if "CERTIFICATE_VERIFY_FAILED" in text or "Hostname Verification" in text:
        return Untrusted(
            f"{address} showed a certificate that our authority did not give to that name; "
            "check the address"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return OtherVersion(
            f"coordinator at {address} does not know a call of {PROTOCOL}, as fedml {__version__} "
            "speaks it: install one major version on both ends, and the newer minor one there"
        )
    kind = _FOREIGN.get(code) or _BACK.get(code, Unreachable)
    if kind is Unreachable:
        return Unreachable(f"coordinator at {address}: {text}")
    return kind(text)
