"""The streams of tensors on the wire, without a copy per field.

Bytes are those of the protobuf messages in `proto/federation.proto`, so generated code in any
language understands them; only the encoding and decoding here are by hand. Protobuf's own would
copy a chunk once more on either side, which costs a third of the throughput.

    Chunk              08 blob  10 offset  1A length data  21 checksum (8 bytes, little-endian)
    PushUpdateRequest  0A length UpdateHeader   or   12 length Chunk
"""

from collections.abc import Callable
from typing import Any

import grpc

from fedpruner_common.chunks import Chunk
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.pb.federation_pb2_grpc import (
    FederationStub,
    add_FederationServicer_to_server,
)

_SERVICE = "fedpruner.v1.Federation"
_BLOB, _OFFSET, _DATA, _CHECKSUM = 0x08, 0x10, 0x1A, 0x21
_CHUNK_FIELD = 0x12  # of PushUpdateRequest
_CHECKSUM_BYTES = 8
_MAX_VARINT_BYTES = 10

Upload = pb.UpdateHeader | Chunk


class Undecodable(ValueError):
    """Bytes that are not such a message."""


def encode_chunk(chunk: Chunk) -> bytes:
    """The protobuf bytes of a chunk."""
    return b"".join(_parts(chunk))


def decode_chunk(message: bytes | memoryview) -> Chunk:
    """The chunk in protobuf bytes; its data is a view of them.

    Raises:
        Undecodable: they are not a chunk.
    """
    view = memoryview(message)
    values = {_BLOB: 0, _OFFSET: 0, _CHECKSUM: 0}
    data: bytes | memoryview = b""
    position, end = 0, len(view)
    while position < end:
        tag = view[position]
        position += 1
        if tag in (_BLOB, _OFFSET):
            values[tag], position = _varint(view, position)
        elif tag == _DATA:
            length, position = _varint(view, position)
            data = view[position : position + length]
            position += length
        elif tag == _CHECKSUM:
            values[tag] = int.from_bytes(view[position : position + _CHECKSUM_BYTES], "little")
            position += _CHECKSUM_BYTES
        else:
            raise Undecodable(f"a chunk with a field of tag {tag}")
    if position != end:
        raise Undecodable("a chunk that ends in the middle of a field")
    return Chunk(values[_BLOB] & 0xFFFFFFFF, values[_OFFSET], data, values[_CHECKSUM])


def encode_upload(message: Upload) -> bytes:
    """The protobuf bytes of a PushUpdateRequest with this header or chunk."""
    if not isinstance(message, Chunk):
        encoded: bytes = pb.PushUpdateRequest(header=message).SerializeToString()
        return encoded
    parts = _parts(message)
    return b"".join((bytes((_CHUNK_FIELD,)), _encoded(sum(map(len, parts))), *parts))


def decode_upload(message: bytes) -> Upload:
    """The header or chunk in the protobuf bytes of a PushUpdateRequest.

    Raises:
        Undecodable: they are neither.
    """
    view = memoryview(message)
    if len(view) and view[0] == _CHUNK_FIELD:
        length, position = _varint(view, 1)
        if position + length != len(view):
            raise Undecodable("an upload message that does not end with its chunk")
        return decode_chunk(view[position:])
    request = pb.PushUpdateRequest.FromString(message)
    if request.WhichOneof("message") != "header":
        raise Undecodable("an upload message with neither header nor chunk")
    header: pb.UpdateHeader = request.header
    return header


def _parts(chunk: Chunk) -> tuple[bytes, bytes | memoryview, bytes]:
    head = bytearray()
    for tag, value in ((_BLOB, chunk.blob), (_OFFSET, chunk.offset), (_DATA, len(chunk.data))):
        head.append(tag)
        head += _encoded(value)
    tail = bytes((_CHECKSUM,)) + chunk.checksum.to_bytes(_CHECKSUM_BYTES, "little")
    return bytes(head), chunk.data, tail


def _encoded(value: int) -> bytes:
    """A varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    """The number at a position, at most 64 bits of it, and where it ends."""
    value = 0
    for shift, byte in enumerate(view[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position + shift + 1
    raise Undecodable("a number without an end")


def federation_stub(channel: grpc.Channel) -> FederationStub:
    """The generated stub, with this module's codec for what carries tensors."""
    stub: FederationStub = FederationStub(channel)  # type: ignore[no-untyped-call]
    for name, request in (
        ("FetchBlobs", pb.FetchBlobsRequest),
        ("FetchAdapter", pb.FetchAdapterRequest),
    ):
        method = channel.unary_stream(
            f"/{_SERVICE}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=decode_chunk,
        )
        setattr(stub, name, method)
    stub.PushUpdate = channel.stream_unary(
        f"/{_SERVICE}/PushUpdate",
        request_serializer=encode_upload,
        response_deserializer=pb.PushUpdateReply.FromString,
    )
    return stub


def add_federation(servicer: Any, server: Any) -> None:
    """Have a server answer the federation's calls, those that carry tensors with this codec.

    Args:
        servicer: its FetchBlobs and FetchAdapter yield chunks, its PushUpdate gets a header and
            then chunks; the others are as generated.
        server: of grpc or grpc.aio.
    """

    def fetch(behaviour: Callable[..., Any], request: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_stream_rpc_method_handler(
            behaviour,
            request_deserializer=request.FromString,
            response_serializer=encode_chunk,
        )

    handlers = {
        "FetchBlobs": fetch(servicer.FetchBlobs, pb.FetchBlobsRequest),
        "FetchAdapter": fetch(servicer.FetchAdapter, pb.FetchAdapterRequest),
        "PushUpdate": grpc.stream_unary_rpc_method_handler(
            servicer.PushUpdate,
            request_deserializer=decode_upload,
            response_serializer=pb.PushUpdateReply.SerializeToString,
        ),
    }
    # Of generic handlers the first that knows a method answers it, of registered ones the last;
    # registered ones come before generic ones where gRPC is new enough to have them.
    generic = grpc.method_handlers_generic_handler(_SERVICE, handlers)
    server.add_generic_rpc_handlers((generic,))
    add_FederationServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    server.add_registered_method_handlers(_SERVICE, handlers)
