"""Durable state: a journal of events in SQLite, tensors in files beside it.

state_dir/
    lock                       held by the one coordinator that may write here
    journal.sqlite             events, appended before their effects
    adapters/round-0003.safetensors
    updates/round-0004/<client>.safetensors
    peft/round-0010/  peft/final/
    metrics.jsonl
"""

import fcntl
import json
import os
import shutil
import sqlite3
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fedpruner_common.errors import StorageError

Json = dict[str, Any]

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
            opened.enter_context(_locked(state_dir))
            self._database = opened.enter_context(closing(_open_journal(state_dir)))
            self._opened = opened.pop_all()

    def append(self, round_number: int, event_type: str, data: Json) -> None:
        """Append an event; it is on disk when this returns.

        Raises:
            StorageError: the disk is full or read-only.
        """
        try:
            self._database.execute(
                "INSERT INTO events (round, type, data) VALUES (?, ?, ?)",
                (round_number, event_type, json.dumps(data)),
            )
        except sqlite3.Error as error:
            raise StorageError(f"cannot write the journal in {self.state_dir}: {error}") from error

    def entries(self) -> list[JournalEntry]:
        """Every event so far, oldest first."""
        rows = self._database.execute("SELECT round, type, data FROM events ORDER BY id")
        return [JournalEntry(number, kind, json.loads(data)) for number, kind, data in rows]

    def fact(self, key: str) -> Any:
        """A remembered value, None if there is none."""
        row = self._database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def remember(self, key: str, value: Any) -> None:
        """Remember a JSON value under a key."""
        self._database.execute("REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))

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

    def peft_dir(self, name: str) -> Path:
        return self.state_dir / "peft" / name

    def drop_updates(self, round_number: int) -> None:
        """Delete a round's updates, which its adapter has absorbed."""
        shutil.rmtree(self.update_path(round_number, "any").parent, ignore_errors=True)

    def drop_bridges(self) -> None:
        """Delete the bridges of a round that is over; the next has its own."""
        shutil.rmtree(self.bridge_path("any").parent, ignore_errors=True)

    def add_metrics(self, row: Json) -> None:
        """Append a line to metrics.jsonl."""
        with (self.state_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Let another coordinator have the directory."""
        self._opened.close()


def _locked(state_dir: Path) -> TextIO:
    """The directory's lock file, held until it is closed."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("w")
    except OSError as error:
        raise StorageError(f"cannot write to the state directory {state_dir}: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StorageError(
            f"another fedpruner-server is using {state_dir}; stop it first"
        ) from error
    return lock


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


def make_durable(path: Path, final: Path) -> None:
    """Move a finished file into place so that it survives a power cut."""
    os.replace(path, final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
