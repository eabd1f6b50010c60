"""A whole run with virtual devices: the coordinator's decisions and the agents' training, no wire.

Everything that decides or computes is the real thing: cohort, plans and aggregation from the
server's core, tasks from `method`, training by the client's `Workshop`, evaluation and bridges by
the coordinator's torch jobs. With the same settings and seeds, and the same number of threads, the
result is that of a run over gRPC, bit for bit.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from fedpruner_client.cache import Cache
from fedpruner_client.model import LocalTensor
from fedpruner_client.workshop import ProbeWork, Work, Workshop
from fedpruner_common.chunks import FileRange
from fedpruner_common.components import ComponentId
from fedpruner_common.errors import BudgetTooSmall, RunFailed
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.modeling.bridges import load_bridges
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Score, Statistics
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind, LoraSettings, Task, UpdateMetrics
from fedpruner_server import method
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.bridge import BridgeFitter
from fedpruner_server.core.aggregation import (
    Adapter,
    Array,
    ClientUpdate,
    ServerState,
    combine,
    initial_adapter,
)
from fedpruner_server.core.cohort import choose_cohort
from fedpruner_server.core.drift import relative_drift
from fedpruner_server.core.planning import ClientPlan, Policy, fit, fit_somehow, plan_round
from fedpruner_server.describe import describe
from fedpruner_server.evaluate import Evaluator
from fedpruner_server.export import export_peft, read_adapter, write_adapter
from fedpruner_server.probe import probe
from fedpruner_simulate.fleet import SimulationSettings, offer_of

T = TypeVar("T")

_BRIDGE_RANK_FOR_USE = 32  # of the bridges a deployed submodel gets


@dataclass(frozen=True)
class RoundResult:
    """What one round brought.

    Attributes:
        number: 1-based.
        plans: of the clients that trained.
        metrics: by client, as an agent would report them.
        bytes_up: adapter bytes that all clients uploaded.
        layer_tokens: layers times tokens that were trained, over all clients; a sweep's forward
            counts as one third of a layer's training.
        losses: of the new adapter on each evaluation file, empty where it was not evaluated.
        left_out: client -> why it had no task.
        seconds: wall clock.
    """

    number: int
    plans: Mapping[str, ClientPlan]
    metrics: Mapping[str, UpdateMetrics]
    bytes_up: int
    layer_tokens: float
    losses: Mapping[str, float]
    left_out: Mapping[str, str]
    seconds: float

    @property
    def loss(self) -> float | None:
        """Mean over the evaluation files, nats per token."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None


@dataclass
class _State:
    """What changes from round to round."""

    adapter: dict[str, Array]
    aggregation: ServerState = field(default_factory=ServerState)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    measured: int | None = None
    adapter_then: dict[str, Array] = field(default_factory=dict)
    held: dict[int, set[ComponentId]] = field(default_factory=dict)


class Tools:
    """What simulations of one process may share: everything that is loaded and does not change."""

    def __init__(self) -> None:
        self.workshop = Workshop(torch.device("cpu"))
        self._kept: dict[str, Any] = {}

    def get(self, key: object, make: Callable[[], T]) -> T:
        """What was made for a key before, or is made now."""
        text = repr(key)
        if text not in self._kept:
            self._kept[text] = make()
        found: T = self._kept[text]
        return found


class Simulation:
    """A fleet and a coordinator in one process.

    Attributes:
        spec: facts of the base model.
        offers: what each device brings.
        losses_base: of the base model on each evaluation file.
    """

    def __init__(
        self, settings: SimulationSettings, work_dir: Path, tools: Tools | None = None
    ) -> None:
        """Read the base model, measure what the devices hold, evaluate the base model.

        Args:
            settings: of the run and the fleet.
            work_dir: for the simulation's files; what is in it is replaced.
            tools: of an earlier simulation in this process.

        Raises:
            FedPrunerError: the model or a file of text cannot be used.
        """
        torch.set_num_threads(settings.threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.settings = settings
        self._work_dir = work_dir
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        self._blocks = BlockStore(settings.model, hash_cache=work_dir / "hashes.json")
        self._cache = _filled_cache(self._blocks, work_dir / "cache")
        self._tools = tools or Tools()
        self.spec: ModelSpec = self._tools.get(
            ("spec", settings.model, settings.lora, settings.training),
            lambda: describe(
                settings.model, self._blocks.tensors, lora=settings.lora, training=settings.training
            ),
        )
        margin = settings.plan.margin
        self.offers = {d.name: offer_of(d, self.spec, margin=margin) for d in settings.devices}
        self._data = {device.name: device.data for device in settings.devices}
        self._workshop = self._tools.workshop
        self._text = (settings.model, settings.data, settings.training.max_seq_length)
        evaluator = self._tools.get(("evaluator", self._text), self._new_evaluator)
        self._evaluator = evaluator
        self.losses_base = (
            self._tools.get(("base", self._text), lambda: evaluator.losses(None))
            if evaluator
            else {}
        )
        shapes = self.spec.adapter_shapes(settings.lora.r)
        self._state = _State(initial_adapter(shapes, seed=settings.run.seed))

    @property
    def adapter(self) -> Adapter:
        """The global adapter, by canonical name."""
        return self._state.adapter

    def run(self, on_round: Callable[[RoundResult], None] = lambda _: None) -> list[RoundResult]:
        """All rounds; `on_round` hears of each when it is done.

        Raises:
            RunFailed: no device can take part in a round.
        """
        results = []
        for number in range(1, self.settings.run.num_rounds + 1):
            results.append(self._round(number))
            on_round(results[-1])
        return results

    def export(self, output_dir: Path) -> None:
        """Write the global adapter as a directory that plain PEFT loads."""
        write_adapter(self._state.adapter, self._work_dir / "adapter.safetensors")
        export_peft(
            self._work_dir / "adapter.safetensors",
            output_dir,
            spec=self.spec,
            lora=self.settings.lora,
            model=self.settings.model,
        )

    def submodel_losses(self, submodel: Submodel, bridge: BridgeKind) -> dict[str, float]:
        """Losses of a submodel as a device would use it, with bridges fitted on public text."""
        assert self._evaluator is not None
        adapter_dir = self._adapter_dir()
        bridges = None
        if bridge is not BridgeKind.OFF and not submodel.is_full:
            path = self._work_dir / "deployed.safetensors"
            fitter = self._bridge_fitter()
            fitter.fit(
                [submodel], [path], kind=bridge, rank=_BRIDGE_RANK_FOR_USE, adapter_dir=adapter_dir
            )
            num_runs = len(submodel.dropped_runs())
            hidden_size = self.spec.memory.hidden_size
            bridges = load_bridges(path, num_runs=num_runs, hidden_size=hidden_size)
        return self._evaluator.losses(adapter_dir, submodel=submodel, bridges=bridges)

    # One round

    def _round(self, number: int) -> RoundResult:
        started = time.monotonic()
        run = self.settings.run
        left_out = self._left_out()
        able = [name for name in self.offers if name not in left_out]
        if not able:
            raise RunFailed(f"no device can take part: {next(iter(left_out.values()))}")
        cohort = choose_cohort(able, run.clients_per_round, seed=run.seed, round_number=number)
        statistics = self._measured(number, cohort)
        ages = method.ages(self._state.held, self.spec.num_layers, before=number)
        results = plan_round(
            self.spec,
            statistics,
            method.plan_settings(self.settings, self.spec),
            [self.offers[name] for name in cohort],
            round_number=number,
            ages=ages,
        )
        plans = {c: p for c, p in results.items() if not isinstance(p, BudgetTooSmall)}
        files = self._fit_bridges(plans)
        updates, metrics = [], {}
        for client_id, plan in plans.items():
            task = self._task(client_id, plan, number)
            metrics[client_id], tensors = self._train(client_id, task, files.get(plan.submodel))
            updates.append(ClientUpdate(client_id, metrics[client_id].num_examples, tensors))
        if updates:
            self._combine(number, updates)
            self._state.held[number] = {c for p in plans.values() for c in p.submodel.components}
        last = number == run.num_rounds
        losses: dict[str, float] = {}
        if self._evaluator and (last or number % run.evaluate_every == 0):
            losses = self._evaluator.losses(self._adapter_dir())
        return RoundResult(
            number=number,
            plans=plans,
            metrics=metrics,
            bytes_up=sum(4 * v.size for u in updates for v in u.tensors.values()),
            layer_tokens=sum(_layer_tokens(plans[c], m) for c, m in metrics.items()),
            losses=losses,
            left_out=left_out,
            seconds=time.monotonic() - started,
        )

    def _left_out(self) -> dict[str, str]:
        """Devices that cannot hold any submodel, and why: they are told so and never drawn."""
        settings = method.plan_settings(self.settings, self.spec)
        reasons = {}
        for name, offer in self.offers.items():
            budget, floor = offer.budget_bytes, offer.floor_bytes
            try:
                fit_somehow(self.spec, settings, budget_bytes=budget, floor_bytes=floor)
            except BudgetTooSmall as error:
                reasons[name] = str(error)
        return reasons

    def _task(self, client_id: str, plan: ClientPlan, number: int) -> Task:
        task = method.make_task(
            self.settings,
            self.spec,
            method.task_plan(plan, None),
            task_id=f"round-{number}-{client_id}",
            number=number,
            tensors=self._blocks.tensors,
            files=self._blocks.files,
        )
        if self.settings.aggregation.method.mixes_ranks:
            task = replace(task, lora=self._smaller_rank(client_id, task.lora))
        return task

    def _smaller_rank(self, client_id: str, lora: LoraSettings) -> LoraSettings:
        """A rank in proportion to the layers that the device could hold; the scaling stays."""
        settings = replace(
            method.plan_settings(self.settings, self.spec), policy=Policy.FEDPRUNER, protect=()
        )
        offer = self.offers[client_id]
        sizes = fit(
            self.spec, settings, budget_bytes=offer.budget_bytes, floor_bytes=offer.floor_bytes
        )
        share = sum(sizes.values()) / (len(sizes) * self.spec.num_layers)
        rank = max(1, round(lora.r * share))
        return replace(lora, r=rank, lora_alpha=lora.lora_alpha * rank / lora.r)

    def _train(
        self, client_id: str, task: Task, bridge_path: Path | None
    ) -> tuple[UpdateMetrics, dict[str, Array]]:
        adapter_path = self._work_dir / "task-adapter.safetensors"
        update_path = self._work_dir / "update.safetensors"
        needs_all = task.bridge.sweeps
        components = self.spec.full().components if needs_all else task.submodel.components
        names = self.spec.adapter_shapes(self.settings.lora.r, components)
        part = {name: _cut(name, self._state.adapter[name], task.lora.r) for name in names}
        write_adapter(part, adapter_path)
        work = Work(
            client_id=client_id,
            submodel=task.submodel,
            lora=task.lora,
            training=task.training,
            bridge=task.bridge,
            streamed=task.streamed,
            tensors=tuple(map(self._local, task.tensors)),
            other_tensors=tuple(map(self._local, task.other_tensors)),
            config_dir=self.settings.model,
            adapter_path=adapter_path,
            bridge_path=bridge_path,
            update_path=update_path,
            data=self._data[client_id],
            work_dir=self._work_dir,
        )
        metrics = self._workshop.do(work, _ignore_step)
        return metrics, read_adapter(update_path)

    def _combine(self, number: int, updates: list[ClientUpdate]) -> None:
        combined = combine(
            self._state.adapter,
            updates,
            settings=method.aggregation_settings(self.settings),
            state=self._state.aggregation,
            round_number=number,
        )
        self._state.adapter = dict(combined.adapter)
        # Through its stored form, as a coordinator's state goes.
        self._state.aggregation = ServerState.from_tensors(combined.state.to_tensors())

    def _adapter_dir(self) -> Path:
        output_dir = self._work_dir / "peft"
        self.export(output_dir)
        return output_dir

    def _local(self, info: TensorInfo) -> LocalTensor:
        return LocalTensor(info, self._cache.path(info.hash))

    # Layer statistics and bridges

    def _measured(
        self, number: int, cohort: tuple[str, ...]
    ) -> Statistics | Mapping[str, Statistics]:
        """The layers' statistics, measured again when it is time."""
        state, source = self._state, self.settings.plan.statistics
        drift = relative_drift(state.adapter_then, state.adapter) if state.adapter_then else 0.0
        due = method.statistics_due(self.settings, number, measured=state.measured, drift=drift)
        asked = method.to_measure(self.settings, cohort, state.statistics, due=due)
        if asked:
            found = self._probe(number, asked)
            state.statistics = method.mixed(self.settings, state.statistics, found)
        if due:
            state.measured, state.adapter_then = number, dict(state.adapter)
        return state.statistics if source == "device" else state.statistics[source]

    def _probe(self, number: int, asked: list[str]) -> dict[str, Statistics]:
        settings = self.settings
        if settings.plan.statistics == "public":
            statistics = probe(
                settings.model,
                self._calibration(),
                granularity=settings.plan.granularity,
                score=settings.plan.importance.value,
                max_seq_length=settings.training.max_seq_length,
                num_sequences=settings.data.num_calibration_sequences,
                seed=settings.run.seed,
                adapter_dir=self._adapter_dir() if number > 1 else None,
                rms_rows=settings.plan.rms_rows,
            )
            return {"public": statistics}
        able = [name for name in asked if self._can_probe(name)]
        if not able:
            raise RunFailed("no device could measure its layers: too little memory for a sweep")
        found = {name: self._probe_device(number, name) for name in able}
        return method.by_source(settings, found, asked)

    def _can_probe(self, name: str) -> bool:
        offer = self.offers[name]
        return method.can_probe(
            self.settings,
            self.spec,
            budget_bytes=offer.budget_bytes,
            floor_bytes=offer.floor_bytes,
        )

    def _probe_device(self, number: int, name: str) -> Statistics:
        task = method.make_probe(
            self.settings,
            self.spec,
            number=number,
            tensors=self._blocks.tensors,
            files=self._blocks.files,
        )
        adapter_path = self._work_dir / "task-adapter.safetensors"
        write_adapter(self._state.adapter, adapter_path)
        found = self._workshop.probe(
            ProbeWork(
                config_dir=self.settings.model,
                num_layers=task.num_layers,
                tensors=tuple(map(self._local, task.tensors)),
                lora=task.lora,
                adapter_path=adapter_path,
                granularity=self.settings.plan.granularity,
                score=Score(task.score),
                num_sequences=task.num_sequences,
                max_seq_length=task.max_seq_length,
                dtype=task.dtype,
                seed=task.seed,
                rms_rows=task.rms_rows,
                data=self._data[name],
            )
        )
        return method.as_sent(found)

    def _fit_bridges(self, plans: Mapping[str, ClientPlan]) -> dict[Submodel, Path]:
        plan = self.settings.plan
        submodels = method.to_bridge(self.settings, (p.submodel for p in plans.values()))
        if not submodels:
            return {}
        paths = [self._work_dir / f"bridges-{i}.safetensors" for i in range(len(submodels))]
        adapter_dir = self._adapter_dir() if self._state.held else None
        self._bridge_fitter().fit(
            submodels, paths, kind=plan.bridge, rank=plan.bridge_rank, adapter_dir=adapter_dir
        )
        return dict(zip(submodels, paths, strict=True))

    def _bridge_fitter(self) -> BridgeFitter:
        return self._tools.get(
            ("fitter", self._text),
            lambda: BridgeFitter(
                self.settings.model,
                self._calibration(),
                max_seq_length=self.settings.training.max_seq_length,
                num_sequences=self.settings.data.num_bridge_sequences,
            ),
        )

    def _calibration(self) -> list[Path]:
        """Files of public text."""
        return list(self.settings.data.calibration or self.settings.data.eval)

    def _new_evaluator(self) -> Evaluator | None:
        if not self.settings.data.eval:
            return None
        return Evaluator(
            self.settings.model,
            list(self.settings.data.eval),
            max_seq_length=self.settings.training.max_seq_length,
            max_sequences=self.settings.data.max_eval_sequences,
        )


def _ignore_step(_step: int, _loss: float) -> None:
    """Nobody watches the steps of a virtual device."""


def _filled_cache(blocks: BlockStore, path: Path) -> Cache:
    """Every base tensor as a file of its own, as in an agent's cache."""
    cache = Cache(path, limit_bytes=1 << 62)
    for info in blocks.tensors.values():
        place: FileRange = blocks.locate(info.hash)
        cache.path(info.hash).parent.mkdir(parents=True, exist_ok=True)
        with place.path.open("rb") as source, cache.path(info.hash).open("wb") as target:
            source.seek(place.start)
            target.write(source.read(place.num_bytes))
    return cache


def _cut(name: str, values: Array, rank: int) -> Array:
    """The first ranks of an adapter tensor."""
    return np.ascontiguousarray(values[:rank] if name.endswith(".lora_A") else values[:, :rank])


def _layer_tokens(plan: ClientPlan, metrics: UpdateMetrics) -> float:
    num_layers = plan.submodel.num_layers
    layers = len(plan.submodel.components) / 2
    if plan.bridge.sweeps:
        layers += (num_layers + layers) / 3
    layers += len(plan.streamed) / 3  # computed again for its backward
    return layers * metrics.num_tokens
