"""Exception <-> gRPC status, both directions, one table.

Status alone cannot tell two FAILED_PRECONDITIONs apart, so the exception's stable `code` travels in
trailing metadata and the same exception is raised again on the other side.
"""

import grpc

from fedpruner_common.errors import (
    BudgetTooSmall,
    Busy,
    CorruptChunk,
    FedPrunerError,
    Forbidden,
    InvalidUpdate,
    NotFound,
    StaleRound,
    Unauthenticated,
    Unavailable,
    UnknownClient,
)

CODE_KEY = "fedpruner-code"

_STATUS: dict[type[FedPrunerError], grpc.StatusCode] = {
    InvalidUpdate: grpc.StatusCode.INVALID_ARGUMENT,
    BudgetTooSmall: grpc.StatusCode.FAILED_PRECONDITION,
    StaleRound: grpc.StatusCode.ABORTED,
    UnknownClient: grpc.StatusCode.NOT_FOUND,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CorruptChunk: grpc.StatusCode.DATA_LOSS,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}
_BY_CODE = {error.code: error for error in _STATUS}
# What an error without our code means: raised by gRPC itself, or by something in between.
_BY_STATUS = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,  # the stream ended with its connection, or stalled
    grpc.StatusCode.UNKNOWN: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Busy,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
}


def status_of(error: FedPrunerError) -> grpc.StatusCode | None:
    """The gRPC status an exception travels as; None for those that must not travel."""
    return _STATUS.get(type(error))


def error_of(rpc_error: grpc.RpcError) -> FedPrunerError:
    """The exception that a failed call stands for, rebuilt from its code and message."""
    metadata = dict(rpc_error.trailing_metadata() or ())
    known = _BY_CODE.get(str(metadata.get(CODE_KEY)))
    error = known or _BY_STATUS.get(rpc_error.code(), FedPrunerError)
    return error(rpc_error.details() or str(rpc_error.code()))
