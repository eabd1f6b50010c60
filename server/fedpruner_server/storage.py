"""Durable state: a journal of events in SQLite, tensors in files beside it.

state_dir/
    lock                       held by the one coordinator that may write here
    journal.sqlite             events, appended before their effects
    adapters/round-0003.safetensors
    updates/round-0004/<client>.safetensors
    updates/incoming/<client>/<hash>    as far as it has arrived
    peft/round-0010/  peft/final/
    metrics.jsonl
"""

import errno
import json
import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpruner_common.errors import StorageError
from fedpruner_common.locks import lock_folder
from fedpruner_common.units import format_bytes

Json = dict[str, Any]

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    round INTEGER NOT NULL,
    type TEXT NOT NULL,
    data TEXT NOT NULL,
    at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class JournalEntry:
    """One event: `type` names it, `data` is its content."""

    round: int
    type: str
    data: Json


class Storage:
    """The state directory of one coordinator."""

    def __init__(self, state_dir: Path) -> None:
        """Open or create it.

        Raises:
            StorageError: it cannot be written, or another coordinator uses it.
        """
        self.state_dir = state_dir
        with ExitStack() as opened:
            opened.enter_context(lock_folder(state_dir, "fedpruner-server"))
            self._database = opened.enter_context(closing(_open_journal(state_dir)))
            self._opened = opened.pop_all()

    def append(self, round_number: int, event_type: str, data: Json) -> None:
        """Append an event; it is on disk when this returns.

        Raises:
            StorageError: the disk is full or read-only.
        """
        self.append_all(round_number, [(event_type, data)])

    def append_all(self, round_number: int, events: Sequence[tuple[str, Json]]) -> None:
        """Append some events with one write; all of them are on disk when this returns, or none.

        Raises:
            StorageError: the disk is full or read-only.
        """
        rows = ", ".join(["(?, ?, ?)"] * len(events))
        values = [v for kind, data in events for v in (round_number, kind, json.dumps(data))]
        self._write(f"INSERT INTO events (round, type, data) VALUES {rows}", tuple(values))

    def entries(self) -> list[JournalEntry]:
        """Every event so far, oldest first."""
        rows = self._database.execute("SELECT round, type, data FROM events ORDER BY id")
        return [JournalEntry(number, kind, json.loads(data)) for number, kind, data in rows]

    def fact(self, key: str) -> Any:
        """A remembered value, None if there is none."""
        row = self._database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def remember(self, key: str, value: Any) -> None:
        """Remember a JSON value under a key.

        Raises:
            StorageError: the disk is full or read-only.
        """
        self._write("REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise StorageError(f"cannot write the journal in {self.state_dir}: {error}") from error

    def trouble(self, *, min_free_bytes: int) -> str:
        """Why nothing can be stored now, for people; empty if it can. Writes a little to see."""
        try:
            probe = self.state_dir / "write-test"
            with probe.open("wb") as file:
                file.write(bytes(4096))
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as error:
            return f"the coordinator cannot write to its disk: {error.strerror or error}"
        return self.shortage(min_free_bytes)

    def shortage(self, num_bytes: int) -> str:
        """That so many bytes are not free, for people; empty if they are."""
        free = shutil.disk_usage(self.state_dir).free
        if free >= num_bytes:
            return ""
        return (
            f"the coordinator's disk is full: {format_bytes(free)} free, "
            f"{format_bytes(num_bytes)} needed"
        )

    def adapter_path(self, round_number: int) -> Path:
        """The global adapter after a round; 0 is the one before the first."""
        return self.state_dir / "adapters" / f"round-{round_number:04d}.safetensors"

    def state_path(self, round_number: int) -> Path:
        """What aggregation keeps beside the adapter after a round: residuals, moments."""
        return self.state_dir / "adapters" / f"state-{round_number:04d}.safetensors"

    def bridge_path(self, content_hash: str) -> Path:
        """Bridges that the coordinator fitted for a submodel."""
        return self.state_dir / "bridges" / f"{content_hash}.safetensors"

    def update_path(self, round_number: int, client_id: str) -> Path:
        return self.state_dir / "updates" / f"round-{round_number:04d}" / f"{client_id}.safetensors"

    def incoming_path(self, client_id: str, content_hash: str) -> Path:
        """Where a client's update arrives; what is there of its other ones is deleted."""
        folder = self.state_dir / "updates" / "incoming" / client_id
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / content_hash
        for old in folder.iterdir():
            if old != path:
                old.unlink(missing_ok=True)
        return path

    @property
    def run_id(self) -> str:
        """Tells this state directory's run from any other."""
        known: str | None = self.fact("run_id")
        if known is None:
            known = secrets.token_hex(8)
            self.remember("run_id", known)
        return known

    def peft_dir(self, name: str) -> Path:
        return self.state_dir / "peft" / name

    def drop_updates(self, round_number: int) -> None:
        """Delete a round's updates, which its adapter has absorbed."""
        shutil.rmtree(self.update_path(round_number, "any").parent, ignore_errors=True)

    def drop_incoming(self) -> None:
        """Delete what has arrived of updates that never came to their end."""
        shutil.rmtree(self.state_dir / "updates" / "incoming", ignore_errors=True)

    def drop_bridges(self) -> None:
        """Delete the bridges of a round that is over; the next has its own."""
        shutil.rmtree(self.bridge_path("any").parent, ignore_errors=True)

    def add_metrics(self, rows: Iterable[Json], *, after_bytes: int | None) -> int:
        """Append lines to metrics.jsonl; returns its size.

        Args:
            rows: the lines.
            after_bytes: size of the file that is known to be whole; what was written after it, by
                a coordinator that did not live to journal it, is overwritten. None: all of it.
        """
        path = self.state_dir / "metrics.jsonl"
        with path.open("r+b" if path.exists() else "wb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(end if after_bytes is None else min(end, after_bytes))
            file.truncate()
            for row in rows:
                file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def close(self) -> None:
        """Let another coordinator have the directory."""
        self._opened.close()


def _open_journal(state_dir: Path) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(state_dir / "journal.sqlite", isolation_level=None)
    except sqlite3.Error as error:
        raise StorageError(f"cannot open the journal in {state_dir}: {error}") from error
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.executescript(_SCHEMA)
    except sqlite3.Error as error:
        database.close()
        raise StorageError(f"cannot open the journal in {state_dir}: {error}") from error
    return database


def is_about_disk(error: Exception) -> bool:
    """Whether an error says that a disk is full, read-only or broken: the same may work later."""
    return isinstance(error, StorageError) or (
        isinstance(error, OSError) and error.errno in _DISK_ERRORS
    )


def make_durable(moves: Sequence[tuple[Path, Path]]) -> None:
    """Move finished files, whose bytes are on disk, into place so that they survive a power cut.

    Args:
        moves: from, to.
    """
    touched = set()
    for path, final in moves:
        if not final.parent.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            touched.add(final.parent.parent)
        os.replace(path, final)
        touched.add(final.parent)
    for folder in touched:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
