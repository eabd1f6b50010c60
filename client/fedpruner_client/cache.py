"""Blobs on disk by content hash, so that nothing travels twice.

cache_dir/ab/ab12...           complete and verified
cache_dir/partial/ab12...      as far as it got; a broken download goes on from there

A file that changed on disk, or that this process has not seen yet, is hashed again before it counts
as there: a crash may leave less than was written, and disks and people change files.
"""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from fedpruner_common.chunks import ChunkWriter, hash_file
from fedpruner_common.errors import CorruptChunk, StorageError
from fedpruner_common.log import get_logger
from fedpruner_common.units import format_bytes

_Stamp = tuple[int, int, int]  # inode, bytes, time of the last change


class Cache:
    """The cache of one agent."""

    def __init__(self, cache_dir: Path, *, limit_bytes: int) -> None:
        """Open or create it.

        Raises:
            StorageError: it cannot be written.
        """
        self._dir = cache_dir
        self._limit_bytes = limit_bytes
        self._verified: dict[str, _Stamp] = {}
        self._log = get_logger()
        try:
            (cache_dir / "partial").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write to the cache {cache_dir}: {error}") from error

    def path(self, content_hash: str) -> Path:
        """Where a complete blob is or would be."""
        return self._dir / content_hash[:2] / content_hash

    def missing(self, blobs: dict[str, int]) -> dict[str, int]:
        """Those of some blobs (hash -> bytes) that are not here whole, and how much of each is.

        Marks the others as used now. One whose content is not what its hash says is deleted.
        """
        missing = {}
        for content_hash, num_bytes in blobs.items():
            if not self._is_whole(content_hash, num_bytes):
                partial = self._partial(content_hash)
                size = partial.stat().st_size if partial.is_file() else 0
                missing[content_hash] = size if size <= num_bytes else 0
        return missing

    def _is_whole(self, content_hash: str, num_bytes: int) -> bool:
        path = self.path(content_hash)
        try:
            stat = path.stat()
        except OSError:
            return False
        if stat.st_size != num_bytes:
            return False
        stamp = _stamp(stat)
        if self._verified.get(content_hash) != stamp:
            if hash_file(path) != content_hash:
                self._log.warning("a file in the cache is damaged: fetching it again", file=path)
                path.unlink()
                return False
            self._verified[content_hash] = stamp
        os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))  # used now, changed when it was
        return True

    def _partial(self, content_hash: str) -> Path:
        return self._dir / "partial" / content_hash

    def writer(self, content_hash: str, num_bytes: int, *, resume: bool) -> ChunkWriter:
        """Where the chunks of a missing blob go."""
        return ChunkWriter(self._partial(content_hash), max_bytes=num_bytes, resume=resume)

    def complete(self, content_hash: str, writer: ChunkWriter) -> None:
        """Verify a blob whose bytes have all arrived, and put it in place.

        Args:
            content_hash: of the blob.
            writer: that has received it; is closed.

        Raises:
            CorruptChunk: its bytes are not what its hash says; they are deleted.
        """
        writer.close()
        partial, final = self._partial(content_hash), self.path(content_hash)
        if writer.hexdigest() != content_hash:
            partial.unlink()
            raise CorruptChunk(f"blob {content_hash[:12]} arrived with other content")
        final.parent.mkdir(exist_ok=True)
        os.replace(partial, final)
        self._verified[content_hash] = _stamp(final.stat())

    def make_room(self, needed_bytes: int, *, keep: Iterable[str]) -> None:
        """Evict least recently used blobs until `needed_bytes` more fit under the limit.

        Args:
            needed_bytes: about to arrive.
            keep: hashes that must stay.

        Raises:
            StorageError: they cannot fit.
        """
        kept = set(keep)
        total = needed_bytes
        for path in (self._dir / "partial").iterdir():
            if path.name in kept:
                total += path.stat().st_size
            else:  # of a task that is over
                path.unlink()
        files = [path for path in self._dir.glob("??/*") if path.is_file()]
        files.sort(key=lambda path: path.stat().st_atime_ns)
        total += sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self._limit_bytes:
                return
            if path.name not in kept:
                total -= path.stat().st_size
                path.unlink()
        if total > self._limit_bytes:
            raise StorageError(
                f"this task's tensors need {format_bytes(total)} of disk, the cache limit is "
                f"{format_bytes(self._limit_bytes)}: raise cache_limit"
            )
        self._check_disk(needed_bytes)

    def _check_disk(self, needed_bytes: int) -> None:
        free = shutil.disk_usage(self._dir).free
        if free < needed_bytes:
            raise StorageError(
                f"this task's tensors need {format_bytes(needed_bytes)} more disk, "
                f"{self._dir} has {format_bytes(free)} free: make room there"
            )


def _stamp(stat: os.stat_result) -> _Stamp:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
