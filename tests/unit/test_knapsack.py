from dataclasses import replace
from itertools import combinations, product
from random import Random

import pytest
from toy_model import MIB, toy_memory

from fedpruner_common.budget import predicted_peak_bytes
from fedpruner_common.components import Kind, all_components
from fedpruner_server.core.knapsack import additive_bounds, choose_components, closed_gaps


def best_value(values, sizes, groups, capacity):
    """The best of all subsets, tried one by one; None if none is allowed."""
    wanted = {label for label in groups if label >= 0}
    best = None
    for taken in product((False, True), repeat=len(values)):
        items = [i for i, is_taken in enumerate(taken) if is_taken]
        if sum(sizes[i] for i in items) > capacity or not wanted <= {groups[i] for i in items}:
            continue
        value = sum(values[i] for i in items)
        best = value if best is None else max(best, value)
    return best


def random_instance(rng, most_items):
    n = rng.randrange(1, most_items + 1)
    values = [rng.choice([rng.random(), 0.5, rng.uniform(-1, 1), 0.0]) for _ in range(n)]
    sizes = [rng.choice([0, 3, 5, rng.randrange(1, 20)]) for _ in range(n)]
    groups = [rng.randrange(-1, 4) for _ in range(n)]
    return values, sizes, groups, rng.randrange(sum(sizes) + 2)


def check(instance, kept, unit=1):
    """A selection is allowed and worth as much as the best."""
    values, sizes, groups, capacity = instance
    best = best_value(values, [size * unit for size in sizes], groups, capacity * unit)
    if kept is None:
        assert best is None
        return
    assert list(kept) == sorted(set(kept))
    assert sum(sizes[i] for i in kept) <= capacity
    assert {label for label in groups if label >= 0} <= {groups[i] for i in kept}
    assert sum(values[i] for i in kept) == pytest.approx(best, abs=1e-12)


def test_it_is_as_good_as_the_best_of_all_subsets():
    rng = Random(0)
    infeasible = 0
    for _ in range(300):
        instance = random_instance(rng, 8)
        kept = choose_components(*instance, unit_bytes=1)
        check(instance, kept)
        infeasible += kept is None
    assert 20 < infeasible < 200


def test_it_is_as_good_as_the_best_of_all_subsets_of_twelve():
    rng = Random(1)
    for _ in range(10):
        values, sizes, groups, capacity = random_instance(rng, 12)
        grown = [*values, *[0.3] * 12][:12], [*sizes, *[4] * 12][:12], [*groups, *[0] * 12][:12]
        check((*grown, capacity + 20), choose_components(*grown, capacity + 20))


def test_sizes_of_whole_units_lose_nothing():
    rng = Random(2)
    for _ in range(100):
        values, sizes, groups, capacity = instance = random_instance(rng, 8)
        # what is left over of the last unit is no use
        kept = choose_components(
            values, [s * MIB for s in sizes], groups, capacity * MIB + 5, unit_bytes=MIB
        )
        check(instance, kept, unit=MIB)


def test_whatever_the_unit_what_is_kept_fits():
    rng = Random(3)
    for unit in (1, 7, 64, 1000, 10**6):
        for _ in range(40):
            n = rng.randrange(1, 30)
            sizes = [rng.randrange(1, 10_000) for _ in range(n)]
            capacity = rng.randrange(sum(sizes))
            kept = choose_components([1.0] * n, sizes, [-1] * n, capacity, unit_bytes=unit)
            assert kept is not None
            assert sum(sizes[i] for i in kept) <= capacity


def test_a_small_loss_is_all_that_many_different_sizes_cost():
    rng = Random(4)
    n = 60
    sizes = [rng.randrange(10**8, 3 * 10**8) for _ in range(n)]
    capacity = sum(sizes) // 2
    kept = choose_components([float(s) for s in sizes], sizes, [i % 5 for i in range(n)], capacity)
    assert kept is not None
    # values are sizes: a capacity used up is a perfect result; 60 roundings to 1/4096
    assert (1 - 60 / 4096) * capacity <= sum(sizes[i] for i in kept) <= capacity


def test_few_sizes_are_taken_to_the_byte():
    # 40 halves of 101 and 40 of 1003 bytes: exactly 13 and 7 fit 8334
    sizes = [101] * 40 + [1003] * 40
    kept = choose_components([float(s) for s in sizes], sizes, [0] * 40 + [1] * 40, 8334)
    assert kept is not None
    assert sum(sizes[i] for i in kept) == 8334


def test_every_group_is_represented_even_at_a_loss():
    # the best two by value are both of group 0
    assert choose_components([5.0, 4.0, -1.0], [1, 1, 1], [0, 0, 1], 2) == (0, 2)
    assert choose_components([5.0, 4.0, -1.0], [1, 1, 1], [0, 0, -1], 2) == (0, 1)


def test_a_group_that_cannot_be_represented_makes_it_impossible():
    assert choose_components([1.0, 1.0], [1, 9], [0, 1], 9) is None
    assert choose_components([1.0], [1], [-1], -1) is None
    assert choose_components([1.0], [1], [-1], 0) == ()
    assert choose_components([], [], [], 0) == ()


def test_a_tie_always_goes_the_same_way():
    assert choose_components([1.0] * 4, [1] * 4, [0] * 4, 2) == choose_components(
        [1.0] * 4, [1] * 4, [0] * 4, 2
    )


def test_what_is_no_knapsack_is_refused():
    with pytest.raises(ValueError, match="2 values, 1 sizes and 2 groups"):
        choose_components([1.0, 1.0], [1], [0, 0], 5)
    with pytest.raises(ValueError, match="sizes must not be negative, got -2"):
        choose_components([1.0], [-2], [0], 5)
    with pytest.raises(ValueError, match="unit_bytes must be at least 1, got 0"):
        choose_components([1.0], [1], [0], 5, unit_bytes=0)


# The byte model as knapsacks

FLOOR = 8 * MIB


def alike_memory(num_layers, **changes):
    """Every term of the byte model, layers alike."""
    components = all_components(num_layers)

    def each(attention, ffn):
        return {c: attention if c.kind is Kind.ATTENTION else ffn for c in components}

    values = {
        "lora_parameters": each(9_001, 20_003),
        "saved_bytes": each(300_001, 700_003),
        "shared_weight_bytes": 3_000_017,
        "shared_saved_bytes": 100_003,
        "layer_input_bytes": 50_021,
        "temporary_bytes": each(400_009, 900_007),
        "loss_bytes": 600_011,
    }
    return toy_memory(num_layers, **{**values, **changes})


def bounds_of(memory, num_layers, usable_bytes, protected=frozenset()):
    return additive_bounds(
        memory,
        all_components(num_layers),
        protected=protected,
        usable_bytes=usable_bytes,
        floor_bytes=FLOOR,
        bridge_bytes_per_run=0,
    )


def subsets(components):
    """Every selection with at least one ffn, which needs most beside what it saves."""
    for size in range(1, len(components) + 1):
        for kept in combinations(range(len(components)), size):
            if any(components[i].kind is Kind.FFN for i in kept):
                yield kept


def test_where_layers_are_alike_the_first_bound_is_the_byte_model():
    memory, components = alike_memory(3), all_components(3)
    full = predicted_peak_bytes(memory, components, floor_bytes=FLOOR)
    first = bounds_of(memory, 3, full)[0]
    for kept in subsets(components):
        peak = predicted_peak_bytes(memory, [components[i] for i in kept], floor_bytes=FLOOR)
        spare = first.capacity_bytes - sum(first.sizes[i] for i in kept)
        assert spare == full - peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("disk_ratio", [0.0, 1.0, 2.0])
def test_what_satisfies_the_last_bound_fits_whichever_sum_is_the_largest(checkpointing, disk_ratio):
    rng = Random(5)
    components = all_components(3)
    tight = 0
    for _ in range(10):
        memory = alike_memory(
            3,
            weight_bytes={c: rng.randrange(3 * MIB) for c in components},
            lora_parameters={c: rng.randrange(MIB // 2) for c in components},
            saved_bytes={c: rng.randrange(MIB) for c in components},
            disk_ratio=disk_ratio,
            gradient_checkpointing=checkpointing,
        )
        full = predicted_peak_bytes(memory, components, floor_bytes=FLOOR)
        usable = rng.randrange(FLOOR + 15 * MIB, full)
        for bound in bounds_of(memory, 3, usable)[-1 - checkpointing :]:
            for kept in subsets(components):
                if sum(bound.sizes[i] for i in kept) <= bound.capacity_bytes:
                    peak = predicted_peak_bytes(
                        memory, [components[i] for i in kept], floor_bytes=FLOOR
                    )
                    assert peak <= usable + len(kept)  # rounding of the disk ratio
                    tight += peak > 0.9 * usable
    assert tight > 10


def test_every_bound_but_the_last_is_implied_by_fitting():
    """They are the three sums one by one: nothing that fits is lost to them, but for the fixed."""
    memory, components = alike_memory(3, disk_ratio=2.0), all_components(3)
    for usable in range(FLOOR + 20 * MIB, FLOOR + 60 * MIB, 2 * MIB):
        *single, _ = bounds_of(memory, 3, usable)
        assert len(single) == 3  # training, stepping, converting
        for kept in subsets(components):
            peak = predicted_peak_bytes(memory, [components[i] for i in kept], floor_bytes=FLOOR)
            if peak <= usable:
                assert all(sum(b.sizes[i] for i in kept) <= b.capacity_bytes for b in single)


def test_protected_layers_bring_one_input_each():
    memory = replace(alike_memory(3), gradient_checkpointing=True, layer_input_bytes=10 * MIB)
    protected = {c for c in all_components(3) if c.layer == 0}
    free, kept = (bounds_of(memory, 3, 10**9, p)[0] for p in (frozenset(), protected))
    assert [a - b for a, b in zip(free.sizes, kept.sizes, strict=True)] == [0, 10 * MIB, 0, 0, 0, 0]


def test_closed_gaps():
    assert closed_gaps([False, False]) == 0
    assert closed_gaps([True, False, False]) == 1  # before the first
    assert closed_gaps([True, True, False, True]) == 3  # before, between, after
    assert closed_gaps([True, True]) == 3
