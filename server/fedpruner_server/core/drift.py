"""How far an adapter has moved."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedpruner_server.core.aggregation import Array

Array64 = NDArray[np.float64]


def relative_drift(then: Mapping[str, Array], now: Mapping[str, Array]) -> float:
    """|BA now - BA then| / |BA now| over all modules, Frobenius; 0 if both are zero.

    Never forms a product: with C = [B now, -B then] and D = [A now; A then], the squared norm of
    C D is the trace of (C'C)(D D').

    Args:
        then, now: adapters of the same modules, canonical name -> values.
    """
    moved = size = 0.0
    for name in now:
        if not name.endswith(".lora_A"):
            continue
        module = name.removesuffix("lora_A")
        a_now, b_now = (now[module + factor].astype(np.float64) for factor in ("lora_A", "lora_B"))
        a, b = (then[module + factor].astype(np.float64) for factor in ("lora_A", "lora_B"))
        moved += _squared_norm(np.concatenate([b_now, -b], axis=1), np.concatenate([a_now, a]))
        size += _squared_norm(b_now, a_now)
    return float(np.sqrt(moved / size)) if size > 0 else 0.0


def _squared_norm(b: Array64, a: Array64) -> float:
    """Squared Frobenius norm of b a, for b (out, r) and a (r, in)."""
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
