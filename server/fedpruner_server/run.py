"""One run from start to end: prepare, rounds, results. Reads as the method does.

Carries out the effects that `core.round` asks for.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedpruner_common.errors import BudgetTooSmall, ConfigError, RunFailed, StorageError
from fedpruner_common.log import get_logger
from fedpruner_common.manifest import FileInfo
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Statistics, statistics_from_json, statistics_to_json
from fedpruner_common.submodel import Submodel
from fedpruner_server import method
from fedpruner_server.blockstore import file_info
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.core import round as rounds
from fedpruner_server.core.aggregation import (
    Adapter,
    ClientUpdate,
    combine,
    initial_adapter,
)
from fedpruner_server.core.cohort import choose_cohort, cohort_size
from fedpruner_server.core.coverage import Coverage
from fedpruner_server.core.drift import relative_drift
from fedpruner_server.core.planning import (
    ClientPlan,
    Offer,
    PlanSettings,
    left_uncovered,
    plan_round,
)
from fedpruner_server.core.round import Outcome, Phase
from fedpruner_server.core.staleness import Rebased, discount
from fedpruner_server.export import (
    AdapterFile,
    export_peft,
    read_adapter,
    read_state,
    write_adapter,
    write_state,
)
from fedpruner_server.method import TaskPlan
from fedpruner_server.registry import Device, DeviceState
from fedpruner_server.specs import choices_to_json
from fedpruner_server.storage import is_about_disk, make_durable
from fedpruner_server.survey import Survey
from fedpruner_server.torch_worker import TorchWorker

Json = dict[str, Any]

_TICK_S = 0.5
_SETTLE_S = 1.0  # after the last needed device joined: others are often just behind


class Run:
    """The work of a coordinator; `conduct` is all of it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._settings = coordinator.settings
        self._storage = coordinator.storage
        self._log = get_logger()
        self._torch = TorchWorker(coordinator.settings, coordinator.storage, coordinator.blocks)

    async def conduct(self) -> None:
        """Prepare, go through the rounds, leave the results.

        Raises:
            FedPrunerError: the run cannot go on; the message says why.
        """
        ticking = asyncio.create_task(self._tick())
        try:
            await self._prepare()
            self._c.replay()
            if self._c.round is None or self._c.closed:
                await self._when_disk_permits(self._next_round)
            while self._c.state != "finished":
                effect = await self._next_effect(ticking)
                await self._when_disk_permits(partial(self._carry_out, effect))
        finally:
            ticking.cancel()
            await self._torch.close()

    async def _carry_out(self, effect: rounds.Effect) -> None:
        if isinstance(effect, rounds.AssignTasks):
            self._announce()
        elif isinstance(effect, rounds.Aggregate):
            await self._aggregate(effect.clients)
        elif isinstance(effect, rounds.Shrink):
            await self._shrink(effect.client_id)
        else:
            if not self._c.closed:
                await self._close_round(effect)
            await self._next_round()

    async def _when_disk_permits(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it, as often as it takes: nothing is lost when the disk is full, the run waits.

        Everything that an effect asks for bears repeating; a restart relies on it too.
        """
        while True:
            try:
                return await work()
            except (StorageError, OSError) as error:
                if not is_about_disk(error):
                    raise
                reason = str(error)
            before = (self._c.state, self._c.explanation)
            self._log.error("the run waits for its disk", reason=reason)
            self._c.trouble = self._c.trouble or "the coordinator cannot write to its disk"
            while self._c.trouble:
                self._c.tell(self._c.state, f"waiting for the disk: {self._c.trouble}")
                await self._c.changed(_TICK_S)
            self._c.tell(*before)

    async def _next_effect(self, ticking: "asyncio.Task[None]") -> rounds.Effect:
        """What to do next; a clock that failed ends the run."""
        getting = asyncio.create_task(self._c.effects.get())
        try:
            await asyncio.wait({getting, ticking}, return_when=asyncio.FIRST_COMPLETED)
            if ticking.done():
                ticking.result()
            return await getting
        finally:
            getting.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._c.tick()
            except StorageError as error:
                self._c.trouble = "the coordinator cannot write its journal"
                self._log.error("the clock waits for the disk", reason=str(error))

    async def _prepare(self) -> None:
        """Facts of the model, the initial adapter, the base model's loss."""
        settings, storage = self._settings, self._storage
        self._check_same_run()
        self._c.tell("preparing", "tracing the base model")
        spec = await self._torch.describe()
        self._check_options(spec)
        if settings.plan.statistics == "public":
            self._c.tell("preparing", "measuring how alike the layers are and what each is worth")
            self._c.statistics = await self._torch.probe(None)
        if not storage.adapter_path(0).exists():
            adapter = initial_adapter(spec.adapter_shapes(settings.lora.r), seed=settings.run.seed)
            await asyncio.to_thread(write_adapter, adapter, storage.adapter_path(0))
        if settings.data.eval:
            self._c.tell("preparing", "evaluating the base model")
            self._c.note_losses(0, await self._torch.evaluate(None))
        self._c.spec = spec  # from here on devices that are too small are told so
        self._c.tell("waiting", "ready")

    def _check_options(self, spec: ModelSpec) -> None:
        """Refuse options that this model or a real run cannot have."""
        aggregation = self._settings.aggregation
        try:
            self._c.plan_settings().protected(spec.num_layers)
        except ValueError as error:
            raise ConfigError(f"setting plan.{error}") from error
        if aggregation.method.mixes_ranks:
            raise ConfigError(
                f"aggregation.method = {aggregation.method.value!r} gives every device another "
                "LoRA rank, which only `fedpruner simulate` does: it is there to compare with"
            )
        if method.has_public_bridges(self._settings):
            self._torch.calibration()

    def _check_same_run(self) -> None:
        """Refuse a state directory whose adapter belongs to another model or LoRA shape."""
        identity = {
            "tensors": sorted(info.hash for info in self._c.blocks.tensors.values()),
            "lora": self._settings.lora.model_dump(),
            "seed": self._settings.run.seed,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if self._storage.fact("run") not in (None, digest):
            raise StorageError(
                f"{self._storage.state_dir} holds a run with another base model, LoRA settings or "
                "seed; give another --state-dir, or delete it to start over"
            )
        self._storage.remember("run", digest)

    async def _next_round(self) -> None:
        """Wait for enough devices, choose who takes part, plan, hand out; or finish."""
        number = self._c.round.number + 1 if self._c.round else 1
        if number > self._settings.run.num_rounds:
            self._finish()
            return
        while True:
            chosen = await self._gather(number)
            plans, choices = await self._plan(number, chosen) if chosen else ({}, {})
            if plans or self._c.carried():
                self._c.open_round(number, plans, choices)
                return

    async def _gather(self, number: int) -> list[Device]:
        """The cohort, once enough devices are there; empty if only late tasks go on.

        Raises:
            RunFailed: they did not come.
        """
        run = self._settings.run
        settled = False
        began = time.monotonic()
        while True:
            now, carried = time.monotonic(), self._c.carried()
            available = {
                d.client_id: d
                for d in self._c.registry.available(now=now)
                if d.client_id not in carried
            }
            found, wanted = len(available) + len(carried), run.min_available_clients
            if found < wanted:
                settled = False
                waiting = f"waiting for {_missing(found, wanted, self._c)}"
                self._c.tell("waiting", waiting)
                if now - began > run.gather_deadline_s:
                    heard = _last_heard(self._c, now)
                    raise RunFailed(f"gave up {waiting} after {run.gather_deadline_s:g} s{heard}")
                await self._c.changed(_TICK_S)
            elif number == 1 and not settled:
                settled = True
                await asyncio.sleep(_SETTLE_S)
            else:
                size = cohort_size(
                    run.clients_per_round, extra=run.over_selection, busy=len(carried)
                )
                if size is None:
                    return []
                cohort = choose_cohort(available, size, seed=run.seed, round_number=number)
                return [available[client_id] for client_id in cohort]

    async def _plan(
        self, number: int, devices: list[Device]
    ) -> tuple[dict[str, TaskPlan], dict[str, Json]]:
        """A plan for every device that can hold any submodel, and why it is what it is."""
        await self._measure_layers(number, devices)
        if isinstance(self._c.statistics, Mapping):
            devices = [d for d in devices if d.client_id in self._c.statistics]
        results = await self._submodels(number, devices)
        self._warn_of_uncovered(results, self._c.plan_settings())
        return await self._task_plans(results)

    async def _submodels(
        self, number: int, devices: Sequence[Device]
    ) -> dict[str, ClientPlan | BudgetTooSmall]:
        """What each of these devices would hold; those that can hold nothing are told why."""
        spec, statistics = self._c.spec, self._c.statistics
        assert spec is not None
        assert statistics is not None
        results = await asyncio.to_thread(
            plan_round,
            spec,
            statistics,
            self._c.plan_settings(),
            [
                Offer(d.client_id, self._c.budget_of(d), d.floor_bytes, d.read_bytes_per_s)
                for d in devices
            ],
            round_number=number,
            ages=self._c.ages(),
        )
        for device in devices:
            result = results[device.client_id]
            if isinstance(result, BudgetTooSmall):
                device.unfit = device.last_failure = str(result)
                self._log.warning("device left out", client=device.client_id, reason=str(result))
        return results

    async def _task_plans(
        self, results: Mapping[str, ClientPlan | BudgetTooSmall]
    ) -> tuple[dict[str, TaskPlan], dict[str, Json]]:
        """What goes to the journal of those that hold something, by client; bridges are fitted."""
        plans = {c: plan for c, plan in results.items() if isinstance(plan, ClientPlan)}
        files = await self._fit_bridges(plan.submodel for plan in plans.values())
        task_plans = {
            client_id: method.task_plan(
                plan,
                files.get(plan.submodel),
                floor_bytes=self._c.registry.devices[client_id].floor_bytes,
                calibration=self._c.calibration(client_id),
            )
            for client_id, plan in plans.items()
        }
        return task_plans, {c: choices_to_json(plan) for c, plan in plans.items()}

    async def _returned(self, client_id: str) -> Device | None:
        """The device; after a restart of the coordinator it has a lease to say what it offers."""
        deadline = time.monotonic() + self._settings.run.lease_s
        while (device := self._c.registry.devices.get(client_id)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            await self._c.changed(min(left, _TICK_S))
        return device

    async def _shrink(self, client_id: str) -> None:
        """Give a device that ran out of memory a smaller task, or go on without it."""
        device = await self._returned(client_id)
        current = self._c.round
        assert current is not None
        task = current.tasks[client_id]
        if current.phase is not Phase.TRAINING or task.outcome is not Outcome.SHRINKING:
            return
        if device is None:
            self._c.apply(rounds.TaskFailed(client_id, f"{task.reason}; it did not come back"))
            return
        results = await self._submodels(current.number, [device])
        plans, choices = await self._task_plans(results)
        if client_id not in plans:
            reason = f"{task.reason}; nothing smaller is possible"
            self._c.apply(rounds.TaskFailed(client_id, reason))
            return
        self._c.replace_task(client_id, plans[client_id], choices[client_id])
        self._log.warning(
            "smaller task",
            round=current.number,
            client=client_id,
            components=len(plans[client_id].components),
            reason=task.reason,
        )

    def _warn_of_uncovered(
        self, results: Mapping[str, ClientPlan | BudgetTooSmall], settings: PlanSettings
    ) -> None:
        if settings.coverage is not Coverage.HARD:
            return
        left = left_uncovered(results, self._c.ages(), coverage_rounds=settings.coverage_rounds)
        if left:
            names = ", ".join(map(str, left))
            self._log.warning("no device of this round has room for overdue layers", layers=names)

    async def _fit_bridges(self, submodels: Iterable[Submodel]) -> dict[Submodel, FileInfo]:
        """Bridges on public text for each submodel, among the blobs that devices may fetch."""
        pruned = method.to_bridge(self._settings, submodels)
        if not pruned:
            return {}
        folder = self._storage.bridge_path("new").parent
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"new-{index}.tmp" for index in range(len(pruned))]
        await self._torch.fit_bridges(pruned, paths, adapter_dir=self._adapter_dir())
        files = {}
        for submodel, path in zip(pruned, paths, strict=True):
            info = replace(file_info(path), name="bridges.safetensors")
            make_durable([(path, self._storage.bridge_path(info.hash))])
            self._c.blocks.add_file(info, self._storage.bridge_path(info.hash))
            files[submodel] = info
        return files

    def _adapter_dir(self) -> Path | None:
        """The newest adapter, exported; None before the first round."""
        return self._storage.peft_dir("latest") if self._c.adapter_round else None

    # Layer statistics

    async def _measure_layers(self, number: int, devices: list[Device]) -> None:
        """Measure the layers again when it is time, on public text or on the devices."""
        plan = self._settings.plan
        nothing: Json = {"round": None, "adapter": None}
        measured_as = [plan.statistics, plan.granularity.value, plan.importance.value]
        remembered: Json = self._storage.fact("statistics") or nothing
        if remembered.get("as") != measured_as:  # the settings have changed since
            remembered = nothing
        drift = await asyncio.to_thread(self._drift_since, remembered["adapter"])
        due = method.statistics_due(
            self._settings, number, measured=remembered["round"], drift=drift
        )
        known: Json = remembered.get("of", {})
        cohort = [d.client_id for d in devices]
        asked = method.to_measure(self._settings, cohort, known, due=due)
        if not asked:
            if known:
                self._c.statistics = self._statistics_from(remembered)
            return
        source = plan.statistics
        self._c.tell("running", f"round {number}: measuring the layers ({source})")
        if source == "public":
            found = {"public": await self._torch.probe(self._adapter_dir())}
        else:
            able = self._able_to_probe([d for d in devices if d.client_id in asked])
            found = await self._survey(number, able)
        self._log_costs(number, found)
        if source != "public":
            found = method.by_source(self._settings, found, asked)
        old = {k: statistics_from_json(v) for k, v in known.items()}
        mixed = method.mixed(self._settings, old, found)
        fact = {
            "round": number if due else remembered["round"],
            "adapter": self._c.adapter_round if due else remembered["adapter"],
            "as": measured_as,
            "of": {k: statistics_to_json(v) for k, v in mixed.items()},
        }
        self._storage.remember("statistics", fact)
        self._c.statistics = self._statistics_from(fact)

    def _log_costs(self, number: int, found: Mapping[str, Statistics]) -> None:
        for name, statistics in found.items():
            if cost := statistics.cost:
                self._log.info(
                    "layers measured",
                    round=number,
                    on=name,
                    seconds=round(cost.seconds, 2),
                    tokens=cost.num_tokens,
                    bytes_read=cost.bytes_read,
                )

    def _able_to_probe(self, devices: list[Device]) -> list[Device]:
        spec = self._c.spec
        assert spec is not None
        return [
            d
            for d in devices
            if method.can_probe(
                self._settings,
                spec,
                budget_bytes=d.memory_budget_bytes,
                floor_bytes=d.floor_bytes,
            )
        ]

    def _statistics_from(self, fact: Json) -> Statistics | dict[str, Statistics]:
        """Of one source for all devices, or of each device."""
        found = {k: statistics_from_json(v) for k, v in fact["of"].items()}
        source = self._settings.plan.statistics
        return found if source == "device" else found[source]

    def _drift_since(self, adapter_round: int | None) -> float:
        """Relative change of the adapter since that of a round, with which layers were measured."""
        if adapter_round is None or not self._c.adapter_round:
            return 0.0
        then = read_adapter(self._storage.adapter_path(adapter_round))
        now = read_adapter(self._storage.adapter_path(self._c.adapter_round))
        return relative_drift(then, now)

    async def _survey(self, number: int, devices: list[Device]) -> dict[str, Statistics]:
        """Statistics of the devices that answer before the deadline.

        Raises:
            RunFailed: none did.
        """
        spec = self._c.spec
        assert spec is not None
        tasks = {d.client_id: f"probe-{number}-{d.client_id}" for d in devices}
        probe = method.make_probe(
            self._settings,
            spec,
            number=number,
            tensors=self._c.blocks.tensors,
            files=self._c.blocks.files,
        )
        survey = self._c.survey = Survey(tasks, probe)
        self._c.announce()
        deadline = time.monotonic() + self._settings.run.round_deadline_s
        try:
            while time.monotonic() < deadline:
                now, registry = time.monotonic(), self._c.registry
                alive = [
                    d.client_id
                    for d in devices
                    if registry.state(d, now=now) is not DeviceState.LOST
                ]
                if not survey.waiting_for(alive):
                    break
                await self._c.changed(_TICK_S)
        finally:
            self._c.survey = None
        if not survey.results:
            reasons = "; ".join(f"{c}: {r}" for c, r in survey.failed.items()) or "no answer"
            raise RunFailed(f"no device could measure its layers ({reasons})")
        return survey.results

    def _announce(self) -> None:
        current = self._c.round
        assert current is not None
        total = self._settings.run.num_rounds
        for client_id, client in sorted(self._c.history[current.number].clients.items()):
            self._log.info(
                "task",
                round=current.number,
                client=client_id,
                components=len(client.components),
                predicted_peak_bytes=client.predicted_peak_bytes,
            )
        self._c.tell(
            "running", f"round {current.number} of {total}: {len(current.tasks)} devices train"
        )

    async def _aggregate(self, clients: tuple[str, ...]) -> None:
        """Combine the stored updates into the next global adapter and make it durable."""
        current = self._c.round
        assert current is not None
        await asyncio.to_thread(self._combine, current.number, clients)
        self._c.apply(rounds.Aggregated())

    def _combine(self, number: int, clients: tuple[str, ...]) -> None:
        record, storage = self._c.history[number], self._storage
        before = self._c.adapter_round
        current = read_adapter(storage.adapter_path(before))
        updates = []
        for client_id in clients:
            client = record.clients[client_id]
            assert client.metrics is not None
            tensors: Adapter = AdapterFile(storage.update_path(number, client_id))
            if staleness := self._c.staleness(client.base_round):
                tensors = Rebased(
                    tensors,
                    base=AdapterFile(storage.adapter_path(client.base_round)),
                    current=current,
                    weight=discount(staleness, self._settings.run.staleness_exponent),
                )
            updates.append(ClientUpdate(client_id, client.metrics.num_examples, tensors))
        combined = combine(
            current,
            updates,
            settings=method.aggregation_settings(self._settings),
            state=read_state(storage.state_path(before)),
            round_number=number,
        )
        write_state(combined.state, storage.state_path(number))
        write_adapter(combined.adapter, storage.adapter_path(number))
        record.fedit_error = combined.report.fedit_error
        if combined.report.left_alone:
            self._log.info(
                "too few devices trained some modules: they keep their values",
                round=number,
                modules=len(combined.report.left_alone),
            )

    async def _close_round(self, effect: rounds.Effect) -> None:
        """Score and save what a round brought."""
        current, run = self._c.round, self._settings.run
        assert current is not None
        number, last = current.number, current.number >= run.num_rounds
        record = self._c.history[number]
        record.seconds = self._c.clock.now() - record.started
        if isinstance(effect, rounds.Abandon):
            self._log.warning("round abandoned", round=number, reason=effect.reason)
            self._check_hope(number)
        else:
            adapter_dir = self._storage.peft_dir("latest")
            self._export(adapter_dir)
            if self._settings.data.eval and (last or number % run.evaluate_every == 0):
                losses = await self._torch.evaluate(adapter_dir)
                self._c.note_losses(number, losses)
            if number % run.save_every == 0:
                self._export(self._storage.peft_dir(f"round-{number:04d}"))
            self._storage.drop_updates(number)
        self._c.close_round(seconds=record.seconds)
        self._storage.drop_bridges()
        self._log.info("round closed", round=number, loss=record.loss, phase=current.phase.value)

    def _check_hope(self, number: int) -> None:
        """End the run when rounds keep failing."""
        limit = self._settings.run.max_abandoned_rounds
        recent = [self._c.history[n] for n in range(max(1, number - limit + 1), number + 1)]
        if len(recent) == limit and all(r.round.phase is Phase.ABANDONED for r in recent):
            reason = recent[-1].round.explanation
            raise RunFailed(f"{limit} rounds in a row brought nothing; the last: {reason}")

    def _export(self, output_dir: Path) -> None:
        spec = self._c.spec
        assert spec is not None
        export_peft(
            self._storage.adapter_path(self._c.adapter_round),
            output_dir,
            spec=spec,
            lora=self._settings.lora,
            model=self._c.blocks.model_dir,
        )

    def _finish(self) -> None:
        """Leave the results: the adapter, and a last line in metrics.jsonl."""
        final_dir = self._storage.peft_dir("final")
        self._export(final_dir)
        self._storage.drop_incoming()
        history = [record for _, record in sorted(self._c.history.items())]
        done = [record for record in history if record.round.phase is Phase.DONE]
        evaluated = [record for record in done if record.loss is not None]
        assert self._c.spec is not None
        if not self._storage.fact("finished"):  # or this is a second look at a finished run
            self._c.add_last_metrics(
                {
                    "type": "run",
                    "rounds": len(done),
                    "loss_base": self._c.loss_base,
                    "losses_base": self._c.losses_base,
                    "loss_final": evaluated[-1].loss if evaluated else self._c.loss_base,
                    "losses_final": evaluated[-1].losses if evaluated else self._c.losses_base,
                    "num_components_total": len(self._c.spec.full().components),
                    "model": str(self._c.blocks.model_dir),
                    "adapter_dir": str(final_dir.resolve()),
                }
            )
            self._storage.remember("finished", True)
        self._c.tell("finished", f"the run is complete: {len(done)} of {len(history)} rounds")


def _missing(found: int, wanted: int, coordinator: Coordinator) -> str:
    """What a waiting operator wants to read."""
    text = f"{wanted - found} of {wanted} agents"
    unfit = [d.client_id for d in coordinator.registry.devices.values() if d.unfit]
    if unfit:
        text += f" ({', '.join(sorted(unfit))}: not enough memory, see `fedpruner devices`)"
    return text


def _last_heard(coordinator: Coordinator, now: float) -> str:
    """What became of the devices that were there."""
    lease_s, devices = coordinator.registry.lease_s, coordinator.registry.devices.values()
    lost = [d for d in devices if now - d.last_seen > lease_s]
    heard = [f"{d.client_id} was last heard {now - d.last_seen:.0f} s ago" for d in lost]
    return f" ({'; '.join(sorted(heard))})" if heard else ""
