"""A finished update that waits to be sent; survives the agent's own end, so no training is lost."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpruner_common.chunks import hash_file
from fedpruner_common.errors import StorageError
from fedpruner_common.task import Task, UpdateMetrics


@dataclass(frozen=True)
class FinishedUpdate:
    """What training left.

    Attributes:
        run_id: of the coordinator's run.
        task_id: it is the update of; unique in the run.
        round: of the task.
        metrics: of the training.
        path: safetensors file with the trained values.
        hash: BLAKE3 of the file, hex.
    """

    run_id: str
    task_id: str
    round: int
    metrics: UpdateMetrics
    path: Path
    hash: str


class Outbox:
    """Room for one update."""

    def __init__(self, folder: Path) -> None:
        self._note = folder / "finished.json"

    def put(self, run_id: str, task: Task, metrics: UpdateMetrics, path: Path) -> FinishedUpdate:
        """Remember an update.

        Raises:
            StorageError: the disk is full.
        """
        update = FinishedUpdate(run_id, task.task_id, task.round, metrics, path, hash_file(path))
        temporary = self._note.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({**asdict(update), "path": str(path)}))
            os.replace(temporary, self._note)
        except OSError as error:
            raise StorageError(f"cannot write {self._note}: {error.strerror or error}") from error
        return update

    def find(self, run_id: str, task_id: str) -> FinishedUpdate | None:
        """The update of a task, if it is here whole."""
        try:
            found = json.loads(self._note.read_text())
            metrics = {**found["metrics"], "rungs": tuple(found["metrics"]["rungs"])}
            update = FinishedUpdate(
                **{**found, "path": Path(found["path"]), "metrics": UpdateMetrics(**metrics)}
            )
            if (update.run_id, update.task_id) != (run_id, task_id):
                return None
            return update if hash_file(update.path) == update.hash else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clear(self) -> None:
        """Forget it, and delete its file."""
        try:
            path = Path(json.loads(self._note.read_text())["path"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        self._note.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
