from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedpruner_server.core.aggregation import (
    Aggregation,
    AggregationSettings,
    ClientUpdate,
    Factor,
    ServerState,
    aggregate,
    combine,
    initial_adapter,
    residual_factors,
    squared_norm,
    trained_factor,
)


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
    first = aggregate(current, updates)["w"]
    for order in permutations(updates):
        np.testing.assert_array_equal(aggregate(current, order)["w"], first)


def test_plain_averaging_is_one_float64_sum_in_the_order_of_client_ids_rounded_once():
    current, updates = case(30, clients=5)
    result = aggregate(current, reversed(updates))
    for name in current:
        terms = [u.tensors[name].astype(np.float64) * u.num_examples for u in updates]
        total = terms[0] + terms[1] + terms[2] + terms[3] + terms[4]
        expected = (total / sum(u.num_examples for u in updates)).astype(np.float32)
        np.testing.assert_array_equal(result[name], expected)


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
        (ClientUpdate("eve", 1, {"y": array(1)}, weight=0.0), "eve: weight is 0.0"),
        (ClientUpdate("eve", 1, {"y": array(1)}, weight=float("inf")), "eve: weight is inf"),
        (ClientUpdate("a", 1, {"y": array(1)}), "a: two updates"),
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


OUT, IN, R = 12, 9, 3
METHODS = list(Aggregation)
EXACT = [Aggregation.SVD, Aggregation.FLEXLORA]


def pair(rng, module="m", *, r=R, a=1.0, b=1.0):
    """A LoRA pair with values of these sizes."""
    return {
        f"{module}.lora_A": (a * rng.normal(size=(r, IN))).astype(np.float32),
        f"{module}.lora_B": (b * rng.normal(size=(OUT, r))).astype(np.float32),
    }


def near(rng, current, by):
    """An adapter that differs from another by noise of this size."""
    return {n: (v + by * rng.normal(size=v.shape)).astype(np.float32) for n, v in current.items()}


def case(seed, *, clients=3, by=0.3, b=0.2):
    """A current adapter of one module, and updates of clients that trained it."""
    rng = np.random.default_rng(seed)
    current = pair(rng, b=b)
    updates = [
        ClientUpdate(f"c{i}", int(rng.integers(1, 50)), near(rng, current, by))
        for i in range(clients)
    ]
    return current, updates


def product(adapter, module="m"):
    b, a = adapter[f"{module}.lora_B"], adapter[f"{module}.lora_A"]
    return b.astype(np.float64) @ a.astype(np.float64)


def mean_product(updates):
    """Dense, over the holders' weights."""
    total = sum(u.num_examples * u.weight for u in updates)
    return sum(u.num_examples * u.weight / total * product(u.tensors) for u in updates)


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def drift(new, old):
    return np.sqrt(sum(((new[n].astype(np.float64) - old[n]) ** 2).sum() for n in old))


def of(method, **changes):
    return AggregationSettings(method=method, **changes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error_feedback", [False, True])
def test_with_every_method_the_order_of_the_clients_does_not_matter(method, error_feedback):
    current, updates = case(0, clients=4)
    settings = of(method, error_feedback=error_feedback, server_optimizer="momentum")
    first = combine(current, updates, settings=settings)
    for order in permutations(updates):
        again = combine(current, order, settings=settings)
        assert again.report == first.report
        assert again.adapter.keys() == first.adapter.keys()
        for name, values in first.adapter.items():
            np.testing.assert_array_equal(again.adapter[name], values)
        for name, values in first.state.to_tensors().items():
            np.testing.assert_array_equal(again.state.to_tensors()[name], values)


@pytest.mark.parametrize("method", METHODS)
def test_with_every_method_one_client_alone_gives_its_own_product(method):
    current, (update,) = case(1, clients=1)
    frozen = {Factor.A: "m.lora_B", Factor.B: "m.lora_A"}.get(trained_factor(method, 2))
    if frozen:
        update.tensors[frozen] = current[frozen]
    new = combine(current, [update], settings=of(method, error_feedback=True), round_number=2)
    expected = product(update.tensors)
    assert np.abs(product(new.adapter) - expected).max() < 1e-6 * np.abs(expected).max()
    assert new.report.fedit_error == 0
    if not method.mixes_ranks and method not in (Aggregation.SVD, Aggregation.ANCHOR):
        for name, values in update.tensors.items():
            np.testing.assert_array_equal(new.adapter[name], values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", [False, True])
def test_while_b_is_zero_nothing_is_divided_by_it(method, trained):
    rng = np.random.default_rng(2)
    current = pair(rng, b=0.0)
    updates = [
        ClientUpdate(c, 1, near(rng, current, 0.1) if trained else dict(current)) for c in "ab"
    ]
    settings = of(method, error_feedback=True, server_optimizer="fedadam")
    state = ServerState()
    for number in (1, 2, 3):
        result = combine(current, updates, settings=settings, state=state, round_number=number)
        for values in (*result.adapter.values(), *result.state.to_tensors().values()):
            assert np.isfinite(values).all()
        assert np.isfinite(result.report.fedit_error)
        state = result.state
    if not trained:  # and a pair that can still be trained stays one
        assert np.abs(result.adapter["m.lora_A"] - current["m.lora_A"]).max() < 1e-6
        assert not result.adapter["m.lora_B"].any()


@pytest.mark.parametrize("seed", range(20))
def test_anchor_is_the_least_squares_b_and_never_worse_than_the_mean_of_b(seed):
    current, updates = case(seed, clients=2 + seed % 4, by=0.1 + 0.05 * seed)
    plain = aggregate(current, updates)
    anchor = aggregate(current, updates, settings=of(Aggregation.ANCHOR))
    np.testing.assert_array_equal(anchor["m.lora_A"], plain["m.lora_A"])
    target = mean_product(updates)
    a = anchor["m.lora_A"].astype(np.float64)
    best, *_ = np.linalg.lstsq(a.T, target.T, rcond=None)
    np.testing.assert_allclose(anchor["m.lora_B"], best.T, rtol=1e-5, atol=1e-6)
    error, plain_error = (np.linalg.norm(product(x) - target) for x in (anchor, plain))
    assert error < plain_error


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("seed", range(5))
def test_svd_and_flexlora_give_the_best_product_of_the_rank(method, seed):
    current, updates = case(seed, clients=4)
    new = aggregate(current, updates, settings=of(method))
    expected = truncated(mean_product(updates), R)
    assert np.abs(product(new) - expected).max() < 1e-6 * np.abs(expected).max()


def test_svd_moves_the_factors_as_little_as_a_rotation_can():
    current, updates = case(3, by=0.1)
    new = aggregate(current, updates, settings=of(Aggregation.SVD))
    least = drift(new, current)
    # 200 other rotations between the factors: the same product, each of them further away.
    rng = np.random.default_rng(0)
    for scale in (0.01, 3.0):
        for _ in range(100):
            turn, _ = np.linalg.qr(np.eye(R) + scale * rng.normal(size=(R, R)))
            turned = {"m.lora_A": turn.T @ new["m.lora_A"], "m.lora_B": new["m.lora_B"] @ turn}
            assert drift(turned, current) > least - 1e-6
    unaligned = aggregate(current, updates, settings=of(Aggregation.FLEXLORA))
    assert least < 0.5 * drift(unaligned, current)


def test_flexlora_keeps_the_signs_of_the_factors():
    current, updates = case(29)
    sorted_ = aggregate(current, updates, settings=of(Aggregation.FLEXLORA))
    for flips in ([1, 1, 1], [-1, 1, 1], [1, -1, -1]):
        flip = array(*flips)
        given = {
            "m.lora_A": flip[:, None] * sorted_["m.lora_A"],
            "m.lora_B": sorted_["m.lora_B"] * flip,
        }
        again = aggregate(given, [ClientUpdate("a", 1, given)], settings=of(Aggregation.FLEXLORA))
        assert drift(again, given) < 1e-5


def test_svd_keeps_the_ratio_of_the_norms():
    current, updates = case(4, b=0.01, by=0.05)
    new = aggregate(current, updates, settings=of(Aggregation.SVD))
    ratio, before = (
        np.linalg.norm(x["m.lora_A"]) / np.linalg.norm(x["m.lora_B"]) for x in (new, current)
    )
    assert ratio == pytest.approx(before, rel=1e-6)


def test_svd_keeps_the_norm_of_a_when_b_was_zero():
    current, updates = case(5, b=0.0, by=0.05)
    new = aggregate(current, updates, settings=of(Aggregation.SVD))
    norm, before = (np.linalg.norm(x["m.lora_A"]) for x in (new, current))
    assert norm == pytest.approx(before, rel=1e-6)
    expected = truncated(mean_product(updates), R)
    assert np.abs(product(new) - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("method", EXACT)
def test_a_direction_that_the_product_lacks_stays_trainable(method):
    rng = np.random.default_rng(6)
    current = pair(rng, b=0.1)
    tensors = near(rng, current, 0.1)
    tensors["m.lora_B"][:, 1:] = 0  # a product of rank 1
    new = aggregate(current, [ClientUpdate("a", 1, tensors)], settings=of(method))
    expected = product(tensors)
    assert np.abs(product(new) - expected).max() < 1e-6 * np.abs(expected).max()
    # The gradient of B is G A': where A has full rank, B can grow in every direction.
    assert np.linalg.svd(new["m.lora_A"], compute_uv=False).min() > 0.1


def full(result):
    """The global model's product: the adapter's and the residual's."""
    p, q = result.state.residuals["m"]
    return product(result.adapter) + p @ q


@pytest.mark.parametrize("method", [Aggregation.FEDIT, Aggregation.ANCHOR, *EXACT])
def test_with_error_feedback_nothing_of_the_exact_mean_is_lost(method):
    settings = of(method, error_feedback=True)
    # Products are 12 x 9, so no residual has more than 9 ranks: the cap of 12 is not reached.
    current, updates = case(7, clients=2)
    first = combine(current, updates, settings=settings)
    target = mean_product(updates)
    assert np.abs(full(first) - target).max() < 1e-10
    assert np.abs(product(first.adapter) - target).max() > 1e-3
    p, q = first.state.residuals["m"]
    rng = np.random.default_rng(8)
    updates = [ClientUpdate(c, 1, near(rng, first.adapter, 0.2)) for c in "ab"]
    second = combine(first.adapter, updates, settings=settings, state=first.state)
    assert np.abs(full(second) - (mean_product(updates) + p @ q)).max() < 1e-10


def test_svd_takes_the_residual_of_the_last_round_into_its_target():
    settings = of(Aggregation.SVD, error_feedback=True)
    current, updates = case(9, clients=2)
    first = combine(current, updates, settings=settings)
    p, q = first.state.residuals["m"]
    second = combine(first.adapter, updates, settings=settings, state=first.state)
    expected = truncated(mean_product(updates) + p @ q, R)
    assert np.abs(product(second.adapter) - expected).max() < 1e-6


@pytest.mark.parametrize("method", [Aggregation.FEDIT, Aggregation.ANCHOR, *EXACT])
def test_the_residual_has_at_most_four_ranks_and_is_the_best_of_them(method):
    rng = np.random.default_rng(10)
    current = pair(rng, r=1)
    updates = [ClientUpdate(f"c{i}", 1 + i, near(rng, current, 0.5)) for i in range(8)]
    result = combine(current, updates, settings=of(method, error_feedback=True))
    p, q = result.state.residuals["m"]
    assert (p.shape, q.shape) == ((OUT, 4), (4, IN))
    rest = mean_product(updates) - product(result.adapter)
    assert np.linalg.norm(rest - truncated(rest, 4)) > 1e-3  # the cap does cut
    assert np.abs(p @ q - truncated(rest, 4)).max() < 1e-10


def test_a_residual_of_nothing_is_not_kept():
    current, updates = case(11, clients=1)
    settings = of(Aggregation.FEDIT, error_feedback=True)
    assert combine(current, updates, settings=settings).state.to_tensors() == {}


def test_the_residual_is_what_the_factors_miss_and_not_what_the_server_holds_back():
    current, updates = case(31)
    whole, half = (
        combine(
            current,
            updates,
            settings=of(Aggregation.SVD, error_feedback=True, server_learning_rate=rate),
        )
        for rate in (1.0, 0.5)
    )
    assert not np.array_equal(half.adapter["m.lora_B"], whole.adapter["m.lora_B"])
    for ours, theirs in zip(half.state.residuals["m"], whole.state.residuals["m"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_residual_of_a_module_nobody_trained_stays():
    current, updates = case(12)
    settings = of(Aggregation.SVD, error_feedback=True)
    state = combine(current, updates, settings=settings).state
    after = combine(current, [], settings=settings, state=state).state
    assert after.residuals["m"] is state.residuals["m"]


def test_an_export_gets_the_residual_of_every_module_in_float32():
    p, q = np.full((OUT, 2), 0.1), np.full((2, IN), 0.2)
    factors = residual_factors(ServerState({"m": (p, q)}))
    assert list(factors) == ["m"]
    assert [f.dtype for f in factors["m"]] == [np.float32, np.float32]
    np.testing.assert_array_equal(factors["m"][0], np.float32(0.1) * np.ones((OUT, 2)))
    assert residual_factors(ServerState()) == {}


def test_which_factor_clients_train():
    # Round 1 of rolora trains B: A has no gradient while B is zero.
    rolora = [trained_factor(Aggregation.ROLORA, number).value for number in (1, 2, 3, 4, 5)]
    assert rolora == ["B", "B", "A", "B", "A"]
    assert {trained_factor(Aggregation.FFA, number) for number in (1, 2, 3)} == {Factor.B}
    for method in set(METHODS) - {Aggregation.ROLORA, Aggregation.FFA}:
        assert trained_factor(method, 1) is trained_factor(method, 2) is Factor.BOTH


@pytest.mark.parametrize(
    ("method", "number", "trained", "frozen"),
    [
        (Aggregation.ROLORA, 2, "m.lora_B", "m.lora_A"),
        (Aggregation.ROLORA, 3, "m.lora_A", "m.lora_B"),
        (Aggregation.FFA, 2, "m.lora_B", "m.lora_A"),
        (Aggregation.FFA, 3, "m.lora_B", "m.lora_A"),
    ],
)
def test_a_frozen_factor_stays_whatever_the_updates_say(method, number, trained, frozen):
    current, updates = case(13)
    settings = of(method, server_optimizer="momentum", server_learning_rate=0.5)
    new = combine(current, updates, settings=of(method), round_number=number)
    assert new.adapter[frozen] is current[frozen]
    np.testing.assert_array_equal(new.adapter[trained], aggregate(current, updates)[trained])
    assert new.report.fedit_error == pytest.approx(0, abs=1e-12)
    stepped = combine(current, updates, settings=settings, round_number=number)
    assert stepped.adapter[frozen] is current[frozen]
    assert set(stepped.state.first_moments) == {trained}
    # It need not be in the update at all.
    without = [replace(u, tensors={trained: u.tensors[trained]}) for u in updates]
    again = aggregate(current, without, settings=of(method), round_number=number)
    np.testing.assert_array_equal(again[trained], new.adapter[trained])


def test_hetlora_pads_with_zeros_and_weights_by_examples_and_norm():
    current = {"m.lora_A": np.ones((2, 2), np.float32), "m.lora_B": np.ones((1, 2), np.float32)}
    small = {"m.lora_A": array([3, 4]), "m.lora_B": array([2])}
    large = {"m.lora_A": array([0, 5], [0, 5]), "m.lora_B": array([1, 3])}
    small = {name: values.reshape(1, -1) for name, values in small.items()}
    large["m.lora_B"] = large["m.lora_B"].reshape(1, 2)
    updates = [ClientUpdate("small", 6, small), ClientUpdate("large", 1, large)]
    new = aggregate(current, updates, settings=of(Aggregation.HETLORA))
    # Norms: |2 * (3, 4)| = 10, |1 * (0, 5) + 3 * (0, 5)| = 20; weights 6 * 10 : 1 * 20 = 3 : 1.
    # A: rows (3 * (3, 4) + (0, 5)) / 4 and (0 + (0, 5)) / 4; B: (3 * 2 + 1) / 4 and (0 + 3) / 4.
    np.testing.assert_allclose(new["m.lora_A"], [[2.25, 4.25], [0, 1.25]], rtol=1e-7)
    np.testing.assert_allclose(new["m.lora_B"], [[1.75, 0.75]], rtol=1e-7)


def test_flexlora_of_different_ranks_is_the_truncated_mean_with_the_best_direction_first():
    rng = np.random.default_rng(14)
    current = pair(rng)
    updates = [ClientUpdate(f"c{r}", 10 * r, pair(rng, r=r)) for r in (1, 2, 3)]
    new = aggregate(current, updates, settings=of(Aggregation.FLEXLORA))
    target = mean_product(updates)
    for rank in (1, 2, 3):  # what a client of that rank is given
        given = {"m.lora_A": new["m.lora_A"][:rank], "m.lora_B": new["m.lora_B"][:, :rank]}
        np.testing.assert_allclose(product(given), truncated(target, rank), atol=1e-6)


@pytest.mark.parametrize("method", [Aggregation.HETLORA, Aggregation.FLEXLORA])
@pytest.mark.parametrize(
    ("shape_a", "shape_b", "reason"),
    [
        ((R + 1, IN), (OUT, R + 1), "eve: m.lora_A has rank 4, the adapter 3"),
        ((2, IN), (OUT, R + 1), "eve: m.lora_B has rank 4, the adapter 3"),
        ((2, IN), (OUT, 1), "eve: m has an A of rank 2 and a B of rank 1"),
        ((2, IN + 1), (OUT, 2), "eve: m.lora_A does not have the shape"),
        ((2, IN), (OUT + 1, 2), "eve: m.lora_B does not have the shape"),
        ((IN,), (OUT, 1), "eve: m.lora_A does not have the shape"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(method, shape_a, shape_b, reason):
    current, updates = case(15)
    tensors = {"m.lora_A": np.ones(shape_a, np.float32), "m.lora_B": np.ones(shape_b, np.float32)}
    with pytest.raises(ValueError, match=reason):
        aggregate(current, [*updates, ClientUpdate("eve", 1, tensors)], settings=of(method))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {Aggregation.HETLORA, *EXACT}))
def test_a_smaller_rank_is_refused_where_ranks_may_not_differ(method):
    current, updates = case(16)
    tensors = pair(np.random.default_rng(0), r=R - 1)
    with pytest.raises(ValueError, match=r"eve: m\.lora_[AB] .* is not in the adapter"):
        aggregate(current, [*updates, ClientUpdate("eve", 1, tensors)], settings=of(method))


def test_half_of_a_pair_is_refused():
    current, updates = case(17)
    half = ClientUpdate("eve", 1, {"m.lora_A": current["m.lora_A"]})
    with pytest.raises(ValueError, match=r"eve: m\.lora_B is missing"):
        aggregate(current, [*updates, half])
    with pytest.raises(ValueError, match="x is not half of a LoRA pair, which svd needs"):
        aggregate(CURRENT, [], settings=of(Aggregation.SVD))


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_normalised_over_the_holders_of_a_module_and_not_over_the_cohort(method):
    current, updates = case(18, clients=2)
    other = pair(np.random.default_rng(19), "n")
    alone = aggregate(current, updates, settings=of(method))
    among = aggregate(
        current | other,
        [*updates, ClientUpdate("heavy", 10**6, other)],
        settings=of(method),
    )
    for name, values in alone.items():
        np.testing.assert_array_equal(among[name], values)


def test_a_late_update_counts_for_its_weight():
    late = [replace(UPDATES[0], weight=0.5), *UPDATES[1:]]
    # x: 1 * 0.5 and 3: (0.5 * 1 + 3 * 5) / 3.5 = 31/7
    assert aggregate(CURRENT, late)["x"][0] == pytest.approx(31 / 7, rel=1e-7)


def test_a_module_with_too_few_holders_keeps_its_values():
    first, second = (pair(np.random.default_rng(i), name) for i, name in ((20, "m"), (21, "n")))
    rng = np.random.default_rng(22)
    updates = [
        ClientUpdate("a", 1, near(rng, first | second, 0.1)),
        ClientUpdate("b", 1, near(rng, first, 0.1)),
    ]
    settings = of(Aggregation.SVD, min_holders=2, error_feedback=True, server_optimizer="momentum")
    third = pair(np.random.default_rng(23), "o")
    result = combine(first | second | third, updates, settings=settings)
    for name, values in (second | third).items():
        assert result.adapter[name] is values
    assert not np.array_equal(result.adapter["m.lora_A"], first["m.lora_A"])
    assert set(result.state.residuals) == {"m"}
    assert set(result.state.first_moments) == set(first)
    assert result.report.left_alone == ("n",)
    assert result.report.num_holders == {"m": 2, "n": 1, "o": 0}


def test_few_holders_shorten_the_step():
    # x has 2 holders and the mean (4, 5), y the mean 6: 9 + 2 / (2 + 3) * (mean - 9).
    result = aggregate(CURRENT, UPDATES, settings=AggregationSettings(shrink=3.0))
    np.testing.assert_allclose(result["x"], [7, 7.4], rtol=1e-7)
    np.testing.assert_allclose(result["y"], [7.8], rtol=1e-7)
    # One holder: 9 + 1 / (1 + 3) * (1 - 9) = 7
    result = aggregate(CURRENT, UPDATES[:1], settings=AggregationSettings(shrink=3.0))
    assert result["x"][0] == 7


def test_server_momentum_goes_on_over_rounds_and_forgets_nothing_meanwhile():
    settings = AggregationSettings(server_optimizer="momentum", server_momentum=0.5)
    first = combine(
        {"x": array(0), "y": array(0)}, [ClientUpdate("a", 1, {"x": array(4)})], settings=settings
    )
    # y: nobody.
    assert (first.adapter["x"].tolist(), first.adapter["y"].tolist()) == ([4], [0])
    assert set(first.state.first_moments) == {"x"}
    idle = combine(first.adapter, [], settings=settings, state=first.state)
    assert idle.adapter["x"].tolist() == [4]
    second = combine(
        idle.adapter, [ClientUpdate("a", 1, {"x": array(5)})], settings=settings, state=idle.state
    )
    # v = 0.5 * 4 + (5 - 4) = 3; 4 + 3 = 7
    assert second.adapter["x"].tolist() == [7]


def test_fedadam_moves_b_and_lets_a_be_averaged():
    current, updates = case(24)
    settings = AggregationSettings(server_optimizer="fedadam", server_learning_rate=0.01)
    plain = aggregate(current, updates)
    result = combine(current, updates, settings=settings)
    np.testing.assert_array_equal(result.adapter["m.lora_A"], plain["m.lora_A"])
    assert set(result.state.first_moments) == set(result.state.second_moments) == {"m.lora_B"}
    delta = plain["m.lora_B"].astype(np.float64) - current["m.lora_B"]
    second = 0.99 * 1e-6 + 0.01 * delta**2
    expected = current["m.lora_B"] + 0.01 * 0.1 * delta / (np.sqrt(second) + 1e-3)
    np.testing.assert_allclose(result.adapter["m.lora_B"], expected, rtol=1e-6, atol=1e-8)
    both = combine(current, updates, settings=replace(settings, fedadam_factor=Factor.BOTH))
    assert set(both.state.first_moments) == set(current)


@pytest.mark.parametrize("seed", range(3))
def test_the_report_measures_what_plain_averaging_gets_wrong(seed):
    current, updates = case(seed, by=0.5)
    target = mean_product(updates)
    expected = np.linalg.norm(target - product(aggregate(current, updates)))
    # A second module, with one holder, has no error: the mean is half.
    other = pair(np.random.default_rng(25), "n")
    updates = [*updates, ClientUpdate("d", 3, other)]
    for method in (Aggregation.FEDIT, Aggregation.SVD):
        report = combine(current | other, updates, settings=of(method)).report
        error = 0.5 * expected / np.linalg.norm(target)
        assert report.fedit_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["fedavg", "momentum", "fedadam"])
def test_a_restart_between_two_rounds_changes_no_bit(method, optimizer, tmp_path):
    settings = of(method, error_feedback=True, server_optimizer=optimizer)
    current, updates = case(26)
    first = combine(current, updates, settings=settings, round_number=2)
    save_file(first.adapter, tmp_path / "adapter.safetensors")
    save_file(first.state.to_tensors(), tmp_path / "state.safetensors")
    restored = ServerState.from_tensors(load_file(tmp_path / "state.safetensors"))
    adapter = load_file(tmp_path / "adapter.safetensors")
    results = [
        combine(adapter_before, updates, settings=settings, state=state, round_number=3)
        for adapter_before, state in ((first.adapter, first.state), (adapter, restored))
    ]
    for before, after in (
        (first.state.to_tensors(), restored.to_tensors()),
        (results[0].adapter, results[1].adapter),
        (results[0].state.to_tensors(), results[1].state.to_tensors()),
    ):
        assert before.keys() == after.keys()
        for name, values in before.items():
            assert values.dtype == after[name].dtype
            np.testing.assert_array_equal(after[name], values)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"what.m": np.zeros(1)}, "what.m is not part of a server state"),
        ({"first_moment": np.zeros(1)}, "first_moment is not part"),
        ({"residual.m.P": np.zeros((4, 2))}, "residual.m lacks its P or its Q"),
        ({"residual.m.R": np.zeros((4, 2))}, "residual.m lacks its P or its Q"),
        (
            {"residual.m.P": np.zeros((4, 2)), "residual.m.Q": np.zeros((3, 4))},
            r"residual.m: P \(4, 2\) and Q \(3, 4\) do not fit",
        ),
        (
            {f"residual.m.{x}": np.zeros((2, 2)) for x in "PQR"},
            "a residual has parts that are neither P nor Q",
        ),
    ],
)
def test_a_broken_state_file_is_refused(tensors, reason):
    with pytest.raises(ValueError, match=reason):
        ServerState.from_tensors(tensors)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (ServerState({"n": (np.zeros((OUT, 1)), np.zeros((1, IN)))}), "residual of n"),
        (ServerState({"m": (np.zeros((OUT, 1)), np.zeros((1, OUT)))}), "residual of m"),
        (ServerState({}, {"m.lora_A": np.zeros((1, IN))}), "moment of m.lora_A"),
        (ServerState({}, {}, {"n.lora_A": np.zeros((R, IN))}), "moment of n.lora_A"),
    ],
)
def test_the_state_of_another_adapter_is_refused(state, reason):
    current, updates = case(27)
    with pytest.raises(ValueError, match=reason):
        combine(current, updates, state=state)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"min_holders": 0}, "min_holders is 0"),
        ({"shrink": -1.0}, "shrink is -1.0"),
        ({"method": "mean"}, "mean"),
        ({"server_optimizer": "sgd"}, "sgd"),
        ({"server_learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"server_momentum": 1.0}, "momentum is 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(changed, reason):
    with pytest.raises(ValueError, match=reason):
        AggregationSettings(**changed)


class Lazy(Mapping):
    """Reads a tensor when it is asked for it, and notes that."""

    def __init__(self, client_id, tensors, reads):
        self.client_id, self.tensors, self.reads = client_id, tensors, reads

    def __getitem__(self, name):
        self.reads.append((name, self.client_id))
        return self.tensors[name].copy()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_read_once_and_module_by_module(method):
    rng = np.random.default_rng(28)
    current = pair(rng, "m") | pair(rng, "n")
    reads: list[tuple[str, str]] = []
    updates = [ClientUpdate(c, 1, near(rng, current, 0.1)) for c in "ab"]
    lazy = [replace(u, tensors=Lazy(u.client_id, u.tensors, reads)) for u in updates]
    settings = of(method, error_feedback=True)
    result = combine(current, lazy, settings=settings, round_number=2)
    assert len(reads) == len(set(reads))
    modules = [name.split(".")[0] for name, _ in reads]
    assert modules == sorted(modules)
    wanted = {n for n in current if trained_factor(method, 2).includes(n)}
    assert {name for name, _ in reads} == wanted
    eager = combine(current, updates, settings=settings, round_number=2)
    for name, values in eager.adapter.items():
        np.testing.assert_array_equal(result.adapter[name], values)


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 40])
def test_the_norm_of_a_product_is_the_same_whichever_way_it_is_cheaper(rank):
    rng = np.random.default_rng(rank)
    left, right = rng.normal(size=(6, rank)), rng.normal(size=(rank, 12))  # 4 ranks are as cheap
    expected = np.linalg.norm(left @ right) ** 2
    assert squared_norm((left, right)) == pytest.approx(expected, rel=1e-12)
