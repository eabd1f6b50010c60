import numpy as np
import pytest

from fedpruner_server.core.aggregation import ClientUpdate, aggregate
from fedpruner_server.core.staleness import Rebased, discount


def test_the_weight_falls_with_the_adapters_that_have_been_missed():
    # FedBuff: (1 + s)^-1/2
    assert [discount(s, 0.5) for s in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert discount(4, 0) == 1


def test_a_late_update_moves_the_current_values_by_its_shortened_step():
    late = Rebased(
        {"a": np.float32([3.0, 5.0])},
        base={"a": np.float32([1.0, 1.0]), "b": np.float32([9.0])},
        current={"a": np.float32([10.0, 20.0]), "b": np.float32([9.0])},
        weight=0.5,
    )
    assert list(late) == ["a"]
    assert len(late) == 1
    # 10 + (3 - 1) / 2, 20 + (5 - 1) / 2
    np.testing.assert_array_equal(late["a"], np.float32([11.0, 22.0]))
    assert late["a"].dtype == np.float32


def test_one_that_began_with_the_current_adapter_counts_as_it_is():
    values, base = {"a": np.float32([3.0])}, {"a": np.float32([1.0])}
    assert Rebased(values, base=base, current=base, weight=1.0)["a"] == np.float32([3.0])


def test_a_component_that_only_a_late_client_trained_moves_less_too():
    current = {"m.lora_A": np.float32([[2.0]]), "m.lora_B": np.float32([[4.0]])}
    base = {"m.lora_A": np.float32([[1.0]]), "m.lora_B": np.float32([[0.0]])}
    values = {"m.lora_A": np.float32([[3.0]]), "m.lora_B": np.float32([[1.0]])}
    late = Rebased(values, base=base, current=current, weight=0.5)
    new = aggregate(current, [ClientUpdate("c", 7, late)])
    # Its weight among the holders is 1, however late: the discount has to be in its step.
    assert new["m.lora_A"] == np.float32([[3.0]])  # 2 + (3 - 1) / 2
    assert new["m.lora_B"] == np.float32([[4.5]])  # 4 + (1 - 0) / 2
