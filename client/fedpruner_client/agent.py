"""The agent's loop; reads like the protocol: join, pull, fetch, train, push."""

import time
from collections.abc import Sequence
from dataclasses import replace

import psutil

from fedpruner_client.cache import Cache
from fedpruner_client.config import AgentSettings
from fedpruner_client.connection import Connection, Finished, Offer, Waiting
from fedpruner_client.device import available_bytes
from fedpruner_client.disk import remembered_bandwidth
from fedpruner_client.heartbeat import Heartbeat
from fedpruner_client.outbox import FinishedUpdate, Outbox
from fedpruner_client.trainer import Baseline, Trainer, describe_failure
from fedpruner_client.transfers import Transfers
from fedpruner_common import malloc
from fedpruner_common.child import Json
from fedpruner_common.errors import (
    BudgetTooSmall,
    ChildDied,
    FedPrunerError,
    OutOfMemory,
    StaleRound,
    StorageError,
    Unauthenticated,
)
from fedpruner_common.interrupt import Stopped, heard, raise_on_signals
from fedpruner_common.locks import lock_folder
from fedpruner_common.log import get_logger
from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.rpc import PULL_WAIT_S
from fedpruner_common.task import ProbeTask, Task
from fedpruner_common.units import format_bytes

_ADAPTER_HEADROOM_BYTES = 16 << 20  # the safetensors header of the largest adapters
_STAY_PAUSE_S = 10.0
_SHORT = "too little memory is free now: waiting for more"
_SHORT_PAUSE_S = 3.0  # between looks at memory that others hold
# Free memory comes and goes: only beyond these ratios is it another offer.
_LESS, _MORE = 0.97, 1.1


class Agent:
    """One device; `run` is its whole life."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._trainer = Trainer(settings)
        self._cache = Cache(settings.state_dir / "cache", limit_bytes=settings.cache_limit)
        self._outbox = Outbox(settings.state_dir / "task")
        self._log = get_logger()
        self._baseline: Baseline | None = None
        self._free_floor_bytes = 0
        self._idle_since = time.monotonic()

    def run(self) -> int:
        """Take part until the run is over or a signal comes; returns the exit code.

        Raises:
            FedPrunerError: the device cannot take part; the message says why.
        """
        raise_on_signals()
        with lock_folder(self._settings.state_dir, "fedpruner-agent"):
            return self._take_part()

    def _take_part(self) -> int:
        try:
            connection = Connection(self._settings, self._offer())
            transfers = self._transfers = Transfers(connection)
            heartbeat = Heartbeat(connection, transfers, self._trainer, self._settings)
            try:
                connection.register()
                self._log.info(
                    "joined",
                    server=self._settings.server,
                    name=self._settings.client_id,
                    budget=format_bytes(connection.offer.memory_budget_bytes),
                )
                heartbeat.start()
                return self._loop(connection, heartbeat)
            except Stopped:
                heard()
                self._log.info("stopping")
                return 0
            finally:
                heartbeat.close()
                connection.close()
        except Stopped:
            heard()
            return 0
        finally:
            self._trainer.close()

    def _offer(self) -> Offer:
        """What this device can bring, measured now."""
        self._log.info("measuring what the training process needs before any model")
        before = available_bytes()
        baseline: Baseline = self._trainer.measure()
        # What of its floor costs nothing here: libraries that other processes have loaded, or that
        # another control group pays for.
        taken = max(0, before - available_bytes())
        shared = min(self._trainer.shared_bytes(), baseline.floor_bytes - taken)
        self._free_floor_bytes = max(0, shared)
        budget = self._budget(baseline.available_bytes, baseline.memory_kind)
        if self._settings.memory_budget and budget < self._settings.memory_budget:
            self._log.warning(
                "less memory is free than the configured budget",
                budget=format_bytes(self._settings.memory_budget),
                free=format_bytes(budget),
                limit=baseline.limit,
            )
        self._baseline = baseline
        speed = remembered_bandwidth(self._settings.state_dir)
        return Offer(budget, baseline.floor_bytes, baseline.memory_kind, speed)

    def _budget(self, available: int, memory_kind: str) -> int:
        """What the training process may use of what it could."""
        free = available if memory_kind == "cuda" else available - self._settings.memory_reserve
        return max(0, min(free, self._settings.memory_budget or free))

    def _renew(self, connection: Connection) -> None:
        """Offer what is free now, where that has changed enough to matter."""
        before = connection.offer
        if self._baseline is None or self._baseline.own_limit:
            return
        # What a warm training process holds is among what is used, and would be its own.
        held = self._trainer.resident_bytes() or self._free_floor_bytes
        budget = self._budget(available_bytes() + held, before.memory_kind)
        if not _LESS <= budget / max(1, before.memory_budget_bytes) <= _MORE:
            connection.offer = replace(before, memory_budget_bytes=budget)
            self._log.info(
                "another amount of memory is free",
                before=format_bytes(before.memory_budget_bytes),
                now=format_bytes(budget),
            )

    def _loop(self, connection: Connection, heartbeat: Heartbeat) -> int:
        said = ""
        joined_with = connection.offer
        while True:
            self._renew(connection)
            try:
                answer = connection.pull(wait_s=self._patience_s())
            except BudgetTooSmall as error:
                if connection.offer == joined_with:  # as it will be for ever
                    raise
                if said != _SHORT:
                    self._log.warning(_SHORT, reason=str(error))
                    said = _SHORT
                self._trainer.close()
                time.sleep(_SHORT_PAUSE_S)
                continue
            if isinstance(answer, Finished):
                self._log.info("the run is over", outcome=answer.reason)
                if not self._settings.stay:
                    return 0
                self._idle(heartbeat)
                time.sleep(_STAY_PAUSE_S)
            elif isinstance(answer, Waiting):
                if answer.reason != said:
                    self._log.info(said := answer.reason)
                self._idle(heartbeat)
            else:
                self._work(answer, connection, heartbeat)

    def _patience_s(self) -> float:
        """How long to wait for a task: not past the moment when the training process should go."""
        if not self._trainer.pid:
            return PULL_WAIT_S
        left = self._settings.idle_s - (time.monotonic() - self._idle_since)
        return min(PULL_WAIT_S, max(0.1, left))

    def _idle(self, heartbeat: Heartbeat) -> None:
        """Let the training process go when nothing has come for a while."""
        heartbeat.working_on("", "waiting")
        idle_s = time.monotonic() - self._idle_since
        if self._trainer.pid and idle_s >= self._settings.idle_s:
            self._trainer.close()
            malloc.trim()
            self._log.info(
                "idle: the training process has ended, its memory is free again",
                agent_holds=format_bytes(psutil.Process().memory_info().rss),
            )

    def _work(self, task: Task | ProbeTask, connection: Connection, heartbeat: Heartbeat) -> None:
        """Do one task, or tell the coordinator why not."""
        try:
            if isinstance(task, ProbeTask):
                self._probe(task, connection, heartbeat)
            else:
                self._do(task, connection, heartbeat)
        except Stopped:
            heard()
            _try_report(connection, task.task_id, "the agent was stopped")
            raise
        except StaleRound as error:
            self._log.warning("too late", task=task.task_id, reason=str(error))
        except (Unauthenticated, BudgetTooSmall):
            raise
        except (FedPrunerError, OSError) as failure:
            if heartbeat.in_vain:
                return
            ours = _as_ours(failure)
            reason = describe_failure(ours, budget_bytes=connection.offer.memory_budget_bytes)
            self._log.error("task failed", task=task.task_id, reason=str(ours))
            self._renew(connection)
            out_of_memory = isinstance(ours, OutOfMemory)
            _try_report(connection, task.task_id, reason, out_of_memory=out_of_memory)
            if not isinstance(ours, ChildDied):
                self._trainer.close()
        finally:
            heartbeat.working_on("", "waiting")
            self._idle_since = time.monotonic()

    def _do(self, task: Task, connection: Connection, heartbeat: Heartbeat) -> None:
        self._renew(connection)
        self._check_affordable(task, connection.offer)
        self._log.info(
            "task",
            round=task.round,
            holds=task.submodel.picture(),
            predicted_peak=format_bytes(task.predicted_peak_bytes),
        )
        update = self._outbox.find(connection.run_id, task.task_id)
        if update is None:
            update = self._train(task, connection, heartbeat)
        else:
            self._log.info("this task was trained before the agent ended", round=task.round)
        heartbeat.working_on(task.task_id, "uploading")
        self._transfers.push(update)
        self._outbox.clear()
        metrics = update.metrics
        self._log.info(
            "update sent",
            round=task.round,
            train_loss=f"{metrics.train_loss_first:.3f} -> {metrics.train_loss_last:.3f}",
            peak=format_bytes(metrics.measured_peak_bytes),
        )

    def _train(self, task: Task, connection: Connection, heartbeat: Heartbeat) -> FinishedUpdate:
        heartbeat.working_on(task.task_id, "fetching")
        files = [*task.files, task.bridge_file] if task.bridge_file else task.files
        fetched = self._fetch(
            task.task_id, (*task.tensors, *task.other_tensors), files, task.lora.r
        )
        self._log.info("fetched", round=task.round, size=format_bytes(fetched))
        heartbeat.working_on(task.task_id, "training")

        def progress(values: Json) -> None:
            heartbeat.step, heartbeat.num_steps = values["step"], values["num_steps"]
            heartbeat.train_loss = values["train_loss"]

        metrics, path = self._trainer.train(
            task,
            self._cache,
            progress,
            memory_budget_bytes=connection.offer.memory_budget_bytes,
        )
        return self._outbox.put(connection.run_id, task, metrics, path)

    def _probe(self, task: ProbeTask, connection: Connection, heartbeat: Heartbeat) -> None:
        """Measure the layers on this device's text."""
        self._log.info("measuring the layers", score=task.score)
        heartbeat.working_on(task.task_id, "fetching")
        self._fetch(task.task_id, task.tensors, task.files, task.lora.r)
        heartbeat.working_on(task.task_id, "measuring layers")
        statistics = self._trainer.probe(task, self._cache)
        connection.push_statistics(task.task_id, statistics)

    def _fetch(
        self,
        task_id: str,
        tensors: Sequence[TensorInfo],
        files: Sequence[FileInfo],
        rank: int,
    ) -> int:
        """Have everything a task needs in the cache, and its adapter; returns bytes received."""
        blobs = {tensor.hash: tensor.num_bytes for tensor in tensors}
        blobs |= {file.hash: file.num_bytes for file in files}
        fetched = self._transfers.fetch(blobs, self._cache)
        limit = _ADAPTER_HEADROOM_BYTES + _adapter_limit(tensors, rank)
        adapter_path = self._trainer.adapter_path()
        return fetched + self._transfers.fetch_adapter(task_id, adapter_path, max_bytes=limit)

    @staticmethod
    def _check_affordable(task: Task, offer: Offer) -> None:
        """Never trust the plan alone: refuse what this device did not offer.

        Raises:
            OutOfMemory: the task cannot fit.
        """
        weights = 0 if task.streamed else sum(info.num_bytes for info in task.tensors)
        needed = max(task.predicted_peak_bytes, weights + offer.floor_bytes)
        missing = needed - offer.memory_budget_bytes
        if missing > 0:
            raise OutOfMemory(
                f"the task needs {format_bytes(needed)}, {format_bytes(missing)} more than this "
                "device has free"
            )


def _as_ours(error: FedPrunerError | OSError) -> FedPrunerError:
    """The error as one of our own; the system's, where nobody expected it, are of the disk."""
    return error if isinstance(error, FedPrunerError) else StorageError(str(error))


def _adapter_limit(tensors: Sequence[TensorInfo], rank: int) -> int:
    """More bytes than the adapter can have: rank times the rows and columns of all tensors."""
    return sum(4 * rank * sum(info.shape) for info in tensors)


def _try_report(
    connection: Connection, task_id: str, reason: str, *, out_of_memory: bool = False
) -> None:
    try:
        connection.report_failure(task_id, reason, out_of_memory=out_of_memory)
    except FedPrunerError:
        return  # the lease will tell
