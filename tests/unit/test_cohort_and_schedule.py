import pytest

from fedpruner_server.core.cohort import choose_cohort, cohort_size
from fedpruner_server.core.schedule import learning_rate

CLIENTS = ["d", "a", "c", "b", "e"]


def cohort(num_clients, clients=CLIENTS, seed=0, round_number=1):
    return choose_cohort(clients, num_clients, seed=seed, round_number=round_number)


@pytest.mark.parametrize("num_clients", [0, 5, 6, -1])
def test_everyone_takes_part_when_nobody_has_to_stay_behind(num_clients):
    assert cohort(num_clients) == ("a", "b", "c", "d", "e")


def test_a_cohort_has_the_wanted_size_no_client_twice_and_is_sorted():
    for round_number in range(1, 30):
        chosen = cohort(3, round_number=round_number)
        assert len(set(chosen)) == 3
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(CLIENTS)


def test_a_cohort_follows_from_seed_and_round_and_not_from_the_order_of_joining():
    assert cohort(2) == cohort(2, clients=reversed(CLIENTS))
    assert len({cohort(2, round_number=n) for n in range(20)}) > 3
    assert len({cohort(2, seed=n) for n in range(20)}) > 3


def test_every_client_gets_its_turn_about_equally_often():
    counts = dict.fromkeys(CLIENTS, 0)
    for round_number in range(1000):
        for client in cohort(2, round_number=round_number):
            counts[client] += 1
    # 2 of 5 in 1000 rounds: 400 each, standard deviation sqrt(1000 * 0.4 * 0.6) = 15.5
    assert all(abs(count - 400) < 5 * 15.5 for count in counts.values())


def test_no_clients_make_an_empty_cohort():
    assert cohort(3, clients=[]) == ()


def test_a_constant_learning_rate_stays():
    rates = [learning_rate(2e-4, round_number=n, num_rounds=9, kind="constant") for n in (1, 5, 9)]
    assert rates == [2e-4] * 3


def test_a_cosine_starts_at_the_peak_is_half_way_at_half_time_and_never_reaches_zero():
    def rate(round_number):
        return learning_rate(1.0, round_number=round_number, num_rounds=8, kind="cosine")

    assert rate(1) == 1.0
    assert rate(5) == pytest.approx(0.5)  # 4 of 8 rounds done: cos(pi/2) = 0
    assert rate(3) == pytest.approx(0.853553, abs=1e-6)  # (1 + sqrt(2)/2) / 2
    rates = [rate(n) for n in range(1, 9)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_more_are_asked_than_are_needed_less_those_still_at_work():
    assert cohort_size(0, extra=0.5, busy=3) == 0  # everyone
    assert cohort_size(10, extra=0.0, busy=0) == 10
    assert cohort_size(10, extra=0.25, busy=0) == 13  # 12.5
    assert cohort_size(10, extra=0.25, busy=4) == 9
    assert cohort_size(4, extra=0.0, busy=4) is None
    assert cohort_size(4, extra=0.0, busy=6) is None
