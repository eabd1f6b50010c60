"""A learning rate for every method: the best of a few on a seed that is used for nothing else.

Three values for each; where the best is at an edge, the next one beyond it, twice at most.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.quality.methods import MAIN

FIRST_RATES = (3.2e-3, 8e-3, 2e-2)
TUNING_SEED = 100
_FACTOR = 2.5
_MOST_RATES = len(FIRST_RATES) + 2

Record = dict[str, Any]


def tuned_methods() -> list[str]:
    """Methods that have a rate of their own."""
    return [name for name, method in MAIN.items() if not method.tuned_as]


def missing_rates(method: str, records: Sequence[Record]) -> list[float]:
    """Rates that are still to be tried for a method; none when its best is known."""
    tried = tried_rates(method, records)
    first = [rate for rate in FIRST_RATES if rate not in tried]
    if first or len(tried) >= _MOST_RATES:
        return first
    best = min(tried, key=lambda rate: tried[rate])
    if best == max(tried):
        return [float(f"{best * _FACTOR:.3g}")]
    if best == min(tried):
        return [float(f"{best / _FACTOR:.3g}")]
    return []


def best_rates(records: Sequence[Record]) -> dict[str, float]:
    """Method -> its best rate, for the methods that are tuned through."""
    return {
        method: min(tried := tried_rates(method, records), key=lambda rate: tried[rate])
        for method in tuned_methods()
        if not missing_rates(method, records)
    }


def tried_rates(method: str, records: Sequence[Record]) -> dict[float, float]:
    """Rate -> loss, of what has been tried for a method."""
    return {
        r["learning_rate"]: r["loss"]
        for r in records
        if r["method"] == method and r["seed"] == TUNING_SEED
    }
