"""What is sent of files, in which pieces."""

import asyncio
import os
from contextlib import closing

import pytest

from fedpruner_common.chunks import CHUNK_BYTES, FileRange
from fedpruner_common.errors import CorruptChunk
from fedpruner_server.sending import Reader, send_joined, send_ranges

DATA = bytes(i * 7 % 251 for i in range(5 * CHUNK_BYTES // 2))


@pytest.fixture(params=["in memory", "unknown flag", "from the disk"])
def path(request, tmp_path, monkeypatch):
    """A file, read as a system would that has it in memory, that cannot say, or that has not."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        if flags and request.param == "unknown flag":
            raise OSError(95, "not supported")
        if flags and request.param == "from the disk":
            raise BlockingIOError
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return path


def collect(chunks):
    """All chunks with copies of their data, which is only valid until the next."""

    async def run():
        return [(c.blob, c.offset, bytes(c.data)) async for c in chunks]

    return asyncio.run(run())


def test_ranges_come_one_after_the_other_each_from_its_offset(path):
    parts = [
        (FileRange(path, 10, 5), 2),
        (FileRange(path, 0, 0), 0),
        (FileRange(path, 100, CHUNK_BYTES + 3), 0),
        (FileRange(path, 7, 4), 4),
    ]
    assert collect(send_ranges(parts)) == [
        (0, 2, DATA[12:15]),
        (2, 0, DATA[100 : 100 + CHUNK_BYTES]),
        (2, CHUNK_BYTES, DATA[100 + CHUNK_BYTES : 103 + CHUNK_BYTES]),
    ]


@pytest.mark.parametrize("offset", [0, 1, 4, 5, 9, CHUNK_BYTES, CHUNK_BYTES + 12, 2 * CHUNK_BYTES])
def test_a_head_and_ranges_are_one_blob_from_any_offset(path, offset):
    ranges = [FileRange(path, 3, 5), FileRange(path, 100, 2 * CHUNK_BYTES - 14)]
    whole = b"head" + DATA[3:8] + DATA[100 : 100 + 2 * CHUNK_BYTES - 14]
    chunks = collect(send_joined(b"head", ranges, offset=offset))
    assert b"".join(data for _, _, data in chunks) == whole[offset:]
    positions = [offset + i * CHUNK_BYTES for i in range(len(chunks))]
    assert [(blob, at) for blob, at, _ in chunks] == [(0, at) for at in positions]
    assert all(len(data) == CHUNK_BYTES for _, _, data in chunks[:-1])


def test_a_file_that_is_shorter_than_its_range_is_an_error(path):
    place = FileRange(path, len(DATA) - 10, 50)
    with pytest.raises(CorruptChunk, match="file ended 40 bytes early"):
        collect(send_ranges([(place, 0)]))
    with pytest.raises(CorruptChunk, match="file ended 40 bytes early"):
        collect(send_joined(b"", [place], offset=0))


def test_a_reader_goes_from_file_to_file(path, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"other")

    async def run():
        with closing(Reader()) as reader:
            first = bytes(await reader.read(path, 1, 3))
            second = bytes(await reader.read(other, 1, 99))
            return first, second, bytes(await reader.read(path, 0, 2))

    assert asyncio.run(run()) == (DATA[1:4], b"ther", DATA[:2])
