"""One run from start to end: prepare, rounds, results. Reads as the method does.

Carries out the effects that `core.round` asks for.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from fedpruner_common.errors import BudgetTooSmall, ConfigError, RunFailed, StorageError
from fedpruner_common.log import get_logger
from fedpruner_common.spec import ModelSpec
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.core import round as rounds
from fedpruner_server.core.aggregation import ClientUpdate, aggregate, initial_adapter
from fedpruner_server.core.cohort import choose_cohort
from fedpruner_server.core.planning import ClientPlan, PlanSettings, plan_client
from fedpruner_server.core.round import Phase
from fedpruner_server.core.statistics import Statistics
from fedpruner_server.export import export_peft, read_adapter, write_adapter
from fedpruner_server.registry import Device
from fedpruner_server.torch_worker import TorchWorker

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
                await self._next_round()
            while self._c.state != "finished":
                effect = await self._next_effect(ticking)
                if isinstance(effect, rounds.AssignTasks):
                    self._announce()
                elif isinstance(effect, rounds.Aggregate):
                    await self._aggregate(effect.clients)
                else:
                    await self._close_round(effect)
                    await self._next_round()
        finally:
            ticking.cancel()
            await self._torch.close()

    async def _next_effect(self, ticking: "asyncio.Task[None]") -> rounds.Effect:
        """What to do next; a clock that failed (a full disk, say) ends the run."""
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
            self._c.tick()

    async def _prepare(self) -> None:
        """Facts of the model, layer statistics, the initial adapter, the base model's loss."""
        settings, storage = self._settings, self._storage
        self._check_same_run()
        self._c.tell("preparing", "tracing the base model")
        spec = await self._torch.describe()
        try:
            self._c.plan_settings().protected(spec.num_layers)
        except ValueError as error:
            raise ConfigError(f"setting plan.{error}") from error
        self._c.tell("preparing", "measuring how alike the layers are and what each is worth")
        self._c.statistics = await self._torch.probe()
        if not storage.adapter_path(0).exists():
            adapter = initial_adapter(spec.adapter_shapes(settings.lora.r), seed=settings.run.seed)
            await asyncio.to_thread(write_adapter, adapter, storage.adapter_path(0))
        if settings.data.eval:
            self._c.tell("preparing", "evaluating the base model")
            self._c.note_losses(0, await self._torch.evaluate(None))
        self._c.spec = spec  # from here on devices that are too small are told so
        self._c.tell("waiting", "ready")

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

    async def _close_round(self, effect: rounds.Effect) -> None:
        """Score and save what a round brought."""
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
                losses = await self._torch.evaluate(adapter_dir)
                self._c.note_losses(number, losses)
            if number % run.save_every == 0:
                self._export(self._storage.peft_dir(f"round-{number:04d}"))
            self._storage.drop_updates(number)
        for row in record.rows():
            self._storage.add_metrics(row)
        self._c.close_round(seconds=record.seconds)
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
        history = [record for _, record in sorted(self._c.history.items())]
        done = [record for record in history if record.round.phase is Phase.DONE]
        evaluated = [record for record in done if record.loss is not None]
        assert self._c.spec is not None
        if not self._storage.fact("finished"):  # or this is a second look at a finished run
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
            self._storage.remember("finished", True)
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
