"""Budgets -> a submodel per client.

How many items a client keeps (K) follows from its budget and the byte model; which ones, from
functional groups (macro step) and importance within each group (micro step), or from one of the
policies that is compared with.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import fsum

import numpy as np

from fedpruner_common.budget import (
    Demand,
    largest_that_fits,
    peak_bytes,
    predicted_peak_bytes,
    streamed_peak_bytes,
    streaming_seconds,
    sweep_peak_bytes,
)
from fedpruner_common.components import ComponentId
from fedpruner_common.errors import BudgetTooSmall
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Family, Granularity, Statistics
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import NO_BRIDGE, BridgeKind, BridgeSettings
from fedpruner_common.units import format_bytes
from fedpruner_server.core.coverage import Coverage, Slot, cover, soften
from fedpruner_server.core.grouping import Grouping, group
from fedpruner_server.core.knapsack import additive_bounds, choose_components, closed_gaps
from fedpruner_server.core.selection import (
    Choice,
    choose,
    choose_jointly,
    choose_without_groups,
    evenly_spaced,
    first_and_last,
    top,
)

_ASSUMED_BYTES_PER_S = 100_000_000  # of a disk nobody could measure: a memory card's

Ages = Mapping[ComponentId, int]
Choices = dict[Family, tuple[Choice, ...]]


class Policy(str, Enum):
    """Which items a client keeps of those its budget allows: the method, and what it is against."""

    FEDPRUNER = "fedpruner"  # groups and importance
    RANDOM = "random"  # any, anew for every client and round: FedRA
    DEPTH = "depth"  # the first: InclusiveFL and DepthFL without distillation
    LAST = "last"  # all but those before the last: Gromov et al., simple heuristic
    TOP = "top"  # the most important, without groups: ShortGPT
    EVEN = "even"  # at equal distances
    EXCLUSIVE = "exclusive"  # all, on devices that fit them; no others take part
    FULL = "full"  # all, on every device, whatever its budget: the oracle of experiments


@dataclass(frozen=True)
class PlanSettings:
    """The method's options.

    Attributes:
        granularity: prune whole layers or halves.
        sample: draw representatives by probability (the paper) instead of taking the most
            important one.
        protect: layers every submodel of the method keeps; negative counts from the end. The other
            policies protect nothing.
        margin: part of a budget that stays free.
        seed: of grouping and draws.
        policy: which items a client keeps.
        grouping: how items are put into groups.
        temperature, floor: of the draws, as in `selection.probabilities`. Halves add Gumbel noise
            of the scale `temperature` to the logarithm of their importance.
        joint: clients with as many groups share one systematic draw per group. For whole layers in
            groups whose clients have the same statistics; others draw on their own.
        coverage: what is done about items that have not been trained for long. Hard coverage
            weights importance by age as soft coverage does, and then forces in what is too old.
        coverage_kappa: how much importance grows with age; 0 for not at all.
        coverage_rounds: age at which it is largest, and at which hard coverage forces an item in.
        bridge_bytes_per_run: memory of what stands in for each run of dropped components.
        bridge: what that is.
        streaming: train also layers that do not fit, in memory only while they work, where a
            device's budget allows it.
        stream_seconds: time that a device may spend on reading them in one optimizer step; what
            would take longer is dropped. 0 for no limit: nothing is dropped then.
        batches_per_step: micro-batches of one optimizer step.
    """

    granularity: Granularity
    sample: bool
    protect: tuple[int, ...]
    margin: float
    seed: int
    policy: Policy = Policy.FEDPRUNER
    grouping: Grouping = Grouping.SPECTRAL
    temperature: float = 1.0
    floor: float = 0.0
    joint: bool = False
    coverage: Coverage = Coverage.OFF
    coverage_kappa: float = 1.0
    coverage_rounds: int = 10
    bridge_bytes_per_run: int = 0
    bridge: BridgeSettings = NO_BRIDGE
    streaming: bool = False
    stream_seconds: float = 0.0
    batches_per_step: int = 1

    def protected(self, num_layers: int) -> tuple[int, ...]:
        """The protected layers' indices, ascending; none under another policy than the method's.

        Raises:
            ValueError: the model has no such layer.
        """
        if any(not -num_layers <= layer < num_layers for layer in self.protect):
            raise ValueError(f"protect={list(self.protect)}: the model has {num_layers} layers")
        if self.policy is not Policy.FEDPRUNER:
            return ()
        return tuple(sorted({layer % num_layers for layer in self.protect}))

    def usable_bytes(self, budget_bytes: int) -> int:
        """What of a budget may be planned with."""
        return int(budget_bytes * (1 - self.margin))

    def can_read(self, spec: ModelSpec, streamed: Sequence[int], read_bytes_per_s: int) -> bool:
        """Whether a device reads streamed layers in the time there is."""
        if not self.stream_seconds:
            return True
        speed = read_bytes_per_s or _ASSUMED_BYTES_PER_S
        seconds = streaming_seconds(spec.memory, streamed, read_bytes_per_s=speed)
        return self.batches_per_step * seconds <= self.stream_seconds


@dataclass(frozen=True)
class Offer:
    """What a device brings to a round.

    Attributes:
        client_id: whose it is.
        budget_bytes: memory the device offers for training.
        floor_bytes: of which its training process needs this before any model.
        read_bytes_per_s: how fast it brings in layers that are not in memory; 0 where unknown.
    """

    client_id: str
    budget_bytes: int
    floor_bytes: int
    read_bytes_per_s: int = 0


@dataclass(frozen=True)
class ClientPlan:
    """What one client holds in one round, and why.

    Attributes:
        submodel: the components it keeps.
        predicted_peak_bytes: what training them costs on this device, bridges included.
        choices: family -> one choice per group; a protected layer is a group of its own, and so is
            every item of a policy without groups. With streamed layers, of those that are held.
        bridge: what stands in for the dropped runs; without sweeps where they do not fit.
        streamed: layers that are in memory only while they work.
    """

    submodel: Submodel
    predicted_peak_bytes: int
    choices: Choices
    bridge: BridgeSettings = NO_BRIDGE
    streamed: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Seat:
    """A client whose budget holds some submodel, and how many items of each family it holds."""

    offer: Offer
    statistics: Statistics
    sizes: dict[Family, int]


@dataclass(frozen=True)
class _Round:
    """What all plans of a round have in common."""

    spec: ModelSpec
    settings: PlanSettings
    number: int
    ages: Ages
    labels: dict[tuple[int, Family, int], tuple[int, ...]] = field(default_factory=dict)

    def rng(self, client_id: str, family_index: int) -> np.random.Generator:
        """A client's own random numbers for one family."""
        stream = [self.settings.seed, self.number, zlib.crc32(client_id.encode()), family_index]
        return np.random.default_rng(stream)

    def item_ages(self, family: Family) -> list[int]:
        """Age of each layer's item: that of its oldest component."""
        return [
            max(self.ages.get(c, 0) for c in family.components(layer))
            for layer in range(self.spec.num_layers)
        ]

    def importance(self, statistics: Statistics, family: Family) -> tuple[float, ...]:
        """Importance of each layer's item, as coverage wants it."""
        settings, importance = self.settings, statistics.families[family].importance
        if settings.coverage is Coverage.OFF:
            return importance
        return soften(
            importance,
            self.item_ages(family),
            kappa=settings.coverage_kappa,
            max_age=settings.coverage_rounds,
        )

    def unprotected(self) -> list[int]:
        protected = self.settings.protected(self.spec.num_layers)
        return [item for item in range(self.spec.num_layers) if item not in protected]

    def groups(self, statistics: Statistics, family: Family, num_groups: int) -> tuple[int, ...]:
        """Group label of every unprotected item."""
        key = (id(statistics), family, num_groups)  # k-means takes longer than all the rest
        if key not in self.labels:
            rest = self.unprotected()
            similarity = statistics.families[family].similarity[np.ix_(rest, rest)]
            kind, seed = self.settings.grouping, self.settings.seed
            labels = group(similarity, num_groups, kind=kind, seed=seed)
            self.labels[key] = tuple(labels.tolist())
        return self.labels[key]


def plan_round(
    spec: ModelSpec,
    statistics: Statistics | Mapping[str, Statistics],
    settings: PlanSettings,
    offers: Sequence[Offer],
    *,
    round_number: int,
    ages: Ages | None = None,
) -> dict[str, ClientPlan | BudgetTooSmall]:
    """The submodel of every client of a round, or why it cannot have one; sorted by client.

    The order of the offers does not matter.

    Args:
        spec: the model.
        statistics: of its layers; either of all clients or by client id.
        settings: the method's options.
        offers: of the clients of the round, one each.
        round_number: what the draws depend on, beside seed and client ids.
        ages: rounds since a component was last aggregated; 0 where missing.

    Raises:
        ValueError: two offers of the same client.
    """
    ordered = sorted(offers, key=lambda offer: offer.client_id)
    if len({offer.client_id for offer in ordered}) < len(ordered):
        raise ValueError("a client offers its memory once per round")
    current = _Round(spec, settings, round_number, ages or {})
    results: dict[str, ClientPlan | BudgetTooSmall] = {}
    seats: list[_Seat] = []
    for offer in ordered:
        own = statistics if isinstance(statistics, Statistics) else statistics[offer.client_id]
        try:
            sizes = fit_somehow(
                spec, settings, budget_bytes=offer.budget_bytes, floor_bytes=offer.floor_bytes
            )
        except BudgetTooSmall as error:
            results[offer.client_id] = error
        else:
            seats.append(_Seat(offer, own, sizes))
    chosen = _choose(current, seats)
    if settings.coverage is Coverage.HARD and settings.policy is Policy.FEDPRUNER:
        chosen = _cover(current, seats, chosen)
    for seat in seats:
        choices = chosen[seat.offer.client_id]
        plan = _streamed(current, seat, choices) if settings.streaming else None
        results[seat.offer.client_id] = plan or _pruned(current, seat, choices)
    return {offer.client_id: results[offer.client_id] for offer in ordered}


def plan_client(
    spec: ModelSpec,
    statistics: Statistics,
    settings: PlanSettings,
    *,
    client_id: str,
    round_number: int,
    budget_bytes: int,
    floor_bytes: int,
    read_bytes_per_s: int = 0,
) -> ClientPlan:
    """The submodel for one client on its own.

    Args:
        spec: the model.
        statistics: of its layers.
        settings: the method's options.
        client_id, round_number: what the client's draws depend on, beside the seed.
        budget_bytes: memory the device offers for training.
        floor_bytes: of which its training process needs this before any model.
        read_bytes_per_s: as in `Offer`.

    Raises:
        BudgetTooSmall: not even the smallest submodel fits.
    """
    offer = Offer(client_id, budget_bytes, floor_bytes, read_bytes_per_s)
    result = plan_round(spec, statistics, settings, [offer], round_number=round_number)[client_id]
    if isinstance(result, BudgetTooSmall):
        raise result
    return result


def left_uncovered(
    plans: Mapping[str, ClientPlan | BudgetTooSmall], ages: Ages, *, coverage_rounds: int
) -> tuple[ComponentId, ...]:
    """Components as old as hard coverage allows that no plan of the round holds, by depth."""
    held = {
        component
        for plan in plans.values()
        if isinstance(plan, ClientPlan)
        for component in plan.submodel.components
    }
    return tuple(sorted(c for c, age in ages.items() if age >= coverage_rounds and c not in held))


def submodel_peak_bytes(
    spec: ModelSpec,
    settings: PlanSettings,
    submodel: Submodel,
    *,
    floor_bytes: int,
    streamed: Sequence[int] = (),
) -> int:
    """Peak memory of training exactly this submodel, with a bridge for every dropped run."""
    kept, bridges = submodel.components, len(submodel.dropped_runs())
    if streamed:
        peak = streamed_peak_bytes(spec.memory, streamed, floor_bytes=floor_bytes, kept=kept)
    else:
        peak = predicted_peak_bytes(spec.memory, kept, floor_bytes=floor_bytes)
    return peak + bridges * settings.bridge_bytes_per_run


def _pruned(current: _Round, seat: _Seat, choices: Choices) -> ClientPlan:
    """The plan that drops what was not chosen."""
    spec, settings, offer = current.spec, current.settings, seat.offer
    submodel = Submodel.of(spec.num_layers, _components(choices))
    peak = submodel_peak_bytes(spec, settings, submodel, floor_bytes=offer.floor_bytes)
    bridge, peak = _bridge_that_fits(spec, settings, submodel, peak, offer)
    return ClientPlan(submodel, peak, choices, bridge)


def _streamed(current: _Round, seat: _Seat, choices: Choices) -> ClientPlan | None:
    """The plan that also trains layers which do not fit, in memory while they work; or None.

    What was chosen is held as far as it fits, then streamed; of the rest, in the order in which it
    matters, as much is streamed as the device reads in the time there is. What is left is dropped.
    """
    spec, settings, offer = current.spec, current.settings, seat.offer
    usable = settings.usable_bytes(offer.budget_bytes)
    worth = [0.0] * spec.num_layers
    for family in choices:
        for layer, value in enumerate(current.importance(seat.statistics, family)):
            worth[layer] += value
    chosen = {c.layer for c in _components(choices)}
    order = sorted(range(spec.num_layers), key=lambda i: (i not in chosen, -worth[i], i))
    # As many as were chosen fit without streaming.
    fewest = len(chosen) + 1 if settings.stream_seconds else spec.num_layers
    for num_kept in range(spec.num_layers, fewest - 1, -1):
        submodel = Submodel.of(
            spec.num_layers, (c for i in order[:num_kept] for c in Family.LAYER.components(i))
        )
        for num_held in range(num_kept, -1, -1):
            streamed = tuple(sorted(order[num_held:num_kept]))
            if not settings.can_read(spec, streamed, offer.read_bytes_per_s):
                break  # holding fewer would stream more
            peak = submodel_peak_bytes(
                spec, settings, submodel, floor_bytes=offer.floor_bytes, streamed=streamed
            )
            if peak <= usable and (streamed or submodel.is_full):
                bridge, peak = _bridge_that_fits(spec, settings, submodel, peak, offer)
                return ClientPlan(submodel, peak, choices, bridge, streamed)
    return None


def _bridge_that_fits(
    spec: ModelSpec, settings: PlanSettings, submodel: Submodel, peak: int, offer: Offer
) -> tuple[BridgeSettings, int]:
    """What stands in for dropped runs on a device, and the peak with it."""
    bridge = settings.bridge
    if submodel.is_full:
        return NO_BRIDGE, peak
    if not bridge.sweeps:
        return bridge, peak
    sweep = sweep_peak_bytes(spec.memory, bridge, floor_bytes=offer.floor_bytes)
    if sweep <= settings.usable_bytes(offer.budget_bytes):
        return bridge, max(peak, sweep)
    kind = BridgeKind.OFF if bridge.local else bridge.kind
    return replace(bridge, kind=kind, local=False, corrected=False), peak


# Which items


def _choose(current: _Round, seats: Sequence[_Seat]) -> dict[str, Choices]:
    """Every client's choices, before hard coverage."""
    settings = current.settings
    if settings.policy is not Policy.FEDPRUNER:
        return {seat.offer.client_id: _follow_policy(current, seat) for seat in seats}
    if settings.granularity is Granularity.COMPONENT:
        return {seat.offer.client_id: _pack(current, seat) for seat in seats}
    drawn = _draw_jointly(current, seats) if settings.joint and settings.sample else {}
    return {
        seat.offer.client_id: drawn.get(seat.offer.client_id) or _represent(current, seat)
        for seat in seats
    }


def _follow_policy(current: _Round, seat: _Seat) -> Choices:
    """The items of a policy that knows no groups."""
    num_layers, policy = current.spec.num_layers, current.settings.policy
    choices: Choices = {}
    for index, (family, num_kept) in enumerate(seat.sizes.items()):
        if policy is Policy.RANDOM:
            uniforms = current.rng(seat.offer.client_id, index).random(num_kept).tolist()
            drawn = choose_without_groups([1.0] * num_layers, num_kept, uniforms=uniforms)
            choices[family] = _in_order(drawn)
            continue
        items = {
            Policy.LAST: first_and_last(num_layers, num_kept),
            Policy.TOP: top(seat.statistics.families[family].importance, num_kept),
            Policy.EVEN: evenly_spaced(num_layers, num_kept),
        }.get(policy, tuple(range(num_kept)))
        choices[family] = tuple(Choice.only(item) for item in items)
    return choices


def _represent(current: _Round, seat: _Seat) -> Choices:
    """One choice per group: protected items on their own, the rest grouped by similarity."""
    settings, rest = current.settings, current.unprotected()
    choices: Choices = {}
    for index, (family, num_kept) in enumerate(seat.sizes.items()):
        num_groups = num_kept - (current.spec.num_layers - len(rest))
        found: list[Choice] = []
        if num_groups > 0:
            of_all = current.importance(seat.statistics, family)
            importance = [of_all[item] for item in rest]
            rng = current.rng(seat.offer.client_id, index) if settings.sample else None
            uniforms = None if rng is None else rng.random(num_groups).tolist()
            how = {"temperature": settings.temperature, "floor": settings.floor}
            if settings.grouping is Grouping.NONE:
                found = choose_without_groups(importance, num_groups, uniforms=uniforms, **how)
            else:
                labels = current.groups(seat.statistics, family, num_groups)
                found = choose(labels, importance, uniforms=uniforms, **how)
        choices[family] = _with_protected(current, found)
    return choices


def _draw_jointly(current: _Round, seats: Sequence[_Seat]) -> dict[str, Choices]:
    """The choices of clients that share a draw: same statistics, same number of groups."""
    settings, rest = current.settings, current.unprotected()
    if settings.grouping is Grouping.NONE:
        return {}
    tables: dict[tuple[int, int], list[_Seat]] = {}
    for seat in seats:
        tables.setdefault((id(seat.statistics), seat.sizes[Family.LAYER]), []).append(seat)
    choices: dict[str, Choices] = {}
    for (_, num_kept), table in tables.items():
        num_groups = num_kept - (current.spec.num_layers - len(rest))
        if len(table) == 1 or num_groups <= 0:
            continue
        importance = current.importance(table[0].statistics, Family.LAYER)
        # The tag keeps these numbers apart from those of any single client.
        rng = np.random.default_rng([settings.seed, current.number, num_kept, 0, 1])
        drawn = choose_jointly(
            current.groups(table[0].statistics, Family.LAYER, num_groups),
            [importance[item] for item in rest],
            uniforms=rng.random(num_groups).tolist(),
            orders=[rng.permutation(len(table)).tolist() for _ in range(num_groups)],
            temperature=settings.temperature,
            floor=settings.floor,
        )
        for seat, own in zip(table, drawn, strict=True):
            choices[seat.offer.client_id] = {Family.LAYER: _with_protected(current, own)}
    return choices


def _with_protected(current: _Round, found: Sequence[Choice]) -> tuple[Choice, ...]:
    """Choices among the unprotected items, under their own numbers, and the protected items."""
    rest = current.unprotected()
    renumbered = [
        replace(choice, members=tuple(rest[i] for i in choice.members), chosen=rest[choice.chosen])
        for choice in found
    ]
    protected = current.settings.protected(current.spec.num_layers)
    return _in_order([*renumbered, *(Choice.only(item) for item in protected)])


def _in_order(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    return tuple(sorted(choices, key=lambda choice: choice.chosen))


def _components(choices: Choices) -> Iterator[ComponentId]:
    return (
        component
        for family, family_choices in choices.items()
        for choice in family_choices
        for item in choice.items
        for component in family.components(item)
    )


# Hard coverage


def _cover(
    current: _Round, seats: Sequence[_Seat], chosen: dict[str, Choices]
) -> dict[str, Choices]:
    """The choices with items that are too old swapped in, on whichever client can take them."""
    spec, settings = current.spec, current.settings
    offers = {seat.offer.client_id: seat.offer for seat in seats}
    covered = {client_id: dict(choices) for client_id, choices in chosen.items()}
    for family in settings.granularity.families:
        places = [
            (client_id, position, item)
            for client_id, choices in covered.items()
            for position, choice in enumerate(choices[family])
            for item in choice.items
        ]
        slots = [
            Slot(client_id, covered[client_id][family][position].members, item)
            for client_id, position, item in places
        ]
        fits = _fits_with(spec, settings, offers, covered, family)
        swaps, _ = cover(
            slots, current.item_ages(family), max_age=settings.coverage_rounds, fits=fits
        )
        for index, item in swaps.items():
            client_id, position, old = places[index]
            choices = list(covered[client_id][family])
            choices[position] = _swap(choices[position], old, item)
            covered[client_id][family] = tuple(choices)
        for own in covered.values():
            own[family] = _in_order(own[family])
    return covered


def _fits_with(
    spec: ModelSpec,
    settings: PlanSettings,
    offers: Mapping[str, Offer],
    chosen: Mapping[str, Choices],
    family: Family,
) -> Callable[[str, frozenset[int]], bool]:
    """Whether a client can hold these items of a family beside those of the others."""

    def fits(client_id: str, items: frozenset[int]) -> bool:
        others = {f: choices for f, choices in chosen[client_id].items() if f is not family}
        own = (component for item in items for component in family.components(item))
        submodel = Submodel.of(spec.num_layers, (*_components(others), *own))
        offer = offers[client_id]
        peak = submodel_peak_bytes(spec, settings, submodel, floor_bytes=offer.floor_bytes)
        return peak <= settings.usable_bytes(offer.budget_bytes)

    return fits


def _swap(choice: Choice, old: int, new: int) -> Choice:
    kept = tuple(sorted(new if item == old else item for item in choice.kept))
    chosen = new if choice.chosen == old else choice.chosen
    return replace(choice, chosen=chosen, kept=kept, swapped_in=(*choice.swapped_in, new))


# Halves: FedPruner+


@dataclass(frozen=True)
class _Half:
    """An item of a family, as the knapsack sees it.

    Attributes:
        family, layer: which.
        component: that it is.
        worth: its importance as coverage wants it, positive.
        noise: the Gumbel number it was drawn with, None without sampling.
        value: what the knapsack adds up.
    """

    family: Family
    layer: int
    component: ComponentId
    worth: float
    noise: float | None
    value: float


@dataclass(frozen=True)
class _Packing:
    """A selection of halves.

    Attributes:
        groups: of each half; negative for one of no group.
        kept: positions of the kept halves.
    """

    groups: tuple[int, ...]
    kept: tuple[int, ...]


def _pack(current: _Round, seat: _Seat) -> Choices:
    """The halves that are worth most and fit, at least one of every group.

    Attention and ffn are put into equally many groups, and the knapsack spends the rest of the
    budget. It also tries one more group for what `fit` gives that rest to, and the best half of
    each of those groups alone, so that what is kept is never worth less than those.
    """
    spec, settings, floor_bytes = current.spec, current.settings, seat.offer.floor_bytes
    usable = settings.usable_bytes(seat.offer.budget_bytes)
    halves = _halves(current, seat)
    components = [half.component for half in halves]
    protected = set(settings.protected(spec.num_layers))
    bounds = additive_bounds(
        spec.memory,
        components,
        protected={component for component in components if component.layer in protected},
        usable_bytes=usable,
        floor_bytes=floor_bytes,
        bridge_bytes_per_run=settings.bridge_bytes_per_run,
    )
    equal = _groups_of_halves(current, seat, dict.fromkeys(seat.sizes, min(seat.sizes.values())))
    fitted = _groups_of_halves(current, seat, seat.sizes)
    values = [half.value for half in halves]
    packings: list[_Packing] = []
    for groups in dict.fromkeys((equal, fitted)):
        for bound in dict.fromkeys(bounds):
            kept = choose_components(values, bound.sizes, groups, bound.capacity_bytes)
            if kept is not None:
                packings.append(_Packing(groups, kept))
    packings.append(_Packing(fitted, _best_of_each_group(halves, fitted, seat.sizes)))

    def fits(packing: _Packing) -> bool:
        submodel = Submodel.of(spec.num_layers, (components[i] for i in packing.kept))
        return submodel_peak_bytes(spec, settings, submodel, floor_bytes=floor_bytes) <= usable

    best = max(filter(fits, packings), key=lambda packing: fsum(values[i] for i in packing.kept))
    return {family: _packed_choices(halves, best, family) for family in seat.sizes}


def _halves(current: _Round, seat: _Seat) -> list[_Half]:
    """All halves of the model, family by family, with what they are worth to this client."""
    settings = current.settings
    importance = {f: np.maximum(current.importance(seat.statistics, f), 0.0) for f in seat.sizes}
    # Worth nothing is still worth more than an empty place.
    least = 1e-6 * max(1e-30, *(float(values.max()) for values in importance.values()))
    halves = []
    for index, family in enumerate(seat.sizes):
        worth = importance[family] + least
        worth = (1.0 - settings.floor) * worth + settings.floor * worth.mean()
        noise: list[float | None] = [None] * len(worth)
        values = worth
        if settings.sample:
            drawn = current.rng(seat.offer.client_id, index).gumbel(size=len(worth))
            noise, values = drawn.tolist(), worth * np.exp(settings.temperature * drawn)
        halves += [
            _Half(family, i, family.components(i)[0], float(worth[i]), noise[i], float(values[i]))
            for i in range(len(worth))
        ]
    return halves


def _groups_of_halves(current: _Round, seat: _Seat, sizes: Mapping[Family, int]) -> tuple[int, ...]:
    """Group of every half, families apart; a protected half is a group of its own."""
    num_layers, rest = current.spec.num_layers, current.unprotected()
    labels: list[int] = []
    for index, (family, num_kept) in enumerate(sizes.items()):
        first = index * num_layers
        own = [first + layer for layer in range(num_layers)]
        num_groups = num_kept - (num_layers - len(rest))
        grouped = current.groups(seat.statistics, family, num_groups) if num_groups > 0 else ()
        # Named by their first half, so that they never meet a protected one's name.
        for position, layer in enumerate(rest):
            own[layer] = first + rest[grouped.index(grouped[position])] if grouped else -1
        labels += own
    return tuple(labels)


def _best_of_each_group(
    halves: Sequence[_Half], groups: Sequence[int], sizes: Mapping[Family, int]
) -> tuple[int, ...]:
    """The half of every group that is worth most, then the others worth most up to the sizes."""
    by_value = sorted(range(len(halves)), key=lambda i: -halves[i].value)
    first: dict[int, int] = {}
    for i in by_value:
        first.setdefault(groups[i], i)
    kept = {i for label, i in first.items() if label >= 0}
    for family, size in sizes.items():
        own = [i for i in by_value if halves[i].family is family]
        missing = size - sum(i in kept for i in own)
        kept.update([i for i in own if i not in kept][:missing])
    return tuple(sorted(kept))


def _packed_choices(
    halves: Sequence[_Half], packing: _Packing, family: Family
) -> tuple[Choice, ...]:
    """What of each group of a family is kept, and what it was worth; in order of the first kept."""
    groups: dict[int, list[int]] = {}
    for i, half in enumerate(halves):
        if half.family is family:
            groups.setdefault(packing.groups[i], []).append(i)
    choices = []
    for positions in groups.values():
        members = [halves[i] for i in positions]
        kept = [halves[i] for i in positions if i in packing.kept]
        if not kept:
            continue  # of no group
        total = sum(half.worth for half in members)
        choices.append(
            Choice(
                members=tuple(half.layer for half in members),
                probabilities=tuple(half.worth / total for half in members),
                uniform=None,
                chosen=max(kept, key=lambda half: half.value).layer,
                kept=tuple(half.layer for half in kept),
                values=tuple(half.value for half in members),
                noise=tuple(half.noise for half in members if half.noise is not None),
            )
        )
    return tuple(sorted(choices, key=lambda choice: choice.kept))


# How many items


def fit(
    spec: ModelSpec, settings: PlanSettings, *, budget_bytes: int, floor_bytes: int
) -> dict[Family, int]:
    """How many items of each family fit the budget, whichever are chosen.

    All families start with the same K; with halves, what is then left of the budget goes to one
    more attention or ffn at a time, the family with fewer first.

    Raises:
        BudgetTooSmall: the message says how much is missing.
    """
    usable = settings.usable_bytes(budget_bytes)
    families = settings.granularity.families
    everything = dict.fromkeys(families, spec.num_layers)
    smallest = max(1, len(settings.protected(spec.num_layers)))

    def cost(sizes: dict[Family, int]) -> int:
        return peak_of_sizes(spec, settings, sizes, floor_bytes=floor_bytes)

    if settings.policy is Policy.FULL:
        return everything
    if settings.policy is Policy.EXCLUSIVE:
        if cost(everything) <= usable:
            return everything
        raise BudgetTooSmall(
            f"a budget of {format_bytes(budget_bytes)} ({settings.margin:.0%} of it kept free) is "
            f"{format_bytes(cost(everything) - usable)} short of all {spec.num_layers} layers, and "
            "the policy `exclusive` leaves out devices that cannot hold all of them"
        )
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


def fit_somehow(
    spec: ModelSpec, settings: PlanSettings, *, budget_bytes: int, floor_bytes: int
) -> dict[Family, int]:
    """As `fit`; where not even the smallest submodel fits but streaming all layers does, that one.

    Not where there is little time for streaming: then all layers may be too many.

    Raises:
        BudgetTooSmall: nothing fits.
    """
    try:
        return fit(spec, settings, budget_bytes=budget_bytes, floor_bytes=floor_bytes)
    except BudgetTooSmall:
        everything = range(spec.num_layers)
        needed = streamed_peak_bytes(spec.memory, everything, floor_bytes=floor_bytes)
        by_layer = settings.granularity is Granularity.LAYER  # halves are packed into what fits
        possible = settings.streaming and by_layer and not settings.stream_seconds
        if not possible or needed > settings.usable_bytes(budget_bytes):
            raise
    smallest = max(1, len(settings.protected(spec.num_layers)))
    return dict.fromkeys(settings.granularity.families, smallest)


def peak_of_sizes(
    spec: ModelSpec, settings: PlanSettings, sizes: dict[Family, int], *, floor_bytes: int
) -> int:
    """An upper bound of the peak of any choice of so many items per family.

    Exact where layers are alike, as in most models, but for bridges, of which it counts as many as
    there can be. Otherwise every term takes the items that cost most in it: the choice that is
    worst in all of them need not exist.
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
    bridges = settings.bridge_bytes_per_run * most_runs(settings, num_layers, sizes)
    return bridges + peak_bytes(memory, worst, floor_bytes=floor_bytes)


def most_runs(settings: PlanSettings, num_layers: int, sizes: Mapping[Family, int]) -> int:
    """As many dropped runs as so many kept items can leave at most."""
    protected = settings.protected(num_layers)
    in_order = [layer in protected for layer in range(num_layers) for _ in sizes]
    num_kept = sum(sizes.values())
    # A dropped attention in front of a kept ffn is a run of its own: a gap may hold two.
    runs_in_gap = 1 if len(sizes) == 1 else 2
    gaps = num_kept + 1 - closed_gaps(in_order)
    return min(runs_in_gap * gaps, len(in_order) - num_kept)
