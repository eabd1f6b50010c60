"""The training process, from the agent's side. Its end provably returns the memory.

It may stay warm between tasks, since its imports take seconds, and is gone when the agent idles.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpruner_client.cache import Cache
from fedpruner_client.config import AgentSettings
from fedpruner_common.child import Child, Json, Progress
from fedpruner_common.errors import ChildDied, FedPrunerError
from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.statistics import Statistics, statistics_from_json
from fedpruner_common.task import ProbeTask, Task, UpdateMetrics
from fedpruner_common.units import format_bytes


@dataclass(frozen=True)
class Baseline:
    """The training process before any model.

    Attributes:
        memory_kind: `rss` or `cuda`: which memory the budget is about.
        floor_bytes: what it uses after one tiny training step.
        available_bytes: of GPU memory, what could be used in all; 0 on the CPU.
    """

    memory_kind: str
    floor_bytes: int
    available_bytes: int


class Trainer:
    """Starts the process when there is work for it."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._work_dir = settings.state_dir / "task"
        self._child = Child(
            "fedpruner_client.train_jobs",
            log_path=settings.state_dir / "training.log",
            env={
                # OpenMP threads spin while they wait; with other processes around that costs more
                # than the threads bring.
                "OMP_WAIT_POLICY": "PASSIVE",
                "OMP_NUM_THREADS": str(settings.threads()),
            },
        )

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def measure(self) -> Baseline:
        """What the process needs before any model, measured by running it.

        Raises:
            ChildDied: it could not even do that.
        """
        result = self._child.call("measure", {"device": self._settings.device})
        return Baseline(**result)

    def adapter_path(self) -> Path:
        """Where the agent puts the adapter for the next task."""
        self._work_dir.mkdir(parents=True, exist_ok=True)
        return self._work_dir / "adapter.safetensors"

    def train(self, task: Task, cache: Cache, on_progress: Progress) -> tuple[UpdateMetrics, Path]:
        """Train a task; returns its metrics and the file with the update.

        Raises:
            ChildDied: the process was killed, most likely for lack of memory.
            FedPrunerError: the model or the data cannot be used.
        """
        config_dir = self._config_dir(task.files, cache)
        update_path = self._work_dir / "update.safetensors"
        arguments = {
            "task_id": task.task_id,
            "client_id": self._settings.client_id,
            "config_dir": str(config_dir),
            "num_layers": task.submodel.num_layers,
            "components": [str(component) for component in task.submodel.components],
            "tensors": [_with_path(info, cache) for info in task.tensors],
            "other_tensors": [_with_path(info, cache) for info in task.other_tensors],
            "bridge": asdict(task.bridge),
            "bridges": str(cache.path(task.bridge_file.hash)) if task.bridge_file else None,
            "streamed": list(task.streamed),
            "work_dir": str(self._work_dir),
            "lora": asdict(task.lora),
            "training": asdict(task.training),
            "adapter": str(self.adapter_path()),
            "update": str(update_path),
            "data": [str(path) for path in self._settings.data],
            "device": self._settings.device,
        }
        result = self._child.call("train", arguments, on_progress)
        return UpdateMetrics(**result), update_path

    def probe(self, task: ProbeTask, cache: Cache) -> Statistics:
        """What the layers are worth on this device's text, and how alike they are.

        Raises:
            ChildDied: the process was killed, most likely for lack of memory.
            FedPrunerError: the model or the data cannot be used.
        """
        arguments = {
            "config_dir": str(self._config_dir(task.files, cache)),
            "num_layers": task.num_layers,
            "tensors": [_with_path(info, cache) for info in task.tensors],
            "lora": asdict(task.lora),
            "granularity": task.granularity,
            "score": task.score,
            "num_sequences": task.num_sequences,
            "max_seq_length": task.max_seq_length,
            "dtype": task.dtype,
            "seed": task.seed,
            "rms_rows": task.rms_rows,
            "adapter": str(self.adapter_path()),
            "data": [str(path) for path in self._settings.data],
            "device": self._settings.device,
        }
        return statistics_from_json(self._child.call("probe", arguments))

    def _config_dir(self, files: Iterable[FileInfo], cache: Cache) -> Path:
        """A directory with config and tokenizer under their own names."""
        config_dir = self._work_dir / "model"
        config_dir.mkdir(parents=True, exist_ok=True)
        for old in config_dir.iterdir():
            old.unlink()
        for file in files:
            (config_dir / file.name).symlink_to(cache.path(file.hash).resolve())
        return config_dir

    def close(self) -> None:
        """End the process; all its memory goes back to the system."""
        self._child.close()

    def abort(self) -> None:
        """End the process from another thread, in the middle of a task."""
        self._child.kill()


def _with_path(info: TensorInfo, cache: Cache) -> Json:
    return {**asdict(info), "path": str(cache.path(info.hash))}


def describe_failure(error: FedPrunerError, *, budget_bytes: int) -> str:
    """One sentence for the coordinator: why a task could not be done."""
    if isinstance(error, ChildDied) and error.returncode == -9:
        return f"training was killed, out of memory? (budget {format_bytes(budget_bytes)})"
    return str(error).splitlines()[0][:300]
