from itertools import permutations

import numpy as np
import pytest

from fedpruner_server.core.aggregation import ClientUpdate, aggregate, initial_adapter


def array(*values):
    return np.array(values, dtype=np.float32)


CURRENT = {"x": array(9, 9), "y": array(9), "z": array(7)}
UPDATES = [
    ClientUpdate("a", 1, {"x": array(1, 2)}),
    ClientUpdate("b", 3, {"x": array(5, 6), "y": array(2)}),
    ClientUpdate("c", 4, {"y": array(9)}),
]


def test_each_tensor_is_averaged_over_the_clients_that_trained_it_by_their_examples():
    result = aggregate(CURRENT, UPDATES)
    # x: a and b, (1*1 + 3*5) / 4 = 4 and (1*2 + 3*6) / 4 = 5
    assert result["x"].tolist() == [4, 5]
    # y: b and c, (3*2 + 4*9) / 7 = 6
    assert result["y"].tolist() == [6]


def test_a_tensor_nobody_trained_keeps_its_value():
    result = aggregate(CURRENT, UPDATES)
    assert result["z"].tolist() == [7]
    assert aggregate(CURRENT, [])["x"].tolist() == [9, 9]


def test_the_adapter_keeps_its_names_and_their_order_and_stays_float32():
    result = aggregate(CURRENT, UPDATES)
    assert list(result) == ["x", "y", "z"]
    assert {values.dtype for values in result.values()} == {np.dtype(np.float32)}


def test_the_order_of_the_clients_does_not_matter():
    rng = np.random.default_rng(0)
    current = {"w": np.zeros((8, 8), dtype=np.float32)}
    updates = [
        ClientUpdate(name, n, {"w": rng.normal(size=(8, 8)).astype(np.float32)})
        for name, n in zip("abcd", (1, 17, 3, 100), strict=True)
    ]
    # In float64 the sums agree to far below the resolution of float32; its last bit may still flip.
    first = aggregate(current, updates)["w"]
    for order in permutations(updates):
        np.testing.assert_allclose(aggregate(current, order)["w"], first, rtol=3e-7)


def test_one_client_alone_gives_its_own_values():
    values = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    current = {"w": np.zeros((3, 5), dtype=np.float32)}
    result = aggregate(current, [ClientUpdate("a", 37, {"w": values})])
    np.testing.assert_array_equal(result["w"], values)


def test_updates_are_read_once_and_nothing_given_is_changed():
    current = {"x": array(1)}
    values = array(3)
    result = aggregate(current, iter([ClientUpdate("a", 2, {"x": values})]))
    assert (result["x"].tolist(), current["x"].tolist(), values.tolist()) == ([3], [1], [3])


def test_sums_are_taken_in_float64():
    # In float32, 2^24 + 1 is 2^24: the mean of 2^24 and 1, 1 would lose the ones.
    updates = [ClientUpdate(c, 1, {"y": array(v)}) for c, v in [("a", 2**24), ("b", 1), ("c", 1)]]
    # (16777216 + 2) / 3 = 5592406
    assert aggregate({"y": array(0)}, updates)["y"].tolist() == [5592406.0]


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (ClientUpdate("eve", 0, {"y": array(1)}), "eve: num_examples is 0"),
        (ClientUpdate("eve", -3, {"y": array(1)}), "eve: num_examples is -3"),
        (ClientUpdate("eve", 1, {"nope": array(1)}), "eve: nope"),
        (ClientUpdate("eve", 1, {"y": array(1, 2)}), "eve: y"),
        (ClientUpdate("eve", 1, {"y": np.array(1, dtype=np.float32)}), "eve: y"),
    ],
)
def test_an_update_that_does_not_fit_the_adapter_is_refused(update, reason):
    with pytest.raises(ValueError, match=reason):
        aggregate(CURRENT, [*UPDATES, update])


SHAPES = {"m.lora_A": (8, 16), "m.lora_B": (32, 8), "n.lora_A": (8, 400)}


def test_at_first_b_is_zero_so_the_adapter_changes_nothing():
    adapter = initial_adapter(SHAPES, seed=0)
    assert not adapter["m.lora_B"].any()
    assert {name: values.shape for name, values in adapter.items()} == SHAPES


def test_at_first_a_is_uniform_within_one_over_the_root_of_its_inputs():
    adapter = initial_adapter(SHAPES, seed=0)
    for name, bound in (("m.lora_A", 0.25), ("n.lora_A", 0.05)):  # 1/sqrt(16), 1/sqrt(400)
        values = adapter[name]
        assert values.dtype == np.float32
        assert np.abs(values).max() <= bound
        assert np.abs(values).max() > 0.9 * bound
        # A uniform variable in +-b has variance b^2 / 3.
        assert values.var() == pytest.approx(bound**2 / 3, rel=0.25)


def test_the_first_adapter_follows_from_its_seed_and_not_from_the_order_of_names():
    adapter = initial_adapter(SHAPES, seed=5)
    again = initial_adapter(dict(reversed(SHAPES.items())), seed=5)
    for name in SHAPES:
        np.testing.assert_array_equal(adapter[name], again[name])
    assert not np.array_equal(adapter["m.lora_A"], initial_adapter(SHAPES, seed=6)["m.lora_A"])
