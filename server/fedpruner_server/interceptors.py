"""Around every RPC: errors become statuses, here and nowhere else."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from fedpruner_common.errors import FedPrunerError, Unavailable
from fedpruner_common.log import get_logger
from fedpruner_common.status import CODE_KEY, status_of
from fedpruner_server.storage import is_about_disk

_log = get_logger()


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Answers a FedPrunerError with its status and code, and a bug with a fixed text."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        if handler.response_streaming:
            return _rebuilt(handler, _guard_stream(handler, details.method))
        return _rebuilt(handler, _guard_unary(handler, details.method))


def _rebuilt(handler: Any, behaviour: Callable[..., Any]) -> Any:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


def _guard_unary(handler: Any, method: str) -> Callable[..., Any]:
    inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

    async def call(request: Any, context: Any) -> Any:
        try:
            return await inner(request, context)
        except Exception as error:
            await _abort(error, context, method)

    return call


def _guard_stream(handler: Any, method: str) -> Callable[..., Any]:
    async def call(request: Any, context: Any) -> None:
        try:
            messages = handler.unary_stream(request, context)
            if inspect.isawaitable(messages):
                messages = await messages
            if messages is None:  # it has written itself, as gRPC's own health does
                return
            async with aclosing(messages):
                async for message in messages:
                    if not await _write(message, messages, context):
                        return
        except Exception as error:
            await _abort(error, context, method)

    return call


async def _write(message: Any, messages: Any, context: Any) -> bool:
    """Whether there is still a reader to send to."""
    try:
        await context.write(message)
        return True
    except grpc.aio.BaseError:
        return False
    except asyncio.CancelledError as error:
        # Whoever watches over the stream knows why: a reader that takes nothing, for example.
        await messages.athrow(error)
        raise


async def _abort(error: Exception, context: Any, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = status_of(error) if isinstance(error, FedPrunerError) else None
    if is_about_disk(error):
        # The caller does nothing wrong and loses nothing by asking again later.
        _log.error("cannot store", method=method, reason=str(error))
        metadata = ((CODE_KEY, Unavailable.code),)
        text = "the coordinator cannot write to its disk; its log has the details"
        await context.abort(grpc.StatusCode.UNAVAILABLE, text, metadata)
    # Local errors (settings, models) tell of the coordinator's machine: they stay in its log.
    if isinstance(error, FedPrunerError) and status is not None:
        _log.debug("refused", method=method, code=error.code, reason=str(error))
        metadata = ((CODE_KEY, error.code),)
        await context.abort(status, str(error), metadata)
    _log.error("bug in an RPC method", method=method, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, "internal error; the coordinator's log has the details"
    )
