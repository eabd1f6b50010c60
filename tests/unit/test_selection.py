import pytest

from fedpruner_server.core.selection import choose, probabilities


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
