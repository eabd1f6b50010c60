"""A folder that one process at a time may write to."""

import fcntl
from pathlib import Path
from typing import TextIO

from fedpruner_common.errors import StorageError


def lock_folder(folder: Path, program: str) -> TextIO:
    """The folder's lock file, held until it is closed or the process ends; makes the folder.

    Raises:
        StorageError: it cannot be written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StorageError(f"cannot write to the state directory {folder}: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StorageError(f"another {program} is using {folder}; stop it first") from error
    return lock
