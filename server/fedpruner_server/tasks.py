"""What an agent gets and gives in a round: its task, its part of the adapter, its update.

Answers from the coordinator's state; every change of it goes through `Coordinator.apply`.
"""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from fedpruner_common.adapters import from_peft
from fedpruner_common.chunks import ChunkWriter
from fedpruner_common.errors import (
    BudgetTooSmall,
    Busy,
    InvalidUpdate,
    ModelError,
    StaleRound,
    Unavailable,
)
from fedpruner_common.log import get_logger
from fedpruner_common.manifest import is_content_hash
from fedpruner_common.rpc import PULL_WAIT_S
from fedpruner_common.statistics import Statistics
from fedpruner_common.task import ProbeTask, Task, UpdateMetrics
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.core import round as rounds
from fedpruner_server.core import validation
from fedpruner_server.core.planning import fit_somehow
from fedpruner_server.core.round import Outcome, Phase
from fedpruner_server.export import AdapterFile
from fedpruner_server.history import ClientRecord
from fedpruner_server.method import adapter_components, make_task
from fedpruner_server.receiving import Incoming, complete
from fedpruner_server.registry import Device
from fedpruner_server.storing import Arrived, UpdateStore
from fedpruner_server.tensorfile import read_header


@dataclass(frozen=True)
class Waiting:
    """No task yet, and why."""

    reason: str


@dataclass(frozen=True)
class Finished:
    """No task ever again, and how the run ended."""

    reason: str


@dataclass(frozen=True)
class Claim:
    """What an agent says of an update before it sends it.

    Attributes:
        task_id: whose update it is.
        round: of the task.
        num_bytes: of its safetensors file.
        hash: BLAKE3 of the file, hex.
        metrics: of the training.
    """

    task_id: str
    round: int
    num_bytes: int
    hash: str
    metrics: UpdateMetrics


class Tasks:
    """The agents' side of a coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self.run_id = coordinator.storage.run_id
        self._updates = UpdateStore(coordinator)
        self.lease_s = coordinator.registry.lease_s
        self._log = get_logger()

    def register(
        self,
        client_id: str,
        *,
        memory_budget_bytes: int,
        floor_bytes: int,
        memory_kind: str,
        read_bytes_per_s: int,
    ) -> Device:
        device = self._c.registry.register(
            client_id,
            memory_budget_bytes=memory_budget_bytes,
            floor_bytes=floor_bytes,
            memory_kind=memory_kind,
            read_bytes_per_s=read_bytes_per_s,
            now=time.monotonic(),
        )
        self._log.info("device joined", client=client_id, budget_bytes=memory_budget_bytes)
        self._c.wake()
        return device

    def device(self, client_id: str, session: str) -> Device:
        """The device behind a call."""
        return self._c.registry.authenticate(client_id, session, now=time.monotonic())

    async def pull(
        self, device: Device, wait_s: float, *, memory_budget_bytes: int = 0
    ) -> Task | ProbeTask | Waiting | Finished:
        """The device's task; waits for one at most `wait_s`.

        Args:
            device: that asks.
            wait_s: how long.
            memory_budget_bytes: what it offers by now; 0 for what it offered before.

        Raises:
            BudgetTooSmall: no submodel fits this device.
        """
        self._note_budget(device, memory_budget_bytes)
        deadline = time.monotonic() + min(PULL_WAIT_S, wait_s)
        while True:
            answer = self._next_for(device)
            left = deadline - time.monotonic()
            if not isinstance(answer, Waiting) or left <= 0:
                return answer
            await self._c.announced(left)
            device.last_seen = time.monotonic()

    def _next_for(self, device: Device) -> Task | ProbeTask | Waiting | Finished:
        device.task_id = ""
        if self._c.is_over:
            device.told_finished = True
            device.activity = "done"
            return Finished(self._c.explanation)
        self._check_fits(device)
        if self._c.survey is not None and (probe := self._c.survey.task_of(device.client_id)):
            device.task_id = probe.task_id
            device.activity = "measuring layers"
            return probe
        if (task_id := self._open_task(device)) is not None:
            device.task_id = task_id
            device.progressed_at = time.monotonic()
            return self._task(device)
        device.activity = "waiting"
        return Waiting(self._c.explanation)

    def _open_task(self, device: Device) -> str | None:
        """Id of the device's task in the current round, while an update of it is waited for."""
        current = self._c.round
        if current is None or not (current.phase is Phase.TRAINING or self._carries_on(current)):
            return None
        state = current.tasks.get(device.client_id)
        if state is None or state.outcome not in (Outcome.WORKING, Outcome.LOST):
            return None
        return state.task_id

    def _carries_on(self, current: rounds.Round) -> bool:
        """Whether tasks of a round that has ended may go on in the next."""
        return current.carries and not self._c.is_over

    def _check_fits(self, device: Device) -> None:
        """Refuse a device that has no memory for any submodel.

        Raises:
            BudgetTooSmall: it has not; the message has the missing bytes.
        """
        if self._c.spec is None:
            return
        offered = (
            device.memory_budget_bytes,
            device.floor_bytes,
            self._c.calibration(device.client_id),
        )
        if device.checked is None or device.checked[0] != offered:
            # It asks again and again, and the answer takes its time: remember it.
            device.checked = (offered, self._why_unfit(device))
        device.unfit = device.checked[1]
        if device.unfit:
            device.last_failure = device.unfit
            raise BudgetTooSmall(device.unfit)

    def _why_unfit(self, device: Device) -> str:
        assert self._c.spec is not None
        try:
            fit_somehow(
                self._c.spec,
                self._c.plan_settings(),
                budget_bytes=self._c.budget_of(device),
                floor_bytes=device.floor_bytes,
            )
        except BudgetTooSmall as error:
            return str(error)
        return ""

    def _task(self, device: Device) -> Task:
        """The task of a client in the current round, from what the journal says of it."""
        assert self._c.round is not None
        assert self._c.spec is not None
        record = self._c.history[self._c.round.number].clients[device.client_id]
        device.components = record.components
        device.predicted_peak_bytes = record.predicted_peak_bytes
        return make_task(
            self._c.settings,
            self._c.spec,
            record.plan,
            task_id=device.task_id,
            number=record.task_round,
            tensors=self._c.blocks.tensors,
            files=self._c.blocks.files,
        )

    def store_statistics(self, device: Device, task_id: str, statistics: Statistics) -> None:
        """Take what a device found out about the layers.

        Raises:
            StaleRound: nobody waits for it any more.
            InvalidUpdate: it is not what was asked for.
        """
        survey, spec = self._c.survey, self._c.spec
        if survey is None or spec is None or survey.tasks.get(device.client_id) != task_id:
            raise StaleRound(f"statistics {task_id[:80]!r} are not waited for")
        families = self._c.settings.plan.granularity.families
        max_tokens = survey.probe.num_sequences * survey.probe.max_seq_length
        validation.check_statistics(statistics, families, spec.num_layers, max_tokens=max_tokens)
        survey.results[device.client_id] = statistics
        device.task_id = ""
        self._log.info("layers measured", client=device.client_id)
        self._c.wake()

    def still_wanted(self, device: Device, task_id: str) -> str:
        """The task a device says it works on, or nothing if its work would be in vain."""
        if self._c.survey is not None and (probe := self._c.survey.task_of(device.client_id)):
            wanted: str | None = probe.task_id
        else:
            wanted = self._open_task(device)
        device.task_id = task_id if task_id == wanted else ""
        return device.task_id

    def client_record(self, device: Device, task_id: str) -> ClientRecord:
        """The record of the device's task in the current round.

        Raises:
            StaleRound: the task is not its task of the current round.
        """
        if self._c.round is None or self._c.spec is None:
            raise StaleRound("no round has begun")
        state = self._c.round.tasks.get(device.client_id)
        if state is None or state.task_id != task_id:
            raise StaleRound(f"task {task_id[:80]!r} is not part of round {self._c.round.number}")
        return self._c.history[self._c.round.number].clients[device.client_id]

    def adapter_of(self, device: Device, task_id: str) -> tuple[Path, dict[str, tuple[int, int]]]:
        """The file of the global adapter, and name -> shape of what the task needs of it."""
        storage, spec = self._c.storage, self._c.spec
        survey = self._c.survey
        if survey is not None and survey.tasks.get(device.client_id) == task_id:
            assert spec is not None
            path = storage.adapter_path(self._c.adapter_round)
            return path, spec.adapter_shapes(self._c.settings.lora.r)
        record = self.client_record(device, task_id)
        assert spec is not None
        path = storage.adapter_path(record.base_round)
        components = adapter_components(spec, record.plan)
        return path, spec.adapter_shapes(self._c.settings.lora.r, components)

    def _update_shapes(self, device: Device, task_id: str) -> dict[str, tuple[int, int]]:
        """Name -> shape of the tensors in the task's update."""
        record = self.client_record(device, task_id)
        assert self._c.spec is not None
        return self._c.spec.adapter_shapes(self._c.settings.lora.r, record.plan.components)

    def count_down(self, device: Device, *, base: int = 0, adapter: int = 0) -> None:
        """Count bytes sent to a device, also for its task of the current round."""
        device.bytes_down += base + adapter
        device.progressed_at = time.monotonic()
        if self._c.round is not None:
            record = self._c.history[self._c.round.number].clients.get(device.client_id)
            if record is not None:
                record.base_bytes_down += base
                record.adapter_bytes_down += adapter

    def count_up(self, device: Device, num_bytes: int) -> None:
        """Count bytes that came from a device."""
        device.bytes_up += num_bytes
        device.progressed_at = time.monotonic()

    async def incoming_in_time(
        self, device: Device, claim: Claim, wait_s: float
    ) -> Incoming | None:
        """The same as `incoming`, after the next round has begun if that is what it waits for."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return self.incoming(device, claim)
            except Busy:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                await self._c.announced(left)

    def incoming(self, device: Device, claim: Claim) -> Incoming | None:
        """Where an update is to arrive; None if it is stored already.

        Raises:
            StaleRound: it comes too late, or is not this device's.
            Busy: it is late, and will be welcome in the next round.
            InvalidUpdate: it is larger than its task allows, or what is said of it makes no sense.
            Unavailable: the disk has no room.
        """
        if not self._accepts(device, claim):
            return None
        validation.check_metrics(claim.metrics)
        limit = validation.max_update_bytes(self._update_shapes(device, claim.task_id))
        if claim.num_bytes > limit:
            raise InvalidUpdate(
                f"an update of {claim.num_bytes} bytes, at most {limit} for this task"
            )
        if not is_content_hash(claim.hash):
            raise InvalidUpdate(f"{claim.hash[:80]!r} is not a content hash")
        if self._c.trouble:
            raise Unavailable(self._c.trouble)
        path = self._c.storage.incoming_path(device.client_id, claim.hash)
        incoming = Incoming(path, claim.num_bytes, claim.hash)
        self._c.check_room(claim.num_bytes - incoming.offset())
        return incoming

    def _accepts(self, device: Device, claim: Claim) -> bool:
        """Whether the device's update still has to travel.

        Raises:
            StaleRound: it comes too late, or is not this device's.
        """
        if self._c.round is None or self._c.is_over:
            raise StaleRound("no round is under way")
        awaited = rounds.check_accepts(
            self._c.round, client_id=device.client_id, task_id=claim.task_id
        )
        task_round = self.client_record(device, claim.task_id).task_round
        if claim.round != task_round:
            raise StaleRound(
                f"an update for round {claim.round}; {claim.task_id} is of round {task_round}"
            )
        return awaited

    async def store_update(
        self, device: Device, incoming: Incoming, claim: Claim, writer: ChunkWriter
    ) -> None:
        """Make an update that has arrived durable, judge it and count it.

        Raises:
            CorruptChunk: it is not what its hash promised; nothing of it is kept.
            InvalidUpdate: it is not what the task asked for; nothing of it is kept.
            StaleRound: the round ended meanwhile.
        """
        assert self._c.round is not None
        number = self._c.round.number
        shapes = self._update_shapes(device, claim.task_id)
        await asyncio.to_thread(_complete, writer, incoming, shapes)
        await self._updates.add(
            Arrived(device, claim.task_id, number, incoming.path, claim.num_bytes, claim.metrics)
        )

    def _note_budget(self, device: Device, memory_budget_bytes: int) -> None:
        """Take note of what a device offers by now."""
        if memory_budget_bytes and memory_budget_bytes != device.memory_budget_bytes:
            device.memory_budget_bytes = memory_budget_bytes
            self._log.info(
                "device offers another budget",
                client=device.client_id,
                budget_bytes=memory_budget_bytes,
            )

    def task_failed(
        self,
        device: Device,
        *,
        task_id: str,
        reason: str,
        out_of_memory: bool = False,
        memory_budget_bytes: int = 0,
    ) -> None:
        """Take note that a device cannot do its task.

        Args:
            device: that says so.
            task_id: what it cannot do.
            reason: for people.
            out_of_memory: it is to get a smaller task.
            memory_budget_bytes: what it offers by now; 0 for what it offered before.
        """
        self._note_budget(device, memory_budget_bytes)
        survey = self._c.survey
        if survey is not None and survey.tasks.get(device.client_id) == task_id:
            survey.failed[device.client_id] = reason
            device.last_failure = reason
            device.task_id = ""
            self._log.warning("layers not measured", client=device.client_id, reason=reason)
            self._c.wake()
            return
        record = self.client_record(device, task_id)
        device.last_failure = reason
        device.task_id = ""
        self._log.warning("task failed", client=device.client_id, reason=reason)
        if out_of_memory:
            refused = record.predicted_peak_bytes > device.memory_budget_bytes
            self._c.apply(rounds.TaskTooLarge(device.client_id, reason, refused=refused))
        else:
            self._c.apply(rounds.TaskFailed(device.client_id, reason))


def _complete(writer: ChunkWriter, incoming: Incoming, shapes: dict[str, tuple[int, int]]) -> None:
    complete(writer, incoming)
    try:
        _check_update_file(incoming.path, shapes)
    except InvalidUpdate:
        incoming.path.unlink(missing_ok=True)
        raise


def _check_update_file(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Names and shapes from the header first, values only then."""
    try:
        found = {from_peft(key): t.info for key, t in read_header(path).items()}
    except (ModelError, ValueError) as error:
        raise InvalidUpdate(
            f"the update is not a safetensors file of LoRA weights: {error}"
        ) from error
    validation.check_tensors(shapes, found)
    validation.check_values(AdapterFile(path))
