"""The training process, from the agent's side. Its end provably returns the memory.

It may stay warm between tasks, since its imports take seconds, and is gone when the agent idles.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from fedpruner_client.cache import Cache
from fedpruner_client.config import AgentSettings
from fedpruner_client.ladder import next_rung
from fedpruner_common.child import Child, Json, Progress
from fedpruner_common.errors import ChildDied, FedPrunerError, OutOfMemory
from fedpruner_common.log import get_logger
from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.statistics import Statistics, statistics_from_json
from fedpruner_common.task import ProbeTask, Task, UpdateMetrics
from fedpruner_common.units import format_bytes


@dataclass(frozen=True)
class Baseline:
    """The training process before any model.

    Attributes:
        memory_kind: which memory the budget is about: `rss` of the process, `cuda`, or `unified`
            where the GPU has none of its own.
        floor_bytes: what it uses after one tiny training step.
        available_bytes: what it could use in all, by the tightest limit on it.
        limit: which that is.
    """

    memory_kind: str
    floor_bytes: int
    available_bytes: int
    limit: str

    @property
    def own_limit(self) -> bool:
        """Whether it is a limit on the process, which only the process itself can look at again."""
        return self.memory_kind == "cuda" or self.limit.startswith("RLIMIT")


class Trainer:
    """Starts the process when there is work for it."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._log = get_logger()
        self._aborted = False
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

    def resident_bytes(self) -> int:
        """Memory the process holds now; 0 when there is none."""
        return self._memory("rss")

    def shared_bytes(self) -> int:
        """How much of that is files, libraries most of all, which others may have in memory too."""
        return self._memory("shared")

    def _memory(self, which: str) -> int:
        """One of psutil's figures of the process; 0 where it has none."""
        pid = self._child.pid
        try:
            return int(getattr(psutil.Process(pid).memory_info(), which, 0)) if pid else 0
        except psutil.NoSuchProcess:  # it ended between the two
            return 0

    def adapter_path(self) -> Path:
        """Where the agent puts the adapter for the next task."""
        self._work_dir.mkdir(parents=True, exist_ok=True)
        return self._work_dir / "adapter.safetensors"

    def train(
        self, task: Task, cache: Cache, on_progress: Progress, *, memory_budget_bytes: int
    ) -> tuple[UpdateMetrics, Path]:
        """Train a task; returns its metrics and the file with the update.

        Where memory runs out, something is made smaller and training starts again; see `ladder`.

        Raises:
            OutOfMemory: nothing is left to make smaller.
            ChildDied: the process ended for another reason.
            FedPrunerError: the model or the data cannot be used.
        """
        self._aborted = False
        training = task.training
        rungs: list[str] = []
        while True:
            try:
                attempt = replace(task, training=training)
                metrics, path = self._attempt(attempt, cache, on_progress, memory_budget_bytes)
                return replace(metrics, rungs=tuple(rungs)), path
            except FedPrunerError as error:
                if self._aborted or not _is_for_memory(error):
                    raise
                self.close()  # whatever is left of it holds memory
                reason = describe_failure(error, budget_bytes=memory_budget_bytes)
                found = next_rung(training)
                if found is None:
                    tried = f" after {', '.join(rungs)}" if rungs else ""
                    raise OutOfMemory(f"{reason}{tried}") from error
                if self._aborted:  # while the process was being closed
                    raise
            rung, training = found
            rungs.append(rung)
            self._log.warning("out of memory: trying with less", reason=reason, now=rung)

    def _attempt(
        self, task: Task, cache: Cache, on_progress: Progress, memory_budget_bytes: int
    ) -> tuple[UpdateMetrics, Path]:
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
            "memory_budget_bytes": memory_budget_bytes,
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
        self._aborted = True
        self._child.kill()


def _with_path(info: TensorInfo, cache: Cache) -> Json:
    return {**asdict(info), "path": str(cache.path(info.hash))}


def _is_for_memory(error: FedPrunerError) -> bool:
    """Whether less memory would have helped: the process said so, or was killed."""
    killed = isinstance(error, ChildDied) and error.returncode in (-9, 137)
    return killed or isinstance(error, OutOfMemory)


def describe_failure(error: FedPrunerError, *, budget_bytes: int) -> str:
    """One sentence for the coordinator: why a task could not be done."""
    if isinstance(error, ChildDied) and _is_for_memory(error):
        return f"training was killed, out of memory? (budget {format_bytes(budget_bytes)})"
    return str(error).splitlines()[0][:300]
