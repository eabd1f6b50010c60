"""Who takes part in a round."""

import math
from collections.abc import Iterable

import numpy as np


def choose_cohort(
    available: Iterable[str], num_clients: int, *, seed: int, round_number: int
) -> tuple[str, ...]:
    """A uniform draw of clients without replacement, sorted; all of them if there are no more.

    Args:
        available: clients that could take part, in any order.
        num_clients: how many are wanted; 0 for everyone.
        seed, round_number: what the draw depends on.
    """
    clients = sorted(available)
    if num_clients <= 0 or num_clients >= len(clients):
        return tuple(clients)
    rng = np.random.default_rng([seed, round_number])
    chosen = rng.choice(len(clients), size=num_clients, replace=False)
    return tuple(clients[index] for index in sorted(chosen))


def cohort_size(num_clients: int, *, extra: float, busy: int) -> int | None:
    """How many to choose; 0 for everyone, None for nobody.

    Args:
        num_clients: updates that are wanted; 0 for everyone's.
        extra: part of them to ask on top, since some will be late or lost.
        busy: clients that are still at work for an earlier round.
    """
    if num_clients == 0:
        return 0
    asked = math.ceil(num_clients * (1 + extra)) - busy
    return asked if asked > 0 else None
