import resource
import signal

import pytest
from blake3 import blake3

from fedpruner_common.chunks import (
    CHUNK_BYTES,
    Chunk,
    ChunkWriter,
    FileRange,
    hash_file,
    make_chunk,
    read_chunks,
)
from fedpruner_common.errors import CorruptChunk, StorageError


@pytest.fixture
def source(tmp_path):
    """2.5 chunks of distinguishable bytes between 3 bytes before and 4 after."""
    data = bytes(i * 7 % 251 for i in range(5 * CHUNK_BYTES // 2))
    path = tmp_path / "source"
    path.write_bytes(b"abc" + data + b"defg")
    return FileRange(path, 3, len(data)), data


def received(path, chunks, *, max_bytes, resume=False):
    writer = ChunkWriter(path, max_bytes=max_bytes, resume=resume)
    try:
        for chunk in chunks:
            writer.write(chunk)
    finally:
        writer.close(sync=True)
    return path.read_bytes()


def test_a_range_of_a_file_arrives_as_it_was(tmp_path, source):
    place, data = source
    chunks = list(read_chunks(place, blob=5))
    assert received(tmp_path / "copy", chunks, max_bytes=len(data)) == data
    assert [c.offset for c in chunks] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert {c.blob for c in chunks} == {5}


def test_a_broken_stream_goes_on_where_it_stopped(tmp_path, source):
    place, data = source
    path = tmp_path / "copy"
    first = next(read_chunks(place))
    received(path, [first], max_bytes=len(data))
    rest = read_chunks(place, offset=CHUNK_BYTES)
    assert received(path, rest, max_bytes=len(data), resume=True) == data


def test_without_resume_what_was_there_is_dropped(tmp_path):
    path = tmp_path / "copy"
    path.write_bytes(b"old")
    assert received(path, [make_chunk(b"new!", blob=0, offset=0)], max_bytes=4) == b"new!"


def test_nothing_is_sent_of_a_range_that_is_there_already(source):
    place, data = source
    assert list(read_chunks(place, offset=len(data))) == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (make_chunk(b"cd", blob=0, offset=3), "expected the chunk at offset 2, got 3"),
        (make_chunk(b"ab", blob=0, offset=0), "expected the chunk at offset 2, got 0"),
        (make_chunk(b"cde", blob=0, offset=2), "more than the promised 4 bytes"),
        (Chunk(0, 2, b"cd", 1), "checksum of the chunk at offset 2 differs"),
    ],
)
def test_gap_repetition_overrun_and_damage_are_refused_and_leave_the_file_as_it_was(
    tmp_path, bad, reason
):
    path = tmp_path / "copy"
    with pytest.raises(CorruptChunk, match=reason):
        received(path, [make_chunk(b"ab", blob=0, offset=0), bad], max_bytes=4)
    assert path.read_bytes() == b"ab"


def test_a_flipped_bit_is_noticed(tmp_path):
    chunk = make_chunk(b"abcd", blob=0, offset=0)
    damaged = Chunk(0, 0, b"abce", chunk.checksum)
    with pytest.raises(CorruptChunk, match="checksum"):
        received(tmp_path / "copy", [damaged], max_bytes=4)


def test_a_file_that_shrinks_while_it_is_sent_is_an_error(source):
    place, _ = source
    chunks = read_chunks(place)
    next(chunks)
    with place.path.open("r+b") as file:
        file.truncate(3 + CHUNK_BYTES)  # exactly what was sent remains
    # 1.5 chunks are missing
    with pytest.raises(CorruptChunk, match=f"ended {3 * CHUNK_BYTES // 2} bytes early"):
        next(chunks)


def test_the_hash_is_of_the_whole_file_also_of_what_was_there_before(tmp_path):
    path = tmp_path / "copy"
    path.write_bytes(b"hello ")
    writer = ChunkWriter(path, max_bytes=11, resume=True)
    assert writer.received == 6
    writer.write(make_chunk(b"world", blob=0, offset=6))
    writer.close()
    assert writer.hexdigest() == blake3(b"hello world").hexdigest() == hash_file(path)


def test_a_disk_that_is_full_is_an_error_and_leaves_whole_chunks_only(tmp_path):
    path = tmp_path / "copy"
    writer = ChunkWriter(path, max_bytes=10_000)
    writer.write(make_chunk(b"a" * 1000, blob=0, offset=0))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard[1]))  # a write is cut, then refused
    try:
        with pytest.raises(StorageError, match=r"cannot write .*copy: File too large"):
            writer.write(make_chunk(b"b" * 1000, blob=0, offset=1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, hard)
        signal.signal(signal.SIGXFSZ, handler)
        writer.close()
    assert path.read_bytes() == b"a" * 1000


def test_a_place_that_cannot_be_written_is_an_error_with_its_name(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*no/copy: No such file"):
        ChunkWriter(tmp_path / "no" / "copy", max_bytes=1)
