from random import Random

import pytest

from fedpruner_server.core.coverage import Slot, cover, soften


def test_importance_grows_with_age_up_to_the_limit():
    # 1 + 1 * 0, 0.5, 1 and 1 again
    assert soften([2.0] * 4, [0, 5, 10, 99], kappa=1.0, max_age=10) == (2.0, 3.0, 4.0, 4.0)
    assert soften([2.0, -2.0], [4, 4], kappa=0.5, max_age=8) == (2.5, -2.5)
    assert soften([2.0], [50], kappa=0.0, max_age=10) == (2.0,)


EVERYTHING = (0, 1, 2, 3)


def test_nothing_is_swapped_while_everything_is_young_enough():
    slots = [Slot("a", EVERYTHING, 0), Slot("b", EVERYTHING, 0)]
    assert cover(slots, [0, 3, 3, 3], max_age=10) == ({}, ())


def test_an_item_that_is_too_old_comes_in():
    slots = [Slot("a", EVERYTHING, 0), Slot("b", EVERYTHING, 0)]
    assert cover(slots, [0, 1, 10, 3], max_age=10) == ({0: 2}, ())


def test_it_comes_in_where_there_are_most_slots():
    slots = [Slot("a", EVERYTHING, 0), Slot("b", (0, 1), 0), Slot("b", (2, 3), 3)]
    assert cover(slots, [0, 1, 10, 3], max_age=10) == ({2: 2}, ())


def test_it_comes_in_for_the_item_that_most_hold():
    slots = [Slot("a", EVERYTHING, 0), Slot("a", EVERYTHING, 1), Slot("b", EVERYTHING, 1)]
    assert cover(slots, [0, 0, 10, 3], max_age=10) == ({1: 2}, ())


def test_it_comes_in_for_an_item_of_its_own_group_only():
    slots = [Slot("a", (0,), 0), Slot("a", (1, 2), 1), Slot("a", (3, 4, 5), 3)]
    assert cover(slots, [0, 0, 0, 0, 10, 0], max_age=10) == ({2: 4}, ())


def test_an_item_that_someone_holds_anyway_needs_no_swap():
    slots = [Slot("a", EVERYTHING, 2), Slot("b", EVERYTHING, 0)]
    assert cover(slots, [0, 1, 10, 3], max_age=10) == ({}, ())


def test_an_old_item_never_pushes_out_the_only_holder_of_another():
    slots = [Slot("a", EVERYTHING, 1), Slot("a", EVERYTHING, 0)]
    assert cover(slots, [0, 10, 12, 3], max_age=10) == ({1: 2}, ())
    # where two hold it, one of them is enough
    slots = [Slot("a", EVERYTHING, 1), Slot("b", EVERYTHING, 1)]
    assert cover(slots, [0, 10, 12, 3], max_age=10) == ({0: 2}, ())


def test_what_finds_no_slot_is_named():
    slots = [Slot("a", EVERYTHING, 0)]
    # the oldest comes in
    assert cover(slots, [0, 10, 12, 11], max_age=10) == ({0: 2}, (1, 3))
    assert cover([Slot("a", (0,), 0)], [0, 10], max_age=10) == ({}, (1,))
    assert cover([], [3, 10], max_age=10) == ({}, (1,))


def test_a_slot_of_one_member_is_never_changed():
    slots = [Slot("a", (0,), 0), Slot("a", (1, 2), 1)]
    swaps, uncovered = cover(slots, [50, 10, 10], max_age=10)
    assert 0 not in swaps
    assert uncovered == (2,)


def test_a_swap_that_does_not_fit_the_client_is_not_made():
    slots = [Slot("a", EVERYTHING, 0), Slot("a", EVERYTHING, 1), Slot("b", EVERYTHING, 0)]
    asked = []

    def fits(client_id, items):
        asked.append((client_id, sorted(items)))
        return client_id == "b"

    assert cover(slots, [0, 0, 10, 0], max_age=10, fits=fits) == ({2: 2}, ())
    assert asked == [("a", [1, 2]), ("a", [0, 2]), ("b", [2])]


def test_a_crowd_of_items_is_started_before_it_is_too_old():
    # One slot for five items of the ages 0, 8, 8, 8, 8: they would be held at 8, 9, 10, 11.
    slots = [Slot("a", (0, 1, 2, 3, 4), 0)]
    assert cover(slots, [0, 8, 8, 8, 8], max_age=10) == ({0: 1}, ())
    assert cover(slots, [0, 7, 7, 7, 7], max_age=10) == ({0: 1}, ())  # 7, 8, 9 and 10: just in time
    assert cover(slots, [0, 6, 6, 6, 6], max_age=10) == ({}, ())


def simulate(groups_of_client, *, num_items, max_age, num_rounds, rng):
    """Ages over a run in which every client always chooses the first member of every group."""
    ages = [0] * num_items
    oldest, named = 0, set()
    for _ in range(num_rounds):
        slots = [
            Slot(client, members, members[0] if rng is None else rng.choice(members))
            for client, groups in groups_of_client.items()
            for members in groups
        ]
        swaps, uncovered = cover(slots, ages, max_age=max_age)
        held = {swaps.get(i, slot.chosen) for i, slot in enumerate(slots)}
        assert set(uncovered) == {i for i, age in enumerate(ages) if age >= max_age} - held
        named.update(uncovered)
        ages = [0 if item in held else age + 1 for item, age in enumerate(ages)]
        oldest = max(oldest, *ages)
    return oldest, named


MIDDLE = tuple(range(2, 11))


@pytest.mark.parametrize("rng", [None, Random(0)])
@pytest.mark.parametrize(
    "groups_of_client",
    [
        # nine items share one slot of one client: ten rounds are just enough
        {"a": [(0,), (1,), MIDDLE, (11,)]},
        # as do a different partition and a second client
        {"a": [(0, 1), MIDDLE, (11,)], "b": [(0, 1, 2, 3), (4, 5, 6, 7, 8), (9, 10, 11)]},
        {f"c{i}": [(0,), (1, 2), (3, 4, 5, 6, 7, 8), (9, 10), (11,)] for i in range(3)},
    ],
)
def test_with_enough_slots_no_item_is_ever_older_than_the_limit(groups_of_client, rng):
    oldest, named = simulate(groups_of_client, num_items=12, max_age=10, num_rounds=60, rng=rng)
    assert oldest <= 10
    assert named == set()


def test_with_too_few_slots_the_items_left_out_are_named():
    # nine items, one slot, four rounds: five cannot be in time
    oldest, named = simulate(
        {"a": [(0,), (1,), MIDDLE, (11,)]}, num_items=12, max_age=4, num_rounds=60, rng=None
    )
    assert oldest > 4
    assert named
    assert named <= set(MIDDLE)


def test_an_item_of_no_slot_is_named_for_ever():
    _, named = simulate({"a": [(0, 1)]}, num_items=3, max_age=5, num_rounds=20, rng=None)
    assert named == {2}
