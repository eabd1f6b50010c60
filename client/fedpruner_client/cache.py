"""Blobs on disk by content hash, so that nothing travels twice.

cache_dir/ab/ab12...           complete and verified
cache_dir/partial/ab12...      as far as it got; a broken download goes on from there
"""

import os
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

from fedpruner_common.chunks import CHUNK_BYTES, ChunkWriter
from fedpruner_common.errors import CorruptChunk, StorageError
from fedpruner_common.units import format_bytes


class Cache:
    """The cache of one agent."""

    def __init__(self, cache_dir: Path, *, limit_bytes: int) -> None:
        """Open or create it.

        Raises:
            StorageError: it cannot be written.
        """
        self._dir = cache_dir
        self._limit_bytes = limit_bytes
        try:
            (cache_dir / "partial").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write to the cache {cache_dir}: {error}") from error

    def path(self, content_hash: str) -> Path:
        """Where a complete blob is or would be."""
        return self._dir / content_hash[:2] / content_hash

    def missing(self, blobs: dict[str, int]) -> dict[str, int]:
        """Those of some blobs (hash -> bytes) that are not here whole, and how much of each is.

        Marks the others as used now.
        """
        missing = {}
        for content_hash, num_bytes in blobs.items():
            path = self.path(content_hash)
            if path.is_file() and path.stat().st_size == num_bytes:
                os.utime(path)
                continue
            partial = self._partial(content_hash)
            size = partial.stat().st_size if partial.is_file() else 0
            missing[content_hash] = size if size <= num_bytes else 0
        return missing

    def _partial(self, content_hash: str) -> Path:
        return self._dir / "partial" / content_hash

    def writer(self, content_hash: str, num_bytes: int, *, resume: bool) -> ChunkWriter:
        """Where the chunks of a missing blob go."""
        return ChunkWriter(self._partial(content_hash), max_bytes=num_bytes, resume=resume)

    def complete(self, content_hash: str) -> None:
        """Verify a blob whose bytes have all arrived, and put it in place.

        Raises:
            CorruptChunk: its bytes are not what its hash says; they are deleted.
        """
        partial = self._partial(content_hash)
        digest = blake3()
        with partial.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
        if digest.hexdigest() != content_hash:
            partial.unlink()
            raise CorruptChunk(f"blob {content_hash[:12]} arrived with other content")
        final = self.path(content_hash)
        final.parent.mkdir(exist_ok=True)
        os.replace(partial, final)

    def make_room(self, needed_bytes: int, *, keep: Iterable[str]) -> None:
        """Evict least recently used blobs until `needed_bytes` more fit under the limit.

        Args:
            needed_bytes: about to arrive.
            keep: hashes that must stay.

        Raises:
            StorageError: they cannot fit.
        """
        kept = set(keep)
        for path in (self._dir / "partial").iterdir():
            if path.name not in kept:  # of a task that is over
                path.unlink()
        files = [path for path in self._dir.glob("??/*") if path.is_file()]
        files.sort(key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files) + needed_bytes
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
