"""The hand-written codec says what protobuf's own says, both ways."""

import pytest
from google.protobuf.message import DecodeError

from fedpruner_common.chunks import Chunk, make_chunk
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.wire import (
    Undecodable,
    decode_chunk,
    decode_upload,
    encode_chunk,
    encode_upload,
)

CHUNKS = [
    make_chunk(b"hello", blob=0, offset=0),
    make_chunk(b"", blob=3, offset=7),
    make_chunk(bytes(range(256)) * 5, blob=127, offset=128),
    make_chunk(b"x" * 70_000, blob=2**32 - 1, offset=2**64 - 1),
    Chunk(1, 1, b"y", 2**64 - 1),
]
HEADER = pb.UpdateHeader(client_id="a", task_id="t", round=3, rungs=["less"], hash="ab" * 32)


def as_pb(chunk):
    return pb.Chunk(
        blob=chunk.blob, offset=chunk.offset, data=bytes(chunk.data), checksum=chunk.checksum
    )


def same(one, other):
    fields = ("blob", "offset", "checksum")
    return all(getattr(one, f) == getattr(other, f) for f in fields) and one.data == other.data


@pytest.mark.parametrize("chunk", CHUNKS)
def test_protobuf_understands_our_bytes(chunk):
    assert pb.Chunk.FromString(encode_chunk(chunk)) == as_pb(chunk)
    request = pb.PushUpdateRequest.FromString(encode_upload(chunk))
    assert request.WhichOneof("message") == "chunk"
    assert request.chunk == as_pb(chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_we_understand_protobufs_bytes(chunk):
    assert same(decode_chunk(as_pb(chunk).SerializeToString()), chunk)
    request = pb.PushUpdateRequest(chunk=as_pb(chunk))
    assert same(decode_upload(request.SerializeToString()), chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_we_encode_we_decode(chunk):
    assert same(decode_chunk(encode_chunk(chunk)), chunk)
    assert same(decode_upload(encode_upload(chunk)), chunk)


def test_a_view_of_a_buffer_is_sent_as_its_bytes():
    buffer = bytearray(b"abcdef")
    encoded = encode_chunk(make_chunk(memoryview(buffer)[2:4], blob=0, offset=0))
    buffer[:] = b"......"  # is used again
    assert decode_chunk(encoded).data == b"cd"


def test_a_header_travels_as_protobuf_has_it():
    assert decode_upload(encode_upload(HEADER)) == HEADER
    assert encode_upload(HEADER) == pb.PushUpdateRequest(header=HEADER).SerializeToString()


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"\x0a\x00", id="a field that a chunk has not"),
        pytest.param(b"\x1a\x05abc", id="data shorter than it says"),
        pytest.param(b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\x7fabc", id="data of 2^63 bytes"),
        pytest.param(b"\x08" + b"\xff" * 11, id="a number without an end"),
        pytest.param(b"\x08", id="a number that is missing"),
        pytest.param(b"\x21\x01\x02", id="a checksum cut short"),
        pytest.param(b"\x00", id="tag zero"),
    ],
)
def test_bytes_that_are_no_chunk_are_refused(message):
    with pytest.raises(Undecodable):
        decode_chunk(message)
    with pytest.raises((Undecodable, DecodeError)):
        decode_upload(bytes((0x12, len(message))) + message)


@pytest.mark.parametrize("message", [b"", b"\x12\x05\x08\x01", b"\x12", b"\xff", b"\x1a\x00"])
def test_bytes_that_are_no_upload_message_are_refused(message):
    with pytest.raises((Undecodable, DecodeError)):
        decode_upload(message)


def test_an_empty_message_is_an_empty_chunk():
    assert same(decode_chunk(b""), Chunk(0, 0, b"", 0))
