"""The owner of all mutable state: answers the RPCs, feeds events to `core.round`, journals them.

Everything here runs in one event loop, and state changes only between awaits, so there are no
locks. What takes time is done by `run` (aggregation, torch jobs) or in threads.
"""

import asyncio
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpruner_common.adapters import from_peft
from fedpruner_common.components import ComponentId
from fedpruner_common.errors import BudgetTooSmall, InvalidUpdate, ModelError, StaleRound
from fedpruner_common.log import get_logger
from fedpruner_common.rpc import LEASE_S, PULL_WAIT_S
from fedpruner_common.spec import ModelSpec
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings, Task, TrainingSettings, UpdateMetrics
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.config import ServerSettings
from fedpruner_server.core import round as rounds
from fedpruner_server.core import validation
from fedpruner_server.core.planning import ClientPlan, PlanSettings, fit
from fedpruner_server.core.round import Outcome, Phase, Round
from fedpruner_server.core.schedule import learning_rate
from fedpruner_server.core.statistics import Statistics
from fedpruner_server.export import read_adapter
from fedpruner_server.history import ClientRecord, RoundRecord
from fedpruner_server.registry import Device, Registry
from fedpruner_server.storage import Storage, make_durable
from fedpruner_server.tensorfile import read_header

Json = dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """No task yet, and why."""

    reason: str


@dataclass(frozen=True)
class Finished:
    """No task ever again, and how the run ended."""

    reason: str


class Coordinator:
    """Attributes:
    state: preparing, waiting, running, finished or failed; `explanation` says more.
    round: the current round, None before the first.
    adapter_round: the round whose adapter is the global one; 0 before the first.
    """

    def __init__(self, settings: ServerSettings, storage: Storage, blocks: BlockStore) -> None:
        self.settings = settings
        self.storage = storage
        self.blocks = blocks
        self.registry = Registry()
        self.state = "preparing"
        self.explanation = "reading the base model"
        self.spec: ModelSpec | None = None
        self.statistics: Statistics | None = None
        self.loss_base: float | None = None
        self.losses_base: dict[str, float] = {}
        self.history: dict[int, RoundRecord] = {}
        self.round: Round | None = None
        self.adapter_round = 0
        self.effects: asyncio.Queue[rounds.Effect] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._started = time.monotonic()
        self._log = get_logger()

    # What is told to everyone

    def tell(self, state: str, explanation: str) -> None:
        """Change what `status` and waiting agents are told."""
        if (state, explanation) != (self.state, self.explanation):
            self.state, self.explanation = state, explanation
            self._log.info(explanation, state=state)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self, timeout_s: float) -> None:
        """Wait until something changed, at most so long."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except asyncio.TimeoutError:
            return

    # Rounds

    def plan_settings(self) -> PlanSettings:
        plan = self.settings.plan
        return PlanSettings(
            granularity=plan.granularity,
            sample=plan.selection == "sample",
            protect=plan.protect,
            margin=plan.margin,
            seed=self.settings.run.seed,
        )

    def open_round(self, number: int, plans: dict[str, ClientPlan]) -> None:
        """Start a round with these clients; their plans are journaled with it."""
        now = time.time()
        event = rounds.CohortChosen(
            tasks={client_id: f"round-{number}-{client_id}" for client_id in plans},
            quorum=self.settings.run.min_updates,
            deadline=now + self.settings.run.round_deadline_s,
        )
        extra = {
            "started": now,
            "plans": {
                client_id: {
                    "components": [str(component) for component in plan.submodel.components],
                    "predicted_peak_bytes": plan.predicted_peak_bytes,
                    "choices": {f.value: [asdict(c) for c in cs] for f, cs in plan.choices.items()},
                }
                for client_id, plan in plans.items()
            },
        }
        self.round = Round(number)
        self.apply(event, **extra)

    def apply(self, event: rounds.Event, **extra: Any) -> None:
        """Journal an event that changes the round, change it, and queue the effects."""
        assert self.round is not None
        changed, _ = rounds.step(self.round, event)
        if changed == self.round:
            return
        entry = {"event": asdict(event), "extra": extra}
        self.storage.append(self.round.number, type(event).__name__, entry)
        for effect in self._absorb(self.round.number, event, extra):
            self.effects.put_nowait(effect)
        self._wake()

    def _absorb(self, number: int, event: rounds.Event, extra: Json) -> tuple[rounds.Effect, ...]:
        """Change the state by one journaled event; the same code live and after a restart."""
        if self.round is None or self.round.number != number:
            self.round = Round(number)
        self.round, effects = rounds.step(self.round, event)
        if isinstance(event, rounds.CohortChosen):
            record = RoundRecord(self.round, started=extra["started"])
            for client_id, plan in extra["plans"].items():
                components = tuple(plan["components"])
                record.clients[client_id] = ClientRecord(
                    client_id, components, plan["predicted_peak_bytes"]
                )
            self.history[number] = record
        record = self.history[number]
        record.round = self.round
        if isinstance(event, rounds.UpdateStored):
            record.clients[event.client_id].metrics = UpdateMetrics(**extra["metrics"])
            record.clients[event.client_id].bytes_up = extra["bytes_up"]
        if isinstance(event, rounds.Aggregated):
            self.adapter_round = number
        return effects

    def replay(self) -> bool:
        """Take up the run where the journal ends; False if it has not begun.

        The effects of the last event are carried out again, all of them bear repeating.
        """
        effects: tuple[rounds.Effect, ...] = ()
        for entry in self.storage.entries():
            if entry.type == "Evaluated":
                self.note_losses(entry.round, entry.data["losses"])
                continue
            event_class = getattr(rounds, entry.type)
            event: rounds.Event = event_class(**entry.data["event"])
            effects = self._absorb(entry.round, event, entry.data["extra"])
        for effect in effects:
            self.effects.put_nowait(effect)
        return self.round is not None

    def note_losses(self, number: int, losses: dict[str, float]) -> None:
        """Remember the held-out losses of a round's adapter, by file; 0 is the base model's."""
        loss = sum(losses.values()) / len(losses)
        if number == 0:
            self.loss_base, self.losses_base = loss, losses
        else:
            self.history[number].loss, self.history[number].losses = loss, losses

    def tick(self) -> None:
        """What the clock alone brings about: lost clients and deadlines."""
        now = time.monotonic()
        if self.round is None or self.round.phase is not Phase.TRAINING:
            return
        for client_id in self.round.clients(Outcome.WORKING):
            device = self.registry.devices.get(client_id)
            # After a restart nobody is registered: everyone gets one lease to come back.
            last_seen = device.last_seen if device else self._started
            if now - last_seen > LEASE_S:
                self._log.warning("device lost: no heartbeat", client=client_id)
                self.apply(rounds.ClientLost(client_id))
        self.apply(rounds.Tick(time.time()))

    # What agents ask

    def register(
        self, client_id: str, *, memory_budget_bytes: int, floor_bytes: int, memory_kind: str
    ) -> Device:
        device = self.registry.register(
            client_id,
            memory_budget_bytes=memory_budget_bytes,
            floor_bytes=floor_bytes,
            memory_kind=memory_kind,
            now=time.monotonic(),
        )
        self._log.info("device joined", client=client_id, budget_bytes=memory_budget_bytes)
        self._wake()
        return device

    def device(self, client_id: str, session: str) -> Device:
        """The device behind a call."""
        return self.registry.authenticate(client_id, session, now=time.monotonic())

    async def pull(self, device: Device, wait_s: float) -> Task | Waiting | Finished:
        """The device's task; waits for one at most `wait_s`.

        Raises:
            BudgetTooSmall: no submodel fits this device.
        """
        deadline = time.monotonic() + min(wait_s, PULL_WAIT_S)
        while True:
            answer = self._next_for(device)
            left = deadline - time.monotonic()
            if not isinstance(answer, Waiting) or left <= 0:
                return answer
            await self.changed(left)
            device.last_seen = time.monotonic()

    def _next_for(self, device: Device) -> Task | Waiting | Finished:
        device.task_id = ""
        if self.state in ("finished", "failed"):
            device.told_finished = True
            device.activity = "done"
            return Finished(self.explanation)
        self._check_fits(device)
        if self.round is not None and self.round.phase is Phase.TRAINING:
            state = self.round.tasks.get(device.client_id)
            if state is not None and state.outcome in (Outcome.WORKING, Outcome.LOST):
                device.task_id = state.task_id
                return self._task(device)
        device.activity = "waiting"
        return Waiting(self.explanation)

    def _check_fits(self, device: Device) -> None:
        if self.spec is None:
            return
        try:
            fit(
                self.spec,
                self.plan_settings(),
                budget_bytes=device.memory_budget_bytes,
                floor_bytes=device.floor_bytes,
            )
        except BudgetTooSmall as error:
            device.unfit = device.last_failure = str(error)
            raise

    def _task(self, device: Device) -> Task:
        """The task of a client in the current round, from what the journal says of it."""
        assert self.round is not None
        assert self.spec is not None
        number, training = self.round.number, self.settings.training
        record = self.history[number].clients[device.client_id]
        submodel = Submodel.of(self.spec.num_layers, map(ComponentId.parse, record.components))
        device.components = record.components
        device.predicted_peak_bytes = record.predicted_peak_bytes
        lora = self.settings.lora
        return Task(
            task_id=device.task_id,
            round=number,
            submodel=submodel,
            tensors=tuple(self.blocks.tensors[n] for n in self.spec.tensor_names(submodel)),
            files=self.blocks.files,
            lora=LoraSettings(
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=tuple(t.module for t in self.spec.targets(submodel.components)),
            ),
            training=TrainingSettings(
                learning_rate=learning_rate(
                    training.learning_rate,
                    round_number=number,
                    num_rounds=self.settings.run.num_rounds,
                    kind=training.lr_scheduler_type,
                ),
                seed=self.settings.run.seed * 1_000_003 + number,
                **training.model_dump(exclude={"learning_rate", "lr_scheduler_type"}),
            ),
            predicted_peak_bytes=record.predicted_peak_bytes,
        )

    def still_wanted(self, device: Device, task_id: str) -> str:
        """The task a device says it works on, or nothing if its work would be in vain."""
        state = self.round.tasks.get(device.client_id) if self.round else None
        wanted = (
            self.round is not None
            and self.round.phase is Phase.TRAINING
            and state is not None
            and state.task_id == task_id
            and state.outcome in (Outcome.WORKING, Outcome.LOST)
        )
        device.task_id = task_id if wanted else ""
        return device.task_id

    def client_record(self, device: Device, task_id: str) -> ClientRecord:
        """The record of the device's task in the current round.

        Raises:
            StaleRound: the task is not its task of the current round.
        """
        if self.round is None or self.spec is None:
            raise StaleRound("no round has begun")
        state = self.round.tasks.get(device.client_id)
        if state is None or state.task_id != task_id:
            raise StaleRound(f"task {task_id[:80]!r} is not part of round {self.round.number}")
        return self.history[self.round.number].clients[device.client_id]

    def adapter_of(self, device: Device, task_id: str) -> tuple[Path, dict[str, tuple[int, int]]]:
        """The file of the global adapter, and name -> shape of the task's part of it."""
        record = self.client_record(device, task_id)
        assert self.spec is not None
        components = map(ComponentId.parse, record.components)
        shapes = self.spec.adapter_shapes(self.settings.lora.r, components)
        return self.storage.adapter_path(self.adapter_round), shapes

    def count_down(self, device: Device, *, base: int = 0, adapter: int = 0) -> None:
        """Count bytes sent to a device, also for its task of the current round."""
        device.bytes_down += base + adapter
        if self.round is not None:
            record = self.history[self.round.number].clients.get(device.client_id)
            if record is not None:
                record.base_bytes_down += base
                record.adapter_bytes_down += adapter

    def check_update(self, device: Device, *, task_id: str, round_number: int) -> bool:
        """Whether the device's update still has to travel.

        Raises:
            StaleRound: it comes too late, or is not this device's.
        """
        if self.round is None or self.round.number != round_number:
            current = self.round.number if self.round else 0
            raise StaleRound(f"an update for round {round_number}; the current one is {current}")
        return rounds.check_accepts(self.round, client_id=device.client_id, task_id=task_id)

    async def store_update(
        self, device: Device, received: Path, *, task_id: str, metrics: UpdateMetrics
    ) -> None:
        """Judge a received update, make it durable and count it.

        Raises:
            InvalidUpdate: it is not what the task asked for.
            StaleRound: the round ended meanwhile.
        """
        validation.check_metrics(metrics)
        assert self.round is not None
        number = self.round.number
        _, shapes = self.adapter_of(device, task_id)
        await asyncio.to_thread(_check_update_file, received, shapes)
        if not self.check_update(device, task_id=task_id, round_number=number):
            return
        final = self.storage.update_path(number, device.client_id)
        make_durable(received, final)
        bytes_up = final.stat().st_size
        device.measured_peak_bytes = metrics.measured_peak_bytes
        device.train_loss = metrics.train_loss_last
        device.bytes_up += bytes_up
        device.task_id = ""
        event = rounds.UpdateStored(device.client_id)
        self.apply(event, metrics=asdict(metrics), bytes_up=bytes_up)
        self._log.info(
            "update stored",
            client=device.client_id,
            round=number,
            train_loss=round(metrics.train_loss_last, 4),
        )

    def task_failed(self, device: Device, *, task_id: str, reason: str) -> None:
        """Take note that a device cannot do its task."""
        self.client_record(device, task_id)
        device.last_failure = reason
        device.task_id = ""
        self._log.warning("task failed", client=device.client_id, reason=reason)
        self.apply(rounds.TaskFailed(device.client_id, reason))


def _check_update_file(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Names and shapes from the header first, values only then."""
    try:
        found = {from_peft(key): t.info for key, t in read_header(path).items()}
    except (ModelError, ValueError) as error:
        raise InvalidUpdate(
            f"the update is not a safetensors file of LoRA weights: {error}"
        ) from error
    validation.check_tensors(shapes, found)
    validation.check_values(read_adapter(path))
