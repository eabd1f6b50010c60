"""Learning rate over rounds."""

import math


def learning_rate(peak: float, *, round_number: int, num_rounds: int, kind: str) -> float:
    """Learning rate of a round.

    Args:
        peak: of the first round.
        round_number: 1-based.
        num_rounds: of the run.
        kind: `cosine`, from the peak in round 1 towards zero after the last, or `constant`.
    """
    if kind == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (round_number - 1) / num_rounds))
