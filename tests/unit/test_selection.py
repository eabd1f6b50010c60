from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from fedpruner_server.core.selection import (
    Choice,
    choose,
    choose_jointly,
    choose_without_groups,
    evenly_spaced,
    first_and_last,
    probabilities,
    replay,
    systematic,
    top,
)


def test_a_probability_is_the_share_of_the_groups_importance():
    # 1, 3 and 4 of 8
    assert probabilities([1.0, 3.0, 4.0]) == pytest.approx([0.125, 0.375, 0.5], abs=1e-5)


def test_only_the_ratios_of_importance_matter():
    assert probabilities([1e-9, 3e-9]) == pytest.approx(probabilities([1e9, 3e9]))


def test_importance_below_zero_counts_as_zero():
    assert probabilities([-5.0, 2.0, 2.0]) == pytest.approx([0.0, 0.5, 0.5], abs=1e-5)


@pytest.mark.parametrize("importance", [[0.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
def test_a_group_without_importance_is_drawn_from_evenly(importance):
    assert probabilities(importance) == pytest.approx([1 / 3] * 3)


def test_no_member_is_quite_impossible():
    assert probabilities([0.0, 1.0]).min() > 0


def test_argmax_takes_the_most_important_member_of_every_group():
    choices = choose([0, 1, 0, 1, 2], [0.1, 0.9, 0.3, 0.2, 0.0], uniforms=None)
    assert [c.members for c in choices] == [(0, 2), (1, 3), (4,)]
    assert [c.chosen for c in choices] == [2, 1, 4]
    assert {c.uniform for c in choices} == {None}


def test_argmax_takes_the_first_on_a_tie():
    assert choose([0, 0, 0], [0.5, 0.7, 0.7], uniforms=None)[0].chosen == 1


@pytest.mark.parametrize(
    ("uniform", "chosen"),
    # Shares 1/8, 3/8, 4/8 of members 1, 2, 4: the borders are at 0.125 and 0.5.
    [(0.0, 1), (0.12, 1), (0.13, 2), (0.49, 2), (0.51, 4), (0.9999999999999999, 4)],
)
def test_a_draw_follows_from_its_number(uniform, chosen):
    choices = choose([0, 1, 1, 0, 1], [9, 1.0, 3.0, 9, 4.0], uniforms=[0.0, uniform])
    assert choices[1].chosen == chosen
    assert choices[1].uniform == uniform


def test_every_group_is_drawn_with_its_own_number():
    choices = choose([0, 0, 1, 1], [1, 1, 1, 1], uniforms=[0.2, 0.8])
    assert [c.chosen for c in choices] == [0, 3]


def test_a_choice_tells_enough_to_replay_it():
    choice = choose([0, 0, 0], [1.0, 2.0, 5.0], uniforms=[0.3])[0]
    # cumulated 0.125, 0.375, 1: 0.3 falls on the second
    assert sum(choice.probabilities[:1]) <= 0.3 < sum(choice.probabilities[:2])
    assert choice.members[1] == choice.chosen == 1
    assert sum(choice.probabilities) == pytest.approx(1.0)


def test_a_low_temperature_sharpens_and_a_high_one_evens_out():
    # importance squared: 1 and 9 of 10
    assert probabilities([1.0, 3.0], temperature=0.5) == pytest.approx([0.1, 0.9], abs=1e-5)
    # its root: 1 and 3 of 4
    assert probabilities([1.0, 9.0], temperature=2.0) == pytest.approx([0.25, 0.75], abs=1e-5)
    assert probabilities([1.0, 1.1], temperature=1e-4) == pytest.approx([0.0, 1.0])
    assert probabilities([1.0, 9.0], temperature=1e9) == pytest.approx([0.5, 0.5])


def test_the_floor_is_spread_evenly():
    # 0.8 of 1/4 and 3/4, and 0.1 each
    assert probabilities([1.0, 3.0], floor=0.2) == pytest.approx([0.3, 0.7], abs=1e-5)
    assert probabilities([0.0, 3.0], floor=1.0) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": -1.0}, {"floor": -0.1}, {"floor": 1.1}]
)
def test_options_that_give_no_probabilities_are_refused(options):
    with pytest.raises(ValueError, match="temperature must be above 0 and floor within 0 to 1"):
        probabilities([1.0, 2.0], **options)


def test_temperature_and_floor_reach_the_draw():
    choice = choose([0, 0], [1.0, 3.0], uniforms=[0.05], temperature=0.5, floor=0.2)[0]
    # 0.8 of 1/10 and 9/10, and 0.1 each
    assert choice.probabilities == pytest.approx([0.18, 0.82], abs=1e-5)
    assert choice.chosen == 0


def test_a_systematic_draw_takes_evenly_spaced_points():
    # points 0.125, 0.375, 0.625, 0.875 on borders 0.5, 0.6, 1
    assert systematic([0.5, 0.1, 0.4], 4, 0.5) == (0, 0, 2, 2)
    # points 0.05, 0.3, 0.55, 0.8
    assert systematic([0.5, 0.1, 0.4], 4, 0.2) == (0, 0, 1, 2)


def test_a_systematic_draw_takes_an_item_as_often_as_expected_but_for_rounding():
    rng = Random(0)
    for _ in range(500):
        shares = probabilities([rng.random() ** 3 for _ in range(rng.randrange(1, 9))])
        num_draws = rng.randrange(1, 30)
        drawn = systematic(shares.tolist(), num_draws, rng.random())
        assert len(drawn) == num_draws
        for item, share in enumerate(shares):
            assert abs(drawn.count(item) - num_draws * share) < 1 + 1e-9


def test_a_systematic_draw_is_fair_over_its_number():
    rng = np.random.default_rng(0)
    drawn = Counter(
        item for uniform in rng.random(4000) for item in systematic([0.5, 0.1, 0.4], 3, uniform)
    )
    shares = [drawn[item] / 12000 for item in range(3)]
    assert shares == pytest.approx([0.5, 0.1, 0.4], abs=0.015)


def test_even_the_last_number_before_one_falls_on_an_item():
    last = float(np.nextafter(1.0, 0.0))
    assert systematic([0.5, 0.5], 3, last)[-1] == 1


def random_joint_draw(rng):
    num_items, num_clients = rng.randrange(2, 12), rng.randrange(1, 9)
    num_groups = rng.randrange(1, num_items + 1)
    labels = [
        *range(num_groups),
        *(rng.randrange(num_groups) for _ in range(num_groups, num_items)),
    ]
    importance = [rng.random() for _ in range(num_items)]
    orders = [rng.sample(range(num_clients), num_clients) for _ in range(num_groups)]
    uniforms = [rng.random() for _ in range(num_groups)]
    drawn = choose_jointly(
        labels, importance, uniforms=uniforms, orders=orders, temperature=0.7, floor=0.1
    )
    return labels, uniforms, orders, drawn


def test_together_clients_hold_an_item_as_often_as_its_probability_says():
    rng = Random(1)
    for _ in range(100):
        labels, uniforms, _, drawn = random_joint_draw(rng)
        for label in range(max(labels) + 1):
            choices = [own[label] for own in drawn]
            shares = choices[0].probabilities
            members = choices[0].members
            expected = systematic(shares, len(drawn), uniforms[label])
            assert sorted(members.index(c.chosen) for c in choices) == list(expected)
            for member, share in zip(members, shares, strict=True):
                held = sum(choice.chosen == member for choice in choices)
                assert abs(held - len(drawn) * share) < 1 + 1e-9


def test_in_a_joint_draw_every_client_gets_the_point_its_order_says():
    drawn = choose_jointly([0, 0, 1, 1], [1.0] * 4, uniforms=[0.5, 0.0], orders=[[1, 0], [0, 1]])
    # group 0: points 0.25 and 0.75, the first client the second one; group 1: 0 and 0.5
    assert [[c.uniform for c in own] for own in drawn] == [[0.75, 0.0], [0.25, 0.5]]
    assert [[c.chosen for c in own] for own in drawn] == [[1, 2], [0, 3]]


def test_every_logged_choice_replays_to_the_item_it_logs():
    rng = Random(2)
    for _ in range(60):
        labels, uniforms, _, drawn = random_joint_draw(rng)
        importance = [rng.random() - 0.2 for _ in labels]
        some = len(uniforms)
        choices = [
            *(choice for own in drawn for choice in own),
            *choose(labels, importance, uniforms=uniforms),
            *choose(labels, importance, uniforms=None),
            *choose_without_groups(importance, some, uniforms=uniforms, floor=0.1),
            *choose_without_groups(importance, some, uniforms=None),
            Choice.only(3),
        ]
        for choice in choices:
            assert replay(choice) == choice.chosen
            assert choice.uniform is None or 0 <= choice.uniform < 1


def test_a_choice_that_coverage_changed_replays_to_what_came_in():
    choice = choose([0, 0, 0], [1.0, 2.0, 5.0], uniforms=None)[0]
    assert replay(replace(choice, chosen=1, swapped_in=(0, 1))) == 1


def test_one_group_of_a_knapsack_does_not_replay():
    choice = Choice((0, 1), (0.5, 0.5), None, 0, kept=(0, 1), values=(1.0, 1.0))
    assert choice.items == (0, 1)
    with pytest.raises(ValueError, match="depends on the other groups"):
        replay(choice)


def test_without_groups_the_most_important_items_are_taken():
    choices = choose_without_groups([0.1, 0.9, 0.3, 0.9], 3, uniforms=None)
    assert [c.chosen for c in choices] == [1, 3, 2]


def test_without_groups_items_are_drawn_from_those_that_are_left():
    choices = choose_without_groups([1.0, 2.0, 1.0], 3, uniforms=[0.5, 0.6, 0.0])
    # borders 1/4, 3/4: item 1; then 1/2: item 2; then item 0
    assert [c.chosen for c in choices] == [1, 2, 0]
    assert [c.members for c in choices] == [(0, 1, 2), (0, 2), (0,)]
    assert choices[1].probabilities == pytest.approx([0.5, 0.5])


def test_the_first_items_and_the_last():
    assert first_and_last(6, 3) == (0, 1, 5)
    assert first_and_last(6, 1) == (5,)
    assert first_and_last(3, 3) == (0, 1, 2)


def test_items_at_equal_distances():
    assert evenly_spaced(7, 3) == (0, 3, 6)
    assert evenly_spaced(6, 3) == (0, 3, 5)  # 2.5 is rounded up
    assert evenly_spaced(8, 4) == (0, 2, 5, 7)  # 2 1/3 and 4 2/3
    assert evenly_spaced(6, 1) == (0,)
    for n in range(1, 12):
        for k in range(1, n + 1):
            found = evenly_spaced(n, k)
            assert len(set(found)) == k
            assert k == 1 or (found[0], found[-1]) == (0, n - 1)


def test_the_most_important_items_below_zero_too():
    assert top([0.1, -0.5, 0.3, -0.1, 0.3], 4) == (0, 2, 3, 4)
    assert top([1.0, 1.0, 1.0], 2) == (0, 1)
