"""Which components to keep within a number of bytes: FedPruner+ as an exact knapsack."""

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from fedpruner_common.budget import Demand, MemoryProfile, peak_bytes
from fedpruner_common.components import ComponentId, Kind

_MOST_SUMS = 1 << 15
_NUM_UNITS = 4096


@dataclass(frozen=True)
class _Frontier:
    """Best selections so far: no other one has as few units and as much value.

    Attributes:
        units: of each selection, ascending.
        values: of each selection, ascending.
        nodes: where each selection's last item is noted; -1 for the empty selection.
    """

    units: NDArray[np.int64]
    values: NDArray[np.float64]
    nodes: NDArray[np.int64]


_NO_SELECTION = _Frontier(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
_EMPTY_SELECTION = _Frontier(np.zeros(1, np.int64), np.zeros(1), np.full(1, -1))


def choose_components(
    values: Sequence[float],
    sizes: Sequence[int],
    groups: Sequence[int],
    capacity_bytes: int,
    *,
    unit_bytes: int | None = None,
) -> tuple[int, ...] | None:
    """The items worth most that fit, at least one of every group, ascending; None if none do.

    Exact in units of `unit_bytes`: sizes are rounded up and the capacity down, so that what is
    returned always fits. Dynamic programme over the items that keeps, of all selections so far,
    those that no other one beats in both units and value.

    Args:
        values: of each item, of any sign.
        sizes: bytes of each item, 0 or more.
        groups: of each item; a negative one asks for nothing.
        capacity_bytes: for all items together.
        unit_bytes: None takes single bytes where sizes take so few values that this is cheap, as
            where layers are alike, and 1/4096 of the capacity otherwise.

    Raises:
        ValueError: lengths differ, a size is negative, or `unit_bytes` is not positive.
    """
    if not len(values) == len(sizes) == len(groups):
        raise ValueError(f"{len(values)} values, {len(sizes)} sizes and {len(groups)} groups")
    if min(sizes, default=0) < 0:
        raise ValueError(f"sizes must not be negative, got {min(sizes)}")
    unit = _unit(sizes, capacity_bytes) if unit_bytes is None else unit_bytes
    if unit < 1:
        raise ValueError(f"unit_bytes must be at least 1, got {unit}")
    capacity = capacity_bytes // unit
    if capacity < 0:
        return None
    notes: list[tuple[int, NDArray[np.int64]]] = []  # per item: first node, parents of its nodes
    items: list[int] = []
    num_nodes = 0
    done = _EMPTY_SELECTION
    for group in sorted(set(groups)):
        # A group that asks for nothing has enough from the start.
        lacking, enough = (_NO_SELECTION, done) if group < 0 else (done, _NO_SELECTION)
        for item in (i for i, of in enumerate(groups) if of == group):
            units = -(-sizes[item] // unit)
            enough, parents = _extended(lacking, enough, units, values[item], capacity, num_nodes)
            notes.append((num_nodes, parents))
            items.append(item)
            num_nodes += len(parents)
        done = enough
    if not len(done.units):
        return None
    return _trace(int(done.nodes[-1]), notes, items)


def _extended(
    lacking: _Frontier,
    enough: _Frontier,
    units: int,
    value: float,
    capacity: int,
    first_node: int,
) -> tuple[_Frontier, NDArray[np.int64]]:
    """The selections that have enough of a group, once one more item of it may be taken.

    Args:
        lacking: selections that have nothing of this group.
        enough: those that have, without the new item.
        units, value: of the item.
        capacity: in units.
        first_node: number of the first new node.

    Returns:
        the selections, and the parents of the new nodes among them.
    """
    all_units = np.concatenate((enough.units, enough.units + units, lacking.units + units))
    all_values = np.concatenate((enough.values, enough.values + value, lacking.values + value))
    nodes = np.concatenate((enough.nodes, enough.nodes, lacking.nodes))
    is_new = np.arange(len(nodes)) >= len(enough.nodes)
    order = np.lexsort((is_new, -all_values, all_units))
    order = order[all_units[order] <= capacity]
    best_before = np.maximum.accumulate(np.concatenate(([-np.inf], all_values[order])))[:-1]
    order = order[all_values[order] > best_before]
    nodes, is_new = nodes[order], is_new[order]
    parents = nodes[is_new]
    nodes[is_new] = first_node + np.arange(len(parents))
    return _Frontier(all_units[order], all_values[order], nodes), parents


def _trace(
    node: int, notes: list[tuple[int, NDArray[np.int64]]], items: list[int]
) -> tuple[int, ...]:
    """The items on the way back from a node, ascending."""
    kept = []
    for item, (first, parents) in zip(reversed(items), reversed(notes), strict=True):
        if node >= first:
            kept.append(item)
            node = int(parents[node - first])
    return tuple(sorted(kept))


def _unit(sizes: Sequence[int], capacity_bytes: int) -> int:
    num_sums = prod(count + 1 for count in Counter(sizes).values())
    return 1 if num_sums <= _MOST_SUMS else max(1, capacity_bytes // _NUM_UNITS)


# The byte model as knapsacks

_NOTHING = Demand(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Bound:
    """An additive view of the byte model.

    Attributes:
        sizes: bytes of each component.
        capacity_bytes: for those that are kept.
    """

    sizes: tuple[int, ...]
    capacity_bytes: int


def additive_bounds(
    memory: MemoryProfile,
    components: Sequence[ComponentId],
    *,
    protected: Set[ComponentId],
    usable_bytes: int,
    floor_bytes: int,
    bridge_bytes_per_run: int,
) -> tuple[Bound, ...]:
    """Knapsacks whose solutions are candidates for the best submodel within the usable bytes.

    The byte model is the largest of three sums: one knapsack for each of them, whose solution may
    not fit the others, and one that is safe for all of them together. Check every solution.

    Terms that do not add up over components: what the largest component needs during its backward
    is taken as if it were kept. Layer inputs under checkpointing are counted once for every half,
    or once for every layer of the model; bridges once for every gap between kept halves, or once
    for every dropped half. Where layers are alike and there are neither, the first is exact.

    Args:
        memory: the byte model.
        components: every component of the model.
        protected: those that are kept in any case.
        usable_bytes: limit of the peak.
        floor_bytes: as in `peak_bytes`.
        bridge_bytes_per_run: memory of what stands in for a run of dropped components.
    """
    return tuple(
        bridged
        for bound in _bounds_of_model(memory, components, protected, usable_bytes, floor_bytes)
        for bridged in _with_bridges(bound, components, protected, bridge_bytes_per_run)
    )


def closed_gaps(protected: Sequence[bool]) -> int:
    """How many places between neighbours, and at both ends, can hold no dropped item."""
    walls = [True, *protected, True]
    return sum(walls[i] and walls[i + 1] for i in range(len(walls) - 1))


def _bounds_of_model(
    memory: MemoryProfile,
    components: Sequence[ComponentId],
    protected: Set[ComponentId],
    usable_bytes: int,
    floor_bytes: int,
) -> Iterator[Bound]:
    fixed = _fixed_demand(memory, components)
    # Every half brings its layer's input, but for the second of two that are both protected.
    inputs = [0 if _follows(c, protected) else 1 for c in components]
    alone = [_demand_of(memory, c, n) for c, n in zip(components, inputs, strict=True)]
    ways = [(alone, fixed)]
    if memory.gradient_checkpointing:
        num_layers = len({c.layer for c in components})
        ways.append(
            ([replace(d, num_layers=0) for d in alone], replace(fixed, num_layers=num_layers))
        )
    weights = [replace(d, lora_parameters=0, saved_bytes=0, num_layers=0) for d in alone]
    states = [replace(d, saved_bytes=0, num_layers=0) for d in alone]
    no_activations = replace(memory, shared_saved_bytes=0, loss_bytes=0)

    def bound(profile: MemoryProfile, demands: Sequence[Demand], rest: Demand, extra: int) -> Bound:
        """`extra` activations make the sum that has them the largest; they cancel out."""
        bare = replace(no_activations, disk_ratio=profile.disk_ratio, shared_weight_bytes=0)
        bare = replace(bare, shared_saved_bytes=extra)
        nothing = peak_bytes(bare, _NOTHING, floor_bytes=0)
        sizes = tuple(peak_bytes(bare, d, floor_bytes=0) - nothing for d in demands)
        return Bound(sizes, usable_bytes - peak_bytes(profile, rest, floor_bytes=floor_bytes))

    for demands, rest in ways:
        yield bound(replace(memory, disk_ratio=0.0), demands, rest, 1 << 60)  # training
    yield bound(replace(no_activations, disk_ratio=0.0), states, _NOTHING, 0)  # stepping
    if memory.disk_ratio:
        yield bound(no_activations, weights, _NOTHING, 0)  # converting
    for demands, rest in ways:
        yield bound(memory, demands, rest, 0)  # all of them


def _demand_of(memory: MemoryProfile, component: ComponentId, num_inputs: int) -> Demand:
    """The terms of one component that add up."""
    return Demand(
        weight_bytes=memory.weight_bytes[component],
        lora_parameters=memory.lora_parameters[component],
        saved_bytes=memory.saved_bytes[component],
        num_layers=num_inputs,
        layer_saved_bytes=0,
        temporary_bytes=0,
    )


def _fixed_demand(memory: MemoryProfile, components: Sequence[ComponentId]) -> Demand:
    """The terms that do not, of the components that need most."""
    saved_by_layer: Counter[int] = Counter()
    for c in components:
        saved_by_layer[c.layer] += memory.saved_bytes[c]
    return replace(
        _NOTHING,
        layer_saved_bytes=max(saved_by_layer.values()),
        temporary_bytes=max(memory.temporary_bytes[c] for c in components),
    )


def _with_bridges(
    bound: Bound, components: Sequence[ComponentId], protected: Set[ComponentId], bridge_bytes: int
) -> Iterator[Bound]:
    if not bridge_bytes:
        yield bound
        return
    # At most one run more than there are kept halves, less what protection rules out ...
    open_ends = 1 - closed_gaps([c in protected for c in sorted(components)])
    yield Bound(
        tuple(size + bridge_bytes for size in bound.sizes),
        bound.capacity_bytes - open_ends * bridge_bytes,
    )
    # ... and at most as many as there are dropped ones: keeping a half saves a bridge.
    yield Bound(
        tuple(max(0, size - bridge_bytes) for size in bound.sizes),
        bound.capacity_bytes - len(components) * bridge_bytes,
    )


def _follows(component: ComponentId, protected: Set[ComponentId]) -> bool:
    first = ComponentId(component.layer, Kind.ATTENTION)
    return component.kind is Kind.FFN and {component, first} <= protected
