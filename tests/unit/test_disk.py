"""The speed of the disk under the cache; what cannot be measured is 0."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from fedpruner_client import disk
from fedpruner_client.disk import read_bandwidth, remembered_bandwidth

MIB = 1 << 20


@pytest.fixture
def stays_cold(tmp_path):
    """A folder whose files the system lets go of."""
    with open(tmp_path / "probe", "w+b") as file:
        file.write(bytes(1 * MIB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        resident = disk._resident_fraction(file.fileno(), 1 * MIB)
    (tmp_path / "probe").unlink()
    if resident > 0.5:
        pytest.skip(f"{tmp_path} keeps its files in memory (tmpfs?)")
    return tmp_path


def test_a_disk_has_a_speed_and_no_file_is_left(stays_cold):
    speed = read_bandwidth(stays_cold, num_bytes=8 * MIB)
    assert 1 * MIB < speed < 1 << 40
    assert list(stays_cold.iterdir()) == []


def test_the_speed_is_the_median_of_cold_reads(stays_cold, monkeypatch):
    # Start and end of three reads of 8 MiB in 0.5, 4 and 0.25 s: the median says 16 MiB/s.
    clock = iter([0.0, 0.5, 1.0, 5.0, 6.0, 6.25])
    monkeypatch.setattr(disk.time, "perf_counter", lambda: next(clock))
    assert read_bandwidth(stays_cold, num_bytes=8 * MIB) == 16 * MIB


def test_a_size_that_is_no_multiple_of_anything_works(stays_cold):
    assert read_bandwidth(stays_cold, num_bytes=5 * MIB + 17) > 0


def test_a_file_just_written_is_seen_in_memory(tmp_path):
    with open(tmp_path / "warm", "w+b") as file:
        file.write(bytes(1 * MIB))
        file.flush()
        assert disk._resident_fraction(file.fileno(), 1 * MIB) == 1.0


def test_a_file_that_stays_in_memory_says_nothing_about_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    assert read_bandwidth(tmp_path, num_bytes=2 * MIB) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_left_alone(tmp_path, monkeypatch):
    def no_write(*_):
        pytest.fail("wrote to a full disk")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=15 * MIB))
    monkeypatch.setattr(os, "write", no_write)
    assert read_bandwidth(tmp_path, num_bytes=8 * MIB) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_midway_is_unknown_and_no_file_is_left(tmp_path, monkeypatch, code):
    def refuse(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    assert read_bandwidth(tmp_path, num_bytes=2 * MIB) == 0
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_left_when_interrupted(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_bandwidth(tmp_path, num_bytes=2 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_unknown(tmp_path):
    assert read_bandwidth(tmp_path / "missing", num_bytes=2 * MIB) == 0
    # root may write anywhere, but not here
    assert read_bandwidth(disk.Path("/proc"), num_bytes=2 * MIB) == 0


def test_a_speed_is_measured_once_for_a_state_directory(tmp_path, monkeypatch):
    speeds = iter([123, 456])
    monkeypatch.setattr(disk, "read_bandwidth", lambda _: next(speeds))
    assert [remembered_bandwidth(tmp_path) for _ in range(3)] == [123] * 3
    (tmp_path / "read_bytes_per_s").write_text("nonsense")
    assert remembered_bandwidth(tmp_path) == 456


def test_a_speed_that_cannot_be_remembered_is_still_told(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "read_bandwidth", lambda _: 7)
    assert remembered_bandwidth(tmp_path / "missing") == 7
