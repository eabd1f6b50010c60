"""Budgets -> a submodel per client.

How many items a client keeps (K) follows from its budget and the byte model; which ones, from
functional groups (macro step) and importance within each group (micro step).
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedpruner_common.budget import (
    Demand,
    largest_that_fits,
    peak_bytes,
    predicted_peak_bytes,
)
from fedpruner_common.components import ComponentId
from fedpruner_common.errors import BudgetTooSmall
from fedpruner_common.spec import ModelSpec
from fedpruner_common.submodel import Submodel
from fedpruner_common.units import format_bytes
from fedpruner_server.core.grouping import spectral_groups
from fedpruner_server.core.selection import Choice, choose
from fedpruner_server.core.statistics import Family, FamilyStatistics, Granularity, Statistics


@dataclass(frozen=True)
class PlanSettings:
    """The method's options.

    Attributes:
        granularity: prune whole layers or halves.
        sample: draw representatives by probability (the paper) instead of taking the most
            important one.
        protect: layers every submodel keeps; negative counts from the end.
        margin: part of a budget that stays free.
        seed: of grouping and draws.
    """

    granularity: Granularity
    sample: bool
    protect: tuple[int, ...]
    margin: float
    seed: int

    def protected(self, num_layers: int) -> tuple[int, ...]:
        """The protected layers' indices, ascending.

        Raises:
            ValueError: the model has no such layer.
        """
        if any(not -num_layers <= layer < num_layers for layer in self.protect):
            raise ValueError(f"protect={list(self.protect)}: the model has {num_layers} layers")
        return tuple(sorted({layer % num_layers for layer in self.protect}))


@dataclass(frozen=True)
class ClientPlan:
    """What one client holds in one round, and why.

    Attributes:
        submodel: the components it keeps.
        predicted_peak_bytes: what training them costs on this device.
        choices: family -> one choice per group; a protected layer is a group of its own.
    """

    submodel: Submodel
    predicted_peak_bytes: int
    choices: dict[Family, tuple[Choice, ...]]


def plan_client(
    spec: ModelSpec,
    statistics: Statistics,
    settings: PlanSettings,
    *,
    client_id: str,
    round_number: int,
    budget_bytes: int,
    floor_bytes: int,
) -> ClientPlan:
    """The submodel for one client.

    Args:
        spec: the model.
        statistics: of its layers.
        settings: the method's options.
        client_id, round_number: what the client's draws depend on, beside the seed.
        budget_bytes: memory the device offers for training.
        floor_bytes: of which its training process needs this before any model.

    Raises:
        BudgetTooSmall: not even the smallest submodel fits.
    """
    sizes = fit(spec, settings, budget_bytes=budget_bytes, floor_bytes=floor_bytes)
    choices: dict[Family, tuple[Choice, ...]] = {}
    for index, (family, num_kept) in enumerate(sizes.items()):
        stream = [settings.seed, round_number, zlib.crc32(client_id.encode()), index]
        rng = np.random.default_rng(stream) if settings.sample else None
        choices[family] = _represent(statistics.families[family], settings, num_kept, rng)
    kept = [
        component
        for family, family_choices in choices.items()
        for choice in family_choices
        for component in family.components(choice.chosen)
    ]
    submodel = Submodel.of(spec.num_layers, kept)
    peak = predicted_peak_bytes(spec.memory, submodel.components, floor_bytes=floor_bytes)
    return ClientPlan(submodel, peak, choices)


def _represent(
    statistics: FamilyStatistics,
    settings: PlanSettings,
    num_kept: int,
    rng: np.random.Generator | None,
) -> tuple[Choice, ...]:
    """One choice per group: protected items on their own, the rest grouped by similarity."""
    num_layers = len(statistics.importance)
    protected = settings.protected(num_layers)
    choices = [Choice((item,), (1.0,), None, item) for item in protected]
    rest = [item for item in range(num_layers) if item not in protected]
    num_groups = num_kept - len(protected)
    if num_groups > 0:
        similarity = statistics.similarity[np.ix_(rest, rest)]
        labels = spectral_groups(similarity, num_groups, seed=settings.seed).tolist()
        importance = [statistics.importance[item] for item in rest]
        uniforms = None if rng is None else rng.random(num_groups).tolist()
        for choice in choose(labels, importance, uniforms=uniforms):
            members = tuple(rest[item] for item in choice.members)
            choices.append(
                Choice(members, choice.probabilities, choice.uniform, rest[choice.chosen])
            )
    return tuple(sorted(choices, key=lambda choice: choice.chosen))


def fit(
    spec: ModelSpec, settings: PlanSettings, *, budget_bytes: int, floor_bytes: int
) -> dict[Family, int]:
    """How many items of each family fit the budget, whichever are chosen.

    All families start with the same K; with halves, what is then left of the budget goes to one
    more attention or ffn at a time, the family with fewer first.

    Raises:
        BudgetTooSmall: the message says how much is missing.
    """
    usable = int(budget_bytes * (1 - settings.margin))
    families = settings.granularity.families
    smallest = max(1, len(settings.protected(spec.num_layers)))

    def cost(sizes: dict[Family, int]) -> int:
        return peak_of_sizes(spec, settings, sizes, floor_bytes=floor_bytes)

    num_kept = largest_that_fits(
        lambda k: cost(dict.fromkeys(families, k)), range(smallest, spec.num_layers + 1), usable
    )
    if num_kept is None:
        missing = cost(dict.fromkeys(families, smallest)) - usable
        raise BudgetTooSmall(
            f"a budget of {format_bytes(budget_bytes)} ({settings.margin:.0%} of it kept free) is "
            f"{format_bytes(missing)} short of the smallest submodel ({smallest} of "
            f"{spec.num_layers} layers). Give the device more memory, or lower "
            "per_device_train_batch_size or max_seq_length, or turn gradient_checkpointing on"
        )
    sizes = dict.fromkeys(families, num_kept)
    while True:
        larger = [
            {**sizes, family: sizes[family] + 1}
            for family in sorted(families, key=lambda family: sizes[family])
            if sizes[family] < spec.num_layers
        ]
        fitting = [candidate for candidate in larger if cost(candidate) <= usable]
        if not fitting:
            return sizes
        sizes = fitting[0]


def peak_of_sizes(
    spec: ModelSpec, settings: PlanSettings, sizes: dict[Family, int], *, floor_bytes: int
) -> int:
    """An upper bound of the peak of any choice of so many items per family.

    Exact where layers are alike, as in most models. Otherwise every term takes the items that cost
    most in it: the choice that is worst in all of them need not exist.
    """
    memory, num_layers = spec.memory, spec.num_layers
    protected = settings.protected(num_layers)

    def largest(values: Mapping[ComponentId, int]) -> list[int]:
        """The most expensive items, protected ones in any case."""
        chosen = []
        for family, num_kept in sizes.items():
            costs = [sum(values[c] for c in family.components(i)) for i in range(num_layers)]
            rest = sorted((costs[i] for i in range(num_layers) if i not in protected), reverse=True)
            chosen += [costs[i] for i in protected] + rest[: max(0, num_kept - len(protected))]
        return chosen

    components = [c for family in sizes for i in range(num_layers) for c in family.components(i)]
    saved_by_layer = [0] * num_layers
    for component in components:
        saved_by_layer[component.layer] += memory.saved_bytes[component]
    worst = Demand(
        weight_bytes=sum(largest(memory.weight_bytes)),
        lora_parameters=sum(largest(memory.lora_parameters)),
        saved_bytes=sum(largest(memory.saved_bytes)),
        # Halves may all be of different layers, but for the protected ones.
        num_layers=min(num_layers, sum(sizes.values()) - (len(sizes) - 1) * len(protected)),
        layer_saved_bytes=max(saved_by_layer),
        temporary_bytes=max(memory.temporary_bytes[c] for c in components),
    )
    return peak_bytes(memory, worst, floor_bytes=floor_bytes)
