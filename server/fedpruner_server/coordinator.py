"""The owner of all mutable state: feeds events to `core.round` and journals them.

Everything here runs in one event loop, and state changes only between awaits, so there are no
locks. `tasks` answers the agents from this state; `run` carries out the effects.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedpruner_common.components import ComponentId
from fedpruner_common.errors import Unavailable
from fedpruner_common.log import get_logger
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Statistics
from fedpruner_common.task import UpdateMetrics
from fedpruner_server import method, specs
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.clock import Clock
from fedpruner_server.config import ServerSettings
from fedpruner_server.core import round as rounds
from fedpruner_server.core.calibration import Calibration
from fedpruner_server.core.planning import PlanSettings
from fedpruner_server.core.round import Outcome, Phase, Round
from fedpruner_server.history import ClientRecord, RoundRecord, calibration_of
from fedpruner_server.method import TaskPlan
from fedpruner_server.registry import Device, Registry
from fedpruner_server.storage import Storage
from fedpruner_server.survey import Survey

Json = dict[str, Any]

_HELD_UP_S = 2.0  # a tick so late: this process itself was stopped or starved
_CLOSED = "Closed"  # journal entry: the round is evaluated, exported and in metrics.jsonl


class Coordinator:
    """The state of one run, and the only way to change it.

    Attributes:
        state: preparing, waiting, running, finished or failed; `explanation` says more.
        round: the current round, None before the first; `closed` when nothing is left to do for it.
        adapter_round: the round whose adapter is the global one; 0 before the first.
        trouble: why nothing can be stored now, for people; empty when all is well.
        needed_bytes: of disk, for all to be well.
        clock: of deadlines.
    """

    def __init__(self, settings: ServerSettings, storage: Storage, blocks: BlockStore) -> None:
        self.settings = settings
        self.storage = storage
        self.blocks = blocks
        self.registry = Registry(settings.run.lease_s)
        self.state = "preparing"
        self.explanation = "reading the base model"
        self.spec: ModelSpec | None = None
        self.statistics: Statistics | Mapping[str, Statistics] | None = None
        self.survey: Survey | None = None
        self.loss_base: float | None = None
        self.losses_base: dict[str, float] = {}
        self.history: dict[int, RoundRecord] = {}
        self.round: Round | None = None
        self.closed = False
        self.adapter_round = 0
        self.trouble = ""
        self.needed_bytes = settings.transfer.min_free_bytes
        self.clock = Clock()
        self._metrics_bytes: int | None = 0  # of metrics.jsonl up to the last closed round
        self.effects: asyncio.Queue[rounds.Effect] = asyncio.Queue()
        self._calibrations: dict[str, Calibration] = {}
        self._changed, self._announced = asyncio.Event(), asyncio.Event()
        self._started = self._ticked_at = time.monotonic()
        self._log = get_logger()

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, well or not."""
        return self.state in ("finished", "failed")

    @property
    def explanation_with_trouble(self) -> str:
        """What an operator should know: how the run stands, and what is wrong with the disk."""
        if not self.trouble or self.trouble in self.explanation:
            return self.explanation
        return f"{self.explanation}; {self.trouble}"

    def check_room(self, num_bytes: int) -> None:
        """Refuse an update that the disk has no room for; until it has, that is trouble.

        Raises:
            Unavailable: with the bytes.
        """
        needed_bytes = num_bytes + self.settings.transfer.min_free_bytes
        if shortage := self.storage.shortage(needed_bytes):
            self.trouble, self.needed_bytes = shortage, needed_bytes
            raise Unavailable(shortage)

    # What is told to everyone

    def tell(self, state: str, explanation: str) -> None:
        """Change what `status` and waiting agents are told."""
        if (state, explanation) != (self.state, self.explanation):
            self.state, self.explanation = state, explanation
            self._log.info(explanation, state=state)
            self.announce()

    def announce(self) -> None:
        """Let everyone look again, the devices that wait for a task too.

        Not for every change: hundreds of devices may wait, and each looks.
        """
        announced, self._announced = self._announced, asyncio.Event()
        announced.set()
        self.wake()

    def wake(self) -> None:
        """Let the coordinator's own work look again at what it waits for."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def announced(self, timeout_s: float) -> None:
        """Wait until there is news for devices, at most so long."""
        await _within(timeout_s, self._announced)

    async def changed(self, timeout_s: float) -> None:
        """Wait until something changed, at most so long."""
        await _within(timeout_s, self._changed)

    # Rounds

    def plan_settings(self) -> PlanSettings:
        return method.plan_settings(self.settings, self.spec)

    def ages(self) -> dict[ComponentId, int]:
        """Rounds since each component was last part of a new adapter."""
        held = {
            number: {c for client in record.clients.values() if client.metrics
                     for c in client.plan.components}
            for number, record in self.history.items()
            if record.round.phase is Phase.DONE
        }  # fmt: skip
        assert self.spec is not None
        return method.ages(held, self.spec.num_layers, before=len(self.history) + 1)

    def calibration(self, client_id: str) -> Calibration:
        """How the byte model's predictions are corrected for a device."""
        # Kept, since every waiting agent asks whenever anything changes.
        if client_id not in self._calibrations:
            self._calibrations[client_id] = calibration_of(client_id, self.history)
        return self._calibrations[client_id]

    def budget_of(self, device: Device) -> int:
        """What planning may take as the device's budget, after its calibration."""
        if self.spec is None:
            return device.memory_budget_bytes
        return method.calibrated_budget(
            self.plan_settings(),
            self.calibration(device.client_id),
            self.spec,
            budget_bytes=device.memory_budget_bytes,
            floor_bytes=device.floor_bytes,
        )

    def carried(self) -> dict[str, ClientRecord]:
        """Clients whose tasks of the last round go on, as far as they are not too old."""
        if self.round is None:
            return {}
        record = self.history[self.round.number]
        return {
            client_id: record.clients[client_id]
            for client_id in rounds.carried(self.round)
            if self.staleness(record.clients[client_id].base_round)
            <= self.settings.run.max_staleness
        }

    def staleness(self, base_round: int) -> int:
        """New adapters since that of a round."""
        return sum(
            record.round.phase is Phase.DONE and number > base_round
            for number, record in self.history.items()
        )

    def open_round(self, number: int, plans: dict[str, TaskPlan], choices: dict[str, Json]) -> None:
        """Start a round with these clients; their plans are journaled with it.

        Tasks of the last round that are still under way may go on in it.

        Args:
            number: of the round.
            plans: by client.
            choices: by client: why its plan is what it is, enough to replay it.
        """
        now, run = self.clock.now(), self.settings.run
        carried = self.carried()
        tasks = {client_id: f"round-{number}-{client_id}" for client_id in plans}
        if self.round is not None:
            tasks |= {client_id: self.round.tasks[client_id].task_id for client_id in carried}
        event = rounds.CohortChosen(
            tasks=tasks,
            quorum=run.min_updates,
            deadline=now + run.round_deadline_s,
            target=run.buffer_size or (run.clients_per_round if run.over_selection else 0),
            carries=run.late_updates == "next_round",
        )
        extra = {
            "started": now,
            "plans": {
                client_id: {**specs.plan_to_json(plan), "choices": choices[client_id]}
                for client_id, plan in plans.items()
            }
            | {c: specs.plan_to_json(record.plan) for c, record in carried.items()},
            "carried": {c: [r.task_round, r.base_round] for c, r in carried.items()},
        }
        self.round = Round(number)
        self.apply(event, **extra)

    def apply(self, event: rounds.Event, **extra: Any) -> None:
        """Journal an event that changes the round, change it, and queue the effects."""
        self.apply_all([(event, extra)])

    def apply_all(self, events: Sequence[tuple[rounds.Event, Json]]) -> None:
        """The same for some events, in order, with one write to the journal."""
        assert self.round is not None
        number, current = self.round.number, self.round
        entries, effective = [], []
        for event, extra in events:
            changed, _ = rounds.step(current, event)
            if changed != current:
                entries.append((type(event).__name__, {"event": asdict(event), "extra": extra}))
                effective.append((event, extra))
            current = changed
        if not effective:
            return
        self.storage.append_all(number, entries)
        for event, extra in effective:
            for effect in self._absorb(number, event, extra):
                self.effects.put_nowait(effect)
        if any(isinstance(e, (rounds.CohortChosen, rounds.TaskReplaced)) for e, _ in effective):
            self.announce()
        else:
            self.wake()

    def _absorb(self, number: int, event: rounds.Event, extra: Json) -> tuple[rounds.Effect, ...]:
        """Change the state by one journaled event; the same code live and after a restart."""
        if self.round is None or self.round.number != number:
            self.round = Round(number)
        self.round, effects = rounds.step(self.round, event)
        if isinstance(event, rounds.CohortChosen):
            record = RoundRecord(self.round, started=extra["started"])
            carried, new = extra.get("carried", {}), [number, self.adapter_round]
            for client_id, data in extra["plans"].items():
                task_round, base_round = carried.get(client_id, new)
                record.clients[client_id] = ClientRecord(
                    client_id, self._plan_from(data), task_round, base_round
                )
            self.history[number] = record
            self.closed = False
        record = self.history[number]
        record.round = self.round
        if isinstance(event, (rounds.TaskTooLarge, rounds.UpdateStored)):
            self._calibrations.pop(event.client_id, None)
        if isinstance(event, rounds.TaskTooLarge):
            client = record.clients[event.client_id]
            client.too_large.append((client.plan, event.refused))
        if isinstance(event, rounds.TaskReplaced):
            record.clients[event.client_id].plan = self._plan_from(extra["plan"])
            record.clients[event.client_id].base_round = self.adapter_round
        if isinstance(event, rounds.UpdateStored):
            metrics = {**extra["metrics"], "rungs": tuple(extra["metrics"]["rungs"])}
            record.clients[event.client_id].metrics = UpdateMetrics(**metrics)
            record.clients[event.client_id].bytes_up = extra["bytes_up"]
        if isinstance(event, rounds.Aggregated):
            self.adapter_round = number
        return effects

    def _plan_from(self, data: Json) -> TaskPlan:
        """A journaled plan; its bridges can be fetched from now on."""
        plan = specs.plan_from_json(data)
        if plan.bridge_file:
            self.blocks.add_file(plan.bridge_file, self.storage.bridge_path(plan.bridge_file.hash))
        return plan

    def replay(self) -> None:
        """Take up the run where the journal ends.

        The effects of the last event are carried out again, and smaller tasks that were still to be
        planned; all of them bear repeating.
        """
        effects: tuple[rounds.Effect, ...] = ()
        for entry in self.storage.entries():
            if entry.type == _CLOSED:
                self._absorb_close(entry.round, entry.data)
                effects = ()
                continue
            event_class = getattr(rounds, entry.type)
            event: rounds.Event = event_class(**entry.data["event"])
            effects = self._absorb(entry.round, event, entry.data["extra"])
        waiting = self.round.clients(Outcome.SHRINKING) if self.round else ()
        effects = tuple(e for e in effects if not isinstance(e, rounds.Shrink))
        for effect in (*effects, *map(rounds.Shrink, waiting)):
            self.effects.put_nowait(effect)

    def replace_task(self, client_id: str, plan: TaskPlan, choices: Json) -> None:
        """Give a client a smaller task in the current round."""
        assert self.round is not None
        client = self.history[self.round.number].clients[client_id]
        task_id = f"round-{self.round.number}-{client_id}.{len(client.too_large) + 1}"
        data = {**specs.plan_to_json(plan), "choices": choices}
        self.apply(rounds.TaskReplaced(client_id, task_id), plan=data)

    def close_round(self, *, seconds: float) -> None:
        """Write down what the current round was, and journal that nothing is left to do for it."""
        assert self.round is not None
        record = self.history[self.round.number]
        size = self.storage.add_metrics(record.rows(), after_bytes=self._metrics_bytes)
        data = {"seconds": seconds, "losses": record.losses, "metrics_bytes": size}
        self.storage.append(self.round.number, _CLOSED, data)
        self._absorb_close(self.round.number, data)

    def _absorb_close(self, number: int, data: Json) -> None:
        self.closed = True
        self._metrics_bytes = data.get("metrics_bytes")
        self.history[number].seconds = data["seconds"]
        if data["losses"]:
            self.note_losses(number, data["losses"])

    def add_last_metrics(self, row: Json) -> None:
        """The line of metrics.jsonl that says how the run ended."""
        self.storage.add_metrics([row], after_bytes=self._metrics_bytes)

    def last_seen_working(self) -> set[str]:
        """Clients of the last round that were not lost."""
        if self.round is None:
            return set()
        return self.round.tasks.keys() - set(self.round.clients(Outcome.LOST))

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
        self._forgive_silence(now)
        if self.round is None or self.round.phase is not Phase.TRAINING:
            return
        for client_id in self.round.clients(Outcome.WORKING):
            device = self.registry.devices.get(client_id)
            # After a restart nobody is registered: everyone gets one lease to come back.
            last_seen = device.last_seen if device else self._started
            if now - last_seen > self.registry.lease_s:
                self._log.warning("device lost: no heartbeat", client=client_id)
                self.apply(rounds.ClientLost(client_id))
            elif device and now - device.progressed_at > self.settings.run.progress_timeout_s:
                self._give_up(device, now - device.progressed_at)
        self.apply(rounds.Tick(self.clock.now()))

    def _forgive_silence(self, now: float) -> None:
        """Nobody could be heard while this process was held up: that time counts against nobody."""
        held_up_s, self._ticked_at = now - self._ticked_at, now
        if held_up_s > _HELD_UP_S:
            self._log.warning("the coordinator was held up", seconds=round(held_up_s, 1))
            self._started += held_up_s
            self.registry.forgive(held_up_s, now=now)

    def _give_up(self, device: Device, silence_s: float) -> None:
        """Fail the task of a device that lives but gets nowhere."""
        doing = f"{device.activity}, step {device.step} of {device.num_steps}"
        device.last_failure = reason = f"no progress for {silence_s:.0f} s ({doing})"
        self._log.warning("device hangs", client=device.client_id, reason=reason)
        self.apply(rounds.TaskFailed(device.client_id, reason))


async def _within(timeout_s: float, event: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except asyncio.TimeoutError:
        return
