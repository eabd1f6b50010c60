"""How fast the cache's disk reads: what decides whether streaming layers is worth it."""

import contextlib
import ctypes
import mmap
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

_BLOCK_BYTES = 4 << 20
_PASSES = 3
_REMEMBERED = "read_bytes_per_s"
_STILL_COLD = 1 / 16  # so much of the file in memory errs by as much at most


class _NotMeasurable(OSError):
    """The file cannot be put out of memory here."""


def read_bandwidth(folder: Path, *, num_bytes: int = 64 << 20) -> int:
    """Bytes per second of reading a file that is not in memory; 0 where that cannot be known.

    Median of three passes. It is 0 when the disk is too full or cannot be written, and when the
    system does not let go of the file: then there is no disk to measure (tmpfs), or no way to.
    What a drive or a hypervisor caches by itself is beyond reach, so take it as the upper end.

    Takes as long as writing the file once and reading it three times: ask once and remember.

    Args:
        folder: where the cache is.
        num_bytes: size of the file. It has no name, so none is left behind even by SIGKILL.
    """
    try:
        # Never the last bytes of a disk: others on it would fail meanwhile.
        if shutil.disk_usage(folder).free < 2 * num_bytes:
            return 0
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            _fill(file.fileno(), num_bytes)
            seconds = [_time_cold_read(file.fileno(), num_bytes) for _ in range(_PASSES)]
    except OSError:
        return 0
    return int(num_bytes / max(statistics.median(seconds), 1e-9))


def remembered_bandwidth(state_dir: Path) -> int:
    """As `read_bandwidth`, measured once for a state directory."""
    path = state_dir / _REMEMBERED
    with contextlib.suppress(OSError, ValueError):
        return max(0, int(path.read_text()))
    found = read_bandwidth(state_dir)
    with contextlib.suppress(OSError):
        path.write_text(f"{found}\n")
    return found


def _fill(fd: int, num_bytes: int) -> None:
    """Write random bytes, which no file system can compress, as far as the disk itself."""
    left = num_bytes
    while left:
        left -= os.write(fd, os.urandom(min(left, _BLOCK_BYTES)))
    os.fsync(fd)  # dirty pages cannot be dropped


def _time_cold_read(fd: int, num_bytes: int) -> float:
    """Seconds to read the whole file, from disk.

    Raises:
        OSError: it cannot be read, or is in memory and stays there.
    """
    if not hasattr(os, "posix_fadvise"):
        raise _NotMeasurable("no posix_fadvise here")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if _resident_fraction(fd, num_bytes) > _STILL_COLD:
        raise _NotMeasurable("the file stays in memory")
    os.lseek(fd, 0, os.SEEK_SET)
    buffer = bytearray(_BLOCK_BYTES)
    started = time.perf_counter()
    while os.readv(fd, [buffer]):
        pass
    return time.perf_counter() - started


def _resident_fraction(fd: int, num_bytes: int) -> float:
    """How much of a file is in the page cache, from 0 to 1."""
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    pages = (ctypes.c_ubyte * num_pages)()
    with mmap.mmap(fd, num_bytes, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(num_bytes), pages
        )
        del first  # the map cannot be closed while something points into it
    if failed:
        raise _NotMeasurable(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) / num_pages
