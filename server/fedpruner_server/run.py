"""One run from start to end: prepare, rounds, results. Reads as the method does.

Carries out the effects that `core.round` asks for. Torch work happens in a child process, which
stays warm as long as the run lasts.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpruner_common.child import Child
from fedpruner_common.errors import BudgetTooSmall, ConfigError, RunFailed, StorageError
from fedpruner_common.log import get_logger
from fedpruner_common.spec import ModelSpec
from fedpruner_server import specs
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.core import round as rounds
from fedpruner_server.core.aggregation import ClientUpdate, aggregate, initial_adapter
from fedpruner_server.core.cohort import choose_cohort
from fedpruner_server.core.planning import ClientPlan, PlanSettings, plan_client
from fedpruner_server.core.round import Phase
from fedpruner_server.core.statistics import Statistics
from fedpruner_server.export import export_peft, read_adapter, write_adapter
from fedpruner_server.registry import Device

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
        self._torch = Child(
            "fedpruner_server.torch_jobs",
            log_path=self._storage.state_dir / "torch_jobs.log",
            env={"FEDPRUNER_NUM_THREADS": str(self._settings.num_threads)},
        )

    async def conduct(self) -> None:
        """Prepare, go through the rounds, leave the results.

        Raises:
            FedPrunerError: the run cannot go on; the message says why.
        """
        ticking = asyncio.create_task(self._tick())
        try:
            await self._prepare()
            if not self._c.replay():
                await self._open_round(1)
            while (effect := await self._c.effects.get()) is not None:
                if isinstance(effect, rounds.AssignTasks):
                    self._announce()
                elif isinstance(effect, rounds.Aggregate):
                    await self._aggregate(effect.clients)
                elif await self._close_round(effect):
                    return
        finally:
            ticking.cancel()
            await asyncio.to_thread(self._torch.close)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._c.tick()

    # Before the first round

    async def _prepare(self) -> None:
        """Facts of the model, layer statistics, the initial adapter, the base model's loss."""
        settings, storage, blocks = self._settings, self._storage, self._c.blocks
        identity = {
            "tensors": sorted(info.hash for info in blocks.tensors.values()),
            "lora": settings.lora.model_dump(),
            "seed": settings.run.seed,
        }
        self._check_same_run(identity)
        shape: Json = {
            "model": str(blocks.model_dir),
            "lora": settings.lora.model_dump(),
            "training": settings.training.model_dump(),
        }
        tensors = [{**vars(info), "shape": list(info.shape)} for info in blocks.tensors.values()]
        self._c.tell("preparing", "tracing the base model")
        described = await self._cached_job("describe", {**shape, "tensors": tensors})
        spec = specs.spec_from_json(described)
        try:
            self._c.plan_settings().protected(spec.num_layers)
        except ValueError as error:
            raise ConfigError(f"setting plan.{error}") from error
        self._c.tell("preparing", "measuring how alike the layers are and what each is worth")
        self._c.statistics = await self._probe()
        if not storage.adapter_path(0).exists():
            adapter = initial_adapter(spec.adapter_shapes(settings.lora.r), seed=settings.run.seed)
            await asyncio.to_thread(write_adapter, adapter, storage.adapter_path(0))
        if settings.data.eval:
            self._c.tell("preparing", "evaluating the base model")
            base_losses = storage.fact("losses_base") or await self._evaluate(None)
            storage.remember("losses_base", base_losses)
            self._c.note_losses(0, base_losses)
        self._c.spec = spec  # from here on devices that are too small are told so
        self._c.tell("waiting", "ready")

    def _check_same_run(self, identity: Json) -> None:
        """Refuse a state directory whose adapter belongs to another model or LoRA shape."""
        text = json.dumps(identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        known = self._storage.fact("run")
        if known not in (None, digest):
            raise StorageError(
                f"{self._storage.state_dir} holds a run with another base model, LoRA settings or "
                "seed; give another --state-dir, or delete it to start over"
            )
        self._storage.remember("run", digest)

    async def _probe(self) -> Statistics:
        settings = self._settings
        calibration = settings.data.calibration or settings.data.eval
        if not calibration:
            raise ConfigError(
                "no text to measure the layers on: set data.calibration (--calibration-data) to "
                "some public text, .jsonl or plain; a few thousand words are enough"
            )
        result = await self._cached_job(
            "probe",
            {
                "model": str(self._c.blocks.model_dir),
                "calibration": [str(path) for path in calibration],
                "granularity": settings.plan.granularity.value,
                "score": settings.plan.importance,
                "max_seq_length": settings.training.max_seq_length,
                "num_sequences": settings.data.num_calibration_sequences,
                "seed": settings.run.seed,
            },
        )
        return specs.statistics_from_json(result)

    async def _job(self, job: str, arguments: Json) -> Json:
        return await asyncio.to_thread(self._torch.call, job, arguments)

    async def _cached_job(self, job: str, arguments: Json) -> Json:
        """A torch job whose result is remembered for the same arguments."""
        text = json.dumps(arguments, sort_keys=True)
        key = f"{job} {hashlib.sha256(text.encode()).hexdigest()}"
        result: Json = self._storage.fact(key) or await self._job(job, arguments)
        self._storage.remember(key, result)
        return result

    async def _evaluate(self, adapter_dir: Path | None) -> dict[str, float]:
        settings = self._settings
        arguments = {
            "model": str(self._c.blocks.model_dir),
            "files": [str(path) for path in settings.data.eval],
            "max_seq_length": settings.training.max_seq_length,
            "max_sequences": settings.data.max_eval_sequences,
            "adapter": str(adapter_dir) if adapter_dir else None,
        }
        losses: dict[str, float] = (await self._job("evaluate", arguments))["losses"]
        return losses

    # Rounds

    async def _open_round(self, number: int) -> None:
        """Wait for enough devices, choose who takes part, plan, hand out."""
        while True:
            chosen = await self._gather(number)
            plans = await self._plan(number, chosen)
            if plans:
                self._c.open_round(number, plans)
                return

    async def _gather(self, number: int) -> list[Device]:
        """The cohort, once enough devices are there."""
        run = self._settings.run
        settled = False
        while True:
            available = {d.client_id: d for d in self._c.registry.available(now=time.monotonic())}
            wanted = run.min_available_clients
            if len(available) < wanted:
                settled = False
                self._c.tell("waiting", f"waiting for {_missing(len(available), wanted, self._c)}")
                await self._c.changed(_TICK_S)
            elif number == 1 and not settled:
                settled = True
                await asyncio.sleep(_SETTLE_S)
            else:
                cohort = choose_cohort(
                    available, run.clients_per_round, seed=run.seed, round_number=number
                )
                return [available[client_id] for client_id in cohort]

    async def _plan(self, number: int, devices: list[Device]) -> dict[str, ClientPlan]:
        """A plan for every device that can hold any submodel."""
        spec, statistics, settings = self._c.spec, self._c.statistics, self._c.plan_settings()
        assert spec is not None
        assert statistics is not None
        offers = [(d.client_id, d.memory_budget_bytes, d.floor_bytes) for d in devices]
        plans: dict[str, ClientPlan] = {}
        for device, result in zip(
            devices,
            await asyncio.to_thread(_plan_all, spec, statistics, settings, number, offers),
            strict=True,
        ):
            if isinstance(result, BudgetTooSmall):
                device.unfit = device.last_failure = str(result)
                self._log.warning("device left out", client=device.client_id, reason=str(result))
            else:
                plans[device.client_id] = result
        return plans

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
        record = self._c.history[number]

        def updates() -> Iterator[ClientUpdate]:
            for client_id in clients:
                metrics = record.clients[client_id].metrics
                assert metrics is not None
                tensors = read_adapter(self._storage.update_path(number, client_id))
                yield ClientUpdate(client_id, metrics.num_examples, tensors)

        current = read_adapter(self._storage.adapter_path(self._c.adapter_round))
        write_adapter(aggregate(current, updates()), self._storage.adapter_path(number))

    async def _close_round(self, effect: rounds.Effect) -> bool:
        """Score and save what a round brought, then open the next; True after the last."""
        current, run = self._c.round, self._settings.run
        assert current is not None
        number, last = current.number, current.number >= run.num_rounds
        record = self._c.history[number]
        record.seconds = time.time() - record.started
        if isinstance(effect, rounds.Abandon):
            self._log.warning("round abandoned", round=number, reason=effect.reason)
            self._check_hope(number)
        else:
            adapter_dir = self._storage.peft_dir("latest")
            self._export(adapter_dir)
            if self._settings.data.eval and (last or number % run.evaluate_every == 0):
                losses = await self._evaluate(adapter_dir)
                self._storage.append(number, "Evaluated", {"losses": losses})
                self._c.note_losses(number, losses)
            if number % run.save_every == 0:
                self._export(self._storage.peft_dir(f"round-{number:04d}"))
            self._storage.drop_updates(number)
        for row in record.rows():
            self._storage.add_metrics(row)
        self._log.info("round closed", round=number, loss=record.loss, phase=current.phase.value)
        if last:
            self._finish()
            return True
        await self._open_round(number + 1)
        return False

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
        history = [record for _, record in sorted(self._c.history.items())]
        done = [record for record in history if record.round.phase is Phase.DONE]
        evaluated = [record for record in done if record.loss is not None]
        assert self._c.spec is not None
        self._storage.add_metrics(
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
        self._c.tell("finished", f"the run is complete: {len(done)} of {len(history)} rounds")


def _missing(found: int, wanted: int, coordinator: Coordinator) -> str:
    """What a waiting operator wants to read."""
    text = f"{wanted - found} of {wanted} agents"
    unfit = [d.client_id for d in coordinator.registry.devices.values() if d.unfit]
    if unfit:
        text += f" ({', '.join(sorted(unfit))}: not enough memory, see `fedpruner devices`)"
    return text


def _plan_all(
    spec: ModelSpec,
    statistics: Statistics,
    settings: PlanSettings,
    number: int,
    offers: list[tuple[str, int, int]],
) -> list[ClientPlan | BudgetTooSmall]:
    def plan(client_id: str, budget_bytes: int, floor_bytes: int) -> ClientPlan | BudgetTooSmall:
        try:
            return plan_client(
                spec,
                statistics,
                settings,
                client_id=client_id,
                round_number=number,
                budget_bytes=budget_bytes,
                floor_bytes=floor_bytes,
            )
        except BudgetTooSmall as error:
            return error

    return [plan(*offer) for offer in offers]
