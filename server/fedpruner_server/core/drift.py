"""How far an adapter has moved."""

from collections.abc import Mapping

import numpy as np

from fedpruner_server.core.aggregation import Array, squared_norm


def relative_drift(then: Mapping[str, Array], now: Mapping[str, Array]) -> float:
    """|BA now - BA then| / |BA now| over all modules, Frobenius; 0 if both are zero.

    Never forms a product: the difference is C D with C = [B now, -B then] and D = [A now; A then].

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
        moved += squared_norm((np.concatenate([b_now, -b], axis=1), np.concatenate([a_now, a])))
        size += squared_norm((b_now, a_now))
    return float(np.sqrt(moved / size)) if size > 0 else 0.0
