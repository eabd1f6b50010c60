import os

import pytest
from blake3 import blake3

from fedpruner_client.cache import Cache
from fedpruner_common.chunks import make_chunk
from fedpruner_common.errors import CorruptChunk, StorageError


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", limit_bytes=100)


def hash_of(data):
    return blake3(data).hexdigest()


def receive(cache, content_hash, data, *, num_bytes=None, resume=False):
    """Bytes of a blob arrive, from where it stopped."""
    size = len(data) if num_bytes is None else num_bytes
    writer = cache.writer(content_hash, size, resume=resume)
    if data:
        writer.write(make_chunk(data, blob=0, offset=writer.received))
    writer.close()
    return writer


def put(cache, data, *, used_at=None):
    content_hash = hash_of(data)
    cache.complete(content_hash, receive(cache, content_hash, data))
    if used_at is not None:
        path = cache.path(content_hash)
        os.utime(path, (used_at, path.stat().st_mtime))
    return content_hash


def test_everything_is_missing_at_first(cache):
    assert cache.missing({"ab" * 32: 5, "cd" * 32: 0}) == {"ab" * 32: 0, "cd" * 32: 0}


def test_a_complete_blob_is_there_with_its_bytes(cache):
    content_hash = put(cache, b"hello")
    assert cache.missing({content_hash: 5}) == {}
    assert cache.path(content_hash).read_bytes() == b"hello"


def test_a_blob_of_no_bytes_can_be_complete(cache):
    assert cache.missing({put(cache, b""): 0}) == {}


def test_a_broken_download_goes_on_where_it_stopped(cache):
    content_hash = hash_of(b"hello world")
    receive(cache, content_hash, b"hello", num_bytes=11)
    assert cache.missing({content_hash: 11}) == {content_hash: 5}
    writer = receive(cache, content_hash, b" world", num_bytes=11, resume=True)
    cache.complete(content_hash, writer)
    assert cache.missing({content_hash: 11}) == {}


def test_a_partial_file_longer_than_its_blob_is_started_over(cache):
    content_hash = hash_of(b"hello")
    receive(cache, content_hash, b"hello and more")
    assert cache.missing({content_hash: 5}) == {content_hash: 0}


def test_a_blob_with_other_content_is_refused_and_deleted(cache):
    content_hash = hash_of(b"hello")
    writer = receive(cache, content_hash, b"hellO")
    with pytest.raises(CorruptChunk, match=content_hash[:12]):
        cache.complete(content_hash, writer)
    assert cache.missing({content_hash: 5}) == {content_hash: 0}


def test_a_blob_that_was_cut_short_on_disk_is_missing(cache):
    content_hash = put(cache, b"hello")
    cache.path(content_hash).write_bytes(b"hel")
    assert cache.missing({content_hash: 5}) == {content_hash: 0}


def test_blobs_survive_a_restart(cache, tmp_path):
    content_hash = put(cache, b"hello")
    assert Cache(tmp_path / "cache", limit_bytes=1).missing({content_hash: 5}) == {}


def test_the_least_recently_used_blob_goes_first_and_no_more_than_needed(cache):
    old, older, new = (
        put(cache, b"a" * 30, used_at=2),
        put(cache, b"b" * 30, used_at=1),
        put(cache, b"c" * 30, used_at=3),
    )
    cache.make_room(30, keep=[])  # 90 + 30 is 20 over 100: one of 30 is enough
    assert cache.missing({old: 30, older: 30, new: 30}) == {older: 0}


def test_asking_for_a_blob_is_using_it(cache):
    first, second = put(cache, b"a" * 40, used_at=1), put(cache, b"b" * 40, used_at=2)
    cache.missing({first: 40})
    cache.make_room(40, keep=[])
    assert cache.missing({first: 40, second: 40}) == {second: 0}


def test_nothing_goes_while_there_is_room(cache):
    content_hash = put(cache, b"a" * 40, used_at=1)
    cache.make_room(60, keep=[])  # exactly 100
    assert cache.missing({content_hash: 40}) == {}


def test_what_a_task_needs_stays_however_old_it_is(cache):
    needed, other = put(cache, b"a" * 40, used_at=1), put(cache, b"b" * 40, used_at=2)
    cache.make_room(60, keep=[needed])
    assert cache.missing({needed: 40, other: 40}) == {other: 0}


def test_a_limit_too_small_for_the_task_is_an_error_with_what_it_needs(cache):
    needed = put(cache, b"a" * 40)
    with pytest.raises(StorageError, match=r"need 140 B of disk, the cache limit is 100 B"):
        cache.make_room(100, keep=[needed])
    assert cache.missing({needed: 40}) == {}


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to the cache"):
        Cache(tmp_path / "file" / "cache", limit_bytes=1)


@pytest.mark.parametrize("again", [False, True])
def test_a_blob_that_changed_on_disk_is_fetched_again(cache, tmp_path, again):
    content_hash = put(cache, b"hello")
    cache.path(content_hash).write_bytes(b"hellO")  # as long as before
    if again:  # also by an agent that was started after it happened
        cache = Cache(tmp_path / "cache", limit_bytes=100)
    assert cache.missing({content_hash: 5}) == {content_hash: 0}
    assert not cache.path(content_hash).exists()


def test_a_blob_that_nobody_touched_is_hashed_once(cache, tmp_path, monkeypatch):
    content_hash = put(cache, b"hello")
    again = Cache(tmp_path / "cache", limit_bytes=100)
    hashed = []
    monkeypatch.setattr(
        "fedpruner_client.cache.hash_file", lambda p: hashed.append(p) or content_hash
    )
    for _ in range(3):
        assert again.missing({content_hash: 5}) == {}
    assert hashed == [cache.path(content_hash)]


def test_what_has_arrived_of_a_blob_counts_against_the_limit(cache):
    content_hash = hash_of(b"x" * 90)
    receive(cache, content_hash, b"x" * 60, num_bytes=90)
    cache.make_room(30, keep=[content_hash])
    with pytest.raises(StorageError, match="need 110 B of disk"):
        cache.make_room(50, keep=[content_hash])


def test_a_disk_without_room_is_an_error_before_anything_travels(cache, monkeypatch):
    full = os.statvfs_result((1, 10, 100, 5, 4, 0, 0, 0, 0, 255))  # 4 blocks of 10 bytes to be had
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    cache.make_room(40, keep=[])
    with pytest.raises(StorageError, match=r"need 41 B more disk, .* has 40 B free"):
        cache.make_room(41, keep=[])
