"""The settings as the method's parts want them, and a client's task from its plan.

The coordinator and `fedpruner simulate` both go through here: what is simulated is what runs.
"""

from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from fedpruner_common.budget import (
    bridge_bytes_per_run,
    predicted_peak_bytes,
    sweep_peak_bytes,
)
from fedpruner_common.components import ComponentId, all_components
from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import FamilyStatistics, Statistics
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import (
    NO_BRIDGE,
    BridgeKind,
    BridgeSettings,
    LoraSettings,
    ProbeTask,
    Task,
    TrainingSettings,
)
from fedpruner_server.config import ServerSettings
from fedpruner_server.core.aggregation import AggregationSettings, trained_factor
from fedpruner_server.core.calibration import UNCALIBRATED, Calibration
from fedpruner_server.core.planning import ClientPlan, PlanSettings
from fedpruner_server.core.pooling import average, smoothed
from fedpruner_server.core.schedule import learning_rate


def bridge_settings(settings: ServerSettings) -> BridgeSettings:
    """How dropped runs are bridged."""
    plan = settings.plan
    return BridgeSettings(
        kind=plan.bridge,
        rank=plan.bridge_rank if plan.bridge is BridgeKind.LOWRANK else 0,
        local=plan.bridge is not BridgeKind.OFF and plan.bridge_data == "local",
        corrected=plan.correction,
    )


def has_public_bridges(settings: ServerSettings) -> bool:
    """Whether the coordinator fits bridges, on public text."""
    return settings.plan.bridge is not BridgeKind.OFF and settings.plan.bridge_data == "public"


def to_bridge(settings: ServerSettings, submodels: Iterable[Submodel]) -> list[Submodel]:
    """The submodels of a round that the coordinator fits bridges for, each once, in order."""
    if not has_public_bridges(settings):
        return []
    return sorted({s for s in submodels if not s.is_full}, key=lambda s: s.components)


def plan_settings(settings: ServerSettings, spec: ModelSpec | None) -> PlanSettings:
    """How submodels are chosen; without a model's facts, the bridges are not counted."""
    plan, bridge = settings.plan, bridge_settings(settings)
    return PlanSettings(
        granularity=plan.granularity,
        sample=plan.selection == "sample",
        protect=plan.protect,
        margin=plan.margin,
        seed=settings.run.seed,
        policy=plan.policy,
        grouping=plan.grouping,
        temperature=plan.temperature,
        floor=plan.floor,
        joint=plan.joint,
        coverage=plan.coverage,
        coverage_kappa=plan.coverage_kappa,
        coverage_rounds=plan.coverage_rounds,
        bridge_bytes_per_run=bridge_bytes_per_run(spec.memory, bridge) if spec else 0,
        bridge=bridge,
        streaming=plan.streaming,
        stream_seconds=plan.stream_seconds,
        batches_per_step=settings.training.gradient_accumulation_steps,
    )


def aggregation_settings(settings: ServerSettings) -> AggregationSettings:
    """How updates become the next adapter."""
    return AggregationSettings(**settings.aggregation.model_dump())


def statistics_due(
    settings: ServerSettings, number: int, *, measured: int | None, drift: float
) -> bool:
    """Whether the layers are to be measured before a round.

    Args:
        settings: of the run.
        number: of the round.
        measured: round before which they were last measured; None for never.
        drift: relative change of the adapter since then.
    """
    if measured is None:
        return True
    every = settings.plan.statistics_every
    if not every or measured >= number:
        return False
    return number - measured >= every or drift > settings.plan.statistics_drift


def to_measure(
    settings: ServerSettings, cohort: Sequence[str], known: Container[str], *, due: bool
) -> list[str]:
    """Devices of a cohort whose layers are to be measured, or for which they are, before a round.

    Args:
        settings: of the run.
        cohort: of the round.
        known: what `mixed` returned before.
        due: whether it is time for all; else only for those that need statistics of their own and
            have none.
    """
    if due:
        return list(cohort)
    if settings.plan.statistics == "device":
        return [name for name in cohort if name not in known]
    return []


def ages(
    held: Mapping[int, Set[ComponentId]], num_layers: int, *, before: int
) -> dict[ComponentId, int]:
    """Rounds since each component was last part of a new adapter; from the start if never.

    Args:
        held: number of a round that brought an adapter -> components that somebody trained.
        num_layers: of the model.
        before: the round that is being planned.
    """
    last = dict.fromkeys(all_components(num_layers), 0)
    for number, components in sorted(held.items()):
        last.update(dict.fromkeys(components, number))
    return {component: before - 1 - number for component, number in last.items()}


@dataclass(frozen=True)
class TaskPlan:
    """What the journal keeps of a client's plan, and what its task is made of.

    Attributes:
        components: of the submodel.
        predicted_peak_bytes: what training them costs.
        bridge: on this device.
        bridge_file: bridges that the coordinator fitted.
        streamed: kept layers that are in memory only while they work.
        model_peak_bytes: what the byte model says, before the device's calibration.
        floor_bytes: of the device's training process, part of both.
    """

    components: tuple[ComponentId, ...]
    predicted_peak_bytes: int
    bridge: BridgeSettings = NO_BRIDGE
    bridge_file: FileInfo | None = None
    streamed: tuple[int, ...] = ()
    model_peak_bytes: int = 0
    floor_bytes: int = 0


def make_task(
    settings: ServerSettings,
    spec: ModelSpec,
    plan: TaskPlan,
    *,
    task_id: str,
    number: int,
    tensors: Mapping[str, TensorInfo],
    files: Iterable[FileInfo],
) -> Task:
    """The task of a client in a round.

    Args:
        settings: of the run.
        spec: of the base model.
        plan: of the client.
        task_id: of the task.
        number: of the round.
        tensors: every tensor of the base model, by name.
        files: its config and tokenizer.
    """
    submodel = Submodel.of(spec.num_layers, plan.components)
    own = spec.tensor_names(submodel)
    sweeps = plan.bridge.sweeps and not submodel.is_full
    others = sorted(set(spec.tensor_names(spec.full())) - set(own)) if sweeps else []
    return Task(
        task_id=task_id,
        round=number,
        submodel=submodel,
        tensors=tuple(tensors[name] for name in own),
        files=tuple(files),
        lora=lora_settings(settings, spec, submodel.components),
        training=training_settings(settings, number, loss_chunk=spec.memory.loss_chunk),
        predicted_peak_bytes=plan.predicted_peak_bytes,
        bridge=plan.bridge,
        other_tensors=tuple(tensors[name] for name in others),
        bridge_file=plan.bridge_file,
        streamed=plan.streamed,
    )


def task_plan(
    plan: ClientPlan,
    bridge_file: FileInfo | None,
    *,
    floor_bytes: int = 0,
    calibration: Calibration = UNCALIBRATED,
) -> TaskPlan:
    """What is kept of a client's plan."""
    return TaskPlan(
        components=plan.submodel.components,
        predicted_peak_bytes=calibration.peak_bytes(plan.predicted_peak_bytes, floor_bytes),
        bridge=plan.bridge,
        bridge_file=bridge_file,
        streamed=plan.streamed,
        model_peak_bytes=plan.predicted_peak_bytes,
        floor_bytes=floor_bytes,
    )


def calibrated_budget(
    plan: PlanSettings,
    calibration: Calibration,
    spec: ModelSpec,
    *,
    budget_bytes: int,
    floor_bytes: int,
) -> int:
    """The budget with which the byte model as it is plans what the calibrated one would."""
    if calibration == UNCALIBRATED:
        return budget_bytes
    nothing = predicted_peak_bytes(spec.memory, (), floor_bytes=0)
    usable = calibration.usable_bytes(
        plan.usable_bytes(budget_bytes), floor_bytes, fixed_bytes=nothing
    )
    return ceil(max(0, usable) / (1 - plan.margin))


def make_probe(
    settings: ServerSettings,
    spec: ModelSpec,
    *,
    number: int,
    tensors: Mapping[str, TensorInfo],
    files: Iterable[FileInfo],
) -> ProbeTask:
    """What devices are asked about the layers before a round; without a task id."""
    full = spec.full()
    return ProbeTask(
        task_id="",
        num_layers=spec.num_layers,
        tensors=tuple(tensors[name] for name in spec.tensor_names(full)),
        files=tuple(files),
        lora=lora_settings(settings, spec, full.components),
        granularity=settings.plan.granularity.value,
        score=settings.plan.importance.value,
        num_sequences=settings.data.num_calibration_sequences,
        max_seq_length=settings.training.max_seq_length,
        dtype=settings.training.dtype,
        seed=_seed_of(settings, number),
        rms_rows=settings.plan.rms_rows,
    )


def can_probe(
    settings: ServerSettings, spec: ModelSpec, *, budget_bytes: int, floor_bytes: int
) -> bool:
    """Whether a device's memory allows a sweep through the full model, which a probe is too."""
    needed = sweep_peak_bytes(spec.memory, BridgeSettings(corrected=True), floor_bytes=floor_bytes)
    return needed <= plan_settings(settings, spec).usable_bytes(budget_bytes)


def by_source(
    settings: ServerSettings, found: Mapping[str, Statistics], asked: Iterable[str]
) -> dict[str, Statistics]:
    """What devices measured, as plans are made with it: of each device, or the cohort's mean."""
    if settings.plan.statistics == "device":
        return of_everyone(found, asked)
    weights = [s.cost.num_tokens if s.cost else 1 for s in found.values()]
    return {"cohort": average(list(found.values()), weights)}


def of_everyone(found: Mapping[str, Statistics], names: Iterable[str]) -> dict[str, Statistics]:
    """Statistics of each device; those that have none get the mean of the others'."""
    mean = average(list(found.values()), [1.0] * len(found))
    return {**{name: mean for name in names if name not in found}, **found}


def as_sent(statistics: Statistics) -> Statistics:
    """A device's statistics in the precision of the wire, float32."""

    def rounded(family: FamilyStatistics) -> FamilyStatistics:
        similarity = family.similarity.astype(np.float32).astype(np.float64)
        importance = np.asarray(family.importance, dtype=np.float32).astype(np.float64)
        return FamilyStatistics(similarity, tuple(importance.tolist()))

    return replace(statistics, families={f: rounded(v) for f, v in statistics.families.items()})


def mixed(
    settings: ServerSettings, old: Mapping[str, Statistics], new: Mapping[str, Statistics]
) -> dict[str, Statistics]:
    """New statistics by source, smoothed with what was known of the same source."""
    found = dict(old)
    for source, statistics in new.items():
        before = old.get(source)
        if before is None or settings.plan.statistics == "device":
            found[source] = statistics
        else:
            found[source] = smoothed(before, statistics)
    return found


def adapter_components(spec: ModelSpec, plan: TaskPlan) -> tuple[ComponentId, ...]:
    """Components whose part of the adapter a task needs: all of them for a sweep."""
    return spec.full().components if plan.bridge.sweeps else plan.components


def lora_settings(
    settings: ServerSettings, spec: ModelSpec, components: Iterable[ComponentId]
) -> LoraSettings:
    """LoRA on these components."""
    return LoraSettings(
        r=settings.lora.r,
        lora_alpha=settings.lora.lora_alpha,
        lora_dropout=settings.lora.lora_dropout,
        target_modules=tuple(t.module for t in spec.targets(components)),
    )


def training_settings(
    settings: ServerSettings, number: int, *, loss_chunk: int = 0
) -> TrainingSettings:
    """What every device does in a round; `auto` among the settings is `loss_chunk`."""
    training = settings.training
    factor = trained_factor(settings.aggregation.method, number)
    return TrainingSettings(
        learning_rate=learning_rate(
            training.learning_rate,
            round_number=number,
            num_rounds=settings.run.num_rounds,
            kind=training.lr_scheduler_type,
        ),
        seed=_seed_of(settings, number),
        train_factor=factor.value,
        loss_chunk=loss_chunk,
        **training.model_dump(exclude={"learning_rate", "lr_scheduler_type", "loss_chunk"}),
    )


def _seed_of(settings: ServerSettings, number: int) -> int:
    """Of what devices draw in a round."""
    return settings.run.seed * 1_000_003 + number
