"""How far an adapter has moved."""

import numpy as np
import pytest

from fedpruner_server.core.drift import relative_drift


def adapter(rng, scale=1.0):
    return {
        f"{module}.lora_{factor}": (scale * rng.normal(size=shape)).astype(np.float32)
        for module in ("x", "y")
        for factor, shape in (("A", (2, 5)), ("B", (4, 2)))
    }


def product(values, module):
    return values[f"{module}.lora_B"].astype(float) @ values[f"{module}.lora_A"].astype(float)


def test_it_is_the_norm_of_the_change_of_all_products_over_their_norm():
    rng = np.random.default_rng(0)
    then, now = adapter(rng), adapter(rng)
    moved = sum(((product(now, m) - product(then, m)) ** 2).sum() for m in "xy")
    size = sum((product(now, m) ** 2).sum() for m in "xy")
    assert relative_drift(then, now) == pytest.approx(np.sqrt(moved / size), rel=1e-6)


def test_the_same_product_in_other_factors_has_not_moved():
    now = adapter(np.random.default_rng(1))
    then = {n: v * (2 if n.endswith("A") else 0.5) for n, v in now.items()}
    assert relative_drift(then, now) == pytest.approx(0, abs=1e-6)


def test_the_first_step_from_zero_is_all_of_it_and_zero_has_not_moved():
    now = adapter(np.random.default_rng(2))
    zero = {n: v * n.endswith("A") for n, v in now.items()}
    assert relative_drift(zero, now) == pytest.approx(1)
    assert relative_drift(zero, zero) == 0.0
