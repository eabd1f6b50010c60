"""Scenarios of one round; a clock is a number here."""

from dataclasses import replace

import pytest

from fedpruner_common.errors import Busy, StaleRound
from fedpruner_server.core.round import (
    Abandon,
    Aggregate,
    Aggregated,
    AssignTasks,
    ClientLost,
    CohortChosen,
    Outcome,
    Phase,
    Publish,
    Round,
    Shrink,
    TaskFailed,
    TaskReplaced,
    TaskState,
    TaskTooLarge,
    Tick,
    UpdateStored,
    carried,
    check_accepts,
    step,
)

DEADLINE = 100.0
OPEN = CohortChosen({"c": "t3", "a": "t1", "b": "t2"}, quorum=2, deadline=DEADLINE)
LATE, EARLY = Tick(DEADLINE), Tick(DEADLINE - 0.1)


def play(*events, opening=OPEN):
    """The round and every effect after these events."""
    current, effects = step(Round(4), opening)
    assert effects == (AssignTasks(),)
    happened = []
    for event in events:
        current, effects = step(current, event)
        happened.extend(effects)
    return current, happened


def test_a_round_starts_with_its_cohort():
    current, effects = play()
    assert current.phase is Phase.TRAINING
    assert current.clients(Outcome.WORKING) == ("a", "b", "c")
    assert effects == []


def test_the_last_update_closes_the_training_at_once():
    current, effects = play(UpdateStored("c"), UpdateStored("a"))
    assert (current.phase, effects) == (Phase.TRAINING, [])
    current, effects = play(UpdateStored("c"), UpdateStored("a"), UpdateStored("b"))
    assert current.phase is Phase.AGGREGATING
    assert effects == [Aggregate(("a", "b", "c"))]  # sorted: float sums depend on the order


def test_the_deadline_closes_a_round_with_a_quorum():
    current, effects = play(UpdateStored("c"), UpdateStored("a"), EARLY)
    assert (current.phase, effects) == (Phase.TRAINING, [])
    current, effects = play(UpdateStored("c"), UpdateStored("a"), LATE)
    assert current.phase is Phase.AGGREGATING
    assert effects == [Aggregate(("a", "c"))]


def test_the_deadline_without_a_quorum_abandons_the_round_and_says_why():
    current, effects = play(UpdateStored("c"), TaskFailed("a", "out of memory"), LATE)
    assert current.phase is Phase.ABANDONED
    [effect] = effects
    assert isinstance(effect, Abandon)
    assert "1 of 2 updates" in effect.reason
    assert "a: out of memory" in effect.reason
    assert "b: still working" in effect.reason
    assert current.explanation == effect.reason


def test_when_nobody_is_left_to_wait_for_the_round_ends_before_its_deadline():
    current, effects = play(TaskFailed("a", "x"), TaskFailed("b", "y"), ClientLost("c"))
    assert current.phase is Phase.ABANDONED
    assert len(effects) == 1
    current, effects = play(UpdateStored("a"), UpdateStored("b"), ClientLost("c"))
    assert effects == [Aggregate(("a", "b"))]


def test_publishing_comes_after_the_adapter_is_durable():
    all_in = (UpdateStored("a"), UpdateStored("b"), UpdateStored("c"))
    current, effects = play(*all_in, Aggregated())
    assert current.phase is Phase.DONE
    assert effects == [Aggregate(("a", "b", "c")), Publish()]


def test_a_lost_client_that_comes_back_in_time_is_welcome():
    current, effects = play(
        ClientLost("a"), UpdateStored("a"), UpdateStored("b"), UpdateStored("c")
    )
    assert effects == [Aggregate(("a", "b", "c"))]
    assert current.clients(Outcome.LOST) == ()


def test_a_lost_client_is_not_waited_for():
    _, effects = play(ClientLost("a"), UpdateStored("b"), UpdateStored("c"))
    assert effects == [Aggregate(("b", "c"))]


def test_a_failure_after_the_update_changes_nothing():
    before, _ = play(UpdateStored("a"))
    after, effects = play(UpdateStored("a"), TaskFailed("a", "late"), ClientLost("a"))
    assert after == before
    assert effects == []


def test_a_client_that_failed_cannot_store_any_more():
    current, _ = play(TaskFailed("a", "oom"), UpdateStored("a"))
    assert current.clients(Outcome.STORED) == ()


def test_a_second_update_changes_nothing():
    once, _ = play(UpdateStored("a"))
    twice, effects = play(UpdateStored("a"), UpdateStored("a"))
    assert twice == once
    assert effects == []


@pytest.mark.parametrize("event", [UpdateStored("eve"), TaskFailed("eve", "x"), ClientLost("eve")])
def test_a_stranger_changes_nothing(event):
    before, _ = play()
    after, effects = play(event)
    assert (after, effects) == (before, [])


@pytest.mark.parametrize(
    "ending",
    [
        (UpdateStored("a"), UpdateStored("b"), UpdateStored("c")),
        (UpdateStored("a"), UpdateStored("b"), UpdateStored("c"), Aggregated()),
        (LATE,),
    ],
)
@pytest.mark.parametrize(
    "late", [UpdateStored("a"), TaskFailed("b", "x"), ClientLost("c"), LATE, OPEN]
)
def test_after_training_nothing_a_client_does_changes_the_round(ending, late):
    before, effects_before = play(*ending)
    after, effects = play(*ending, late)
    assert (after, effects) == (before, effects_before)


def test_a_round_that_is_not_aggregating_cannot_be_published():
    for events in [(), (LATE,)]:
        before, effects_before = play(*events)
        assert play(*events, Aggregated()) == (before, effects_before)
    assert step(Round(4), Aggregated()) == (Round(4), ())


def test_before_its_cohort_is_chosen_a_round_waits():
    for event in (UpdateStored("a"), LATE, ClientLost("a")):
        assert step(Round(4), event) == (Round(4), ())


def test_replaying_the_same_events_gives_the_same_round():
    events = (ClientLost("b"), UpdateStored("c"), EARLY, UpdateStored("b"), TaskFailed("a", "x"))
    assert play(*events, Aggregated()) == play(*events, Aggregated())


def test_stepping_does_not_change_the_round_it_was_given():
    current, _ = play()
    text = repr(current)
    step(current, UpdateStored("a"))
    assert repr(current) == text


def accepts(current, client_id="a", task_id="t1"):
    return check_accepts(current, client_id=client_id, task_id=task_id)


def test_an_update_is_wanted_while_its_client_works_or_is_lost():
    assert accepts(play()[0])
    assert accepts(play(ClientLost("a"))[0])


def test_an_update_that_is_stored_needs_not_travel_again_even_after_the_round():
    assert not accepts(play(UpdateStored("a"))[0])
    all_in = (UpdateStored("a"), UpdateStored("b"), UpdateStored("c"))
    assert not accepts(play(*all_in)[0])
    assert not accepts(play(*all_in, Aggregated())[0])


@pytest.mark.parametrize(
    ("client_id", "task_id"), [("a", "t2"), ("a", "old"), ("eve", "t1"), ("", "")]
)
def test_a_task_that_is_not_this_clients_is_stale(client_id, task_id):
    with pytest.raises(StaleRound, match="not part of round 4"):
        accepts(play()[0], client_id, task_id)


def test_an_update_that_comes_too_late_is_stale():
    for events in [(UpdateStored("b"), UpdateStored("c"), LATE), (LATE,)]:
        with pytest.raises(StaleRound, match="too late"):
            accepts(play(*events)[0])


def test_an_update_of_a_task_reported_as_failed_is_stale():
    with pytest.raises(StaleRound, match="reported as failed"):
        accepts(play(TaskFailed("a", "oom"))[0])


def test_a_long_task_id_of_a_stranger_is_not_repeated_whole():
    with pytest.raises(StaleRound) as caught:
        accepts(play()[0], "a", "x" * 100_000)
    assert len(str(caught.value)) < 200


# A smaller task in the same round


def test_a_client_out_of_memory_is_waited_for_until_it_has_a_smaller_task():
    current, effects = play(TaskTooLarge("a", "killed"), UpdateStored("b"), UpdateStored("c"))
    assert effects == [Shrink("a")]
    assert current.phase is Phase.TRAINING
    assert current.clients(Outcome.SHRINKING) == ("a",)
    current, effects = step(current, TaskReplaced("a", "t1.2"))
    assert effects == ()
    assert current.tasks["a"] == TaskState("t1.2")
    current, effects = step(current, UpdateStored("a"))
    assert effects == (Aggregate(("a", "b", "c")),)


def test_running_out_of_memory_twice_asks_twice_and_saying_it_twice_once():
    again = TaskTooLarge("a", "killed")
    _, effects = play(again, again, TaskReplaced("a", "t1.2"), again)
    assert effects == [Shrink("a"), Shrink("a")]


def test_a_client_for_which_nothing_is_small_enough_is_out():
    events = TaskTooLarge("a", "killed"), TaskFailed("a", "killed; nothing smaller is possible")
    current, effects = play(*events, UpdateStored("b"), UpdateStored("c"))
    assert effects == [Shrink("a"), Aggregate(("b", "c"))]
    assert current.tasks["a"].reason == "killed; nothing smaller is possible"


def test_the_deadline_does_not_wait_for_a_smaller_task():
    current, effects = play(UpdateStored("b"), UpdateStored("c"), TaskTooLarge("a", "killed"), LATE)
    assert effects == [Shrink("a"), Aggregate(("b", "c"))]
    assert step(current, TaskReplaced("a", "t1.2")) == (current, ())


def test_a_lost_client_may_come_back_to_say_that_memory_ran_out():
    current, effects = play(ClientLost("a"), TaskTooLarge("a", "killed"))
    assert effects == [Shrink("a")]
    assert current.clients(Outcome.SHRINKING) == ("a",)


@pytest.mark.parametrize(
    "event", [TaskReplaced("a", "t9"), TaskReplaced("x", "t9"), TaskTooLarge("x", "killed")]
)
def test_nothing_is_replaced_that_nobody_asked_to(event):
    current, _ = play()
    assert step(current, event) == (current, ())


def test_an_update_for_a_task_that_was_too_large_is_refused():
    current, _ = play(TaskTooLarge("a", "killed"))
    with pytest.raises(StaleRound, match="reported as failed"):
        check_accepts(current, client_id="a", task_id="t1")
    current, _ = step(current, TaskReplaced("a", "t1.2"))
    with pytest.raises(StaleRound, match="not part of round"):
        check_accepts(current, client_id="a", task_id="t1")
    assert check_accepts(current, client_id="a", task_id="t1.2")


EARLY_END = CohortChosen({"a": "t1", "b": "t2", "c": "t3"}, quorum=1, deadline=DEADLINE, target=2)
CARRYING = replace(EARLY_END, carries=True)


def test_a_round_with_a_target_ends_as_soon_as_so_many_updates_are_in():
    current, effects = play(UpdateStored("c"), opening=EARLY_END)
    assert (current.phase, effects) == (Phase.TRAINING, [])
    current, effects = play(UpdateStored("c"), UpdateStored("a"), opening=EARLY_END)
    assert effects == [Aggregate(("a", "c"))]
    assert current.clients(Outcome.WORKING) == ("b",)


def test_a_target_that_cannot_be_reached_any_more_is_not_waited_for():
    events = [UpdateStored("c"), TaskFailed("a", "no data"), ClientLost("b")]
    current, effects = play(*events, opening=EARLY_END)
    assert effects == [Aggregate(("c",))]
    assert current.phase is Phase.AGGREGATING


def test_who_is_late_is_refused_unless_the_round_carries():
    current, _ = play(UpdateStored("c"), UpdateStored("a"), opening=EARLY_END)
    assert carried(current) == {}
    with pytest.raises(StaleRound, match="too late"):
        check_accepts(current, client_id="b", task_id="t2")
    current, _ = play(UpdateStored("c"), UpdateStored("a"), opening=CARRYING)
    assert carried(current) == {"b": "t2"}
    with pytest.raises(Busy, match="the next one takes the update"):
        check_accepts(current, client_id="b", task_id="t2")


def test_what_failed_or_was_lost_does_not_go_on():
    opening = CohortChosen(
        {"a": "t1", "b": "t2", "c": "t3", "d": "t4"}, 1, DEADLINE, target=1, carries=True
    )
    events = [TaskFailed("a", "no data"), ClientLost("b"), UpdateStored("c")]
    current, effects = play(*events, opening=opening)
    assert effects == [Aggregate(("c",))]
    assert carried(current) == {"d": "t4"}
