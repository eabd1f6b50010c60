"""What the paper says, claim by claim; statements are numbered as in METHOD, section 1."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from fedpruner_common.adapters import LoraTarget
from fedpruner_common.budget import MemoryProfile
from fedpruner_common.components import Kind, all_components
from fedpruner_common.similarity import CkaAccumulator, gram, hsic1
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Family, FamilyStatistics, Granularity, Statistics
from fedpruner_common.submodel import Submodel
from fedpruner_server.core.aggregation import ClientUpdate, aggregate
from fedpruner_server.core.grouping import spectral_groups
from fedpruner_server.core.planning import ClientPlan, PlanSettings, plan_client
from fedpruner_server.core.selection import choose

MIB = 1 << 20
EMPTY = 12 * MIB  # what the process needs beside a floor of 0 and the weights
LAYERS = 8


def model() -> ModelSpec:
    """8 layers whose attention weighs 1 MiB and whose ffn weighs 2 MiB; nothing else costs."""
    components = all_components(LAYERS)
    nothing = dict.fromkeys(components, 0)
    memory = MemoryProfile(
        weight_bytes={c: MIB if c.kind is Kind.ATTENTION else 2 * MIB for c in components},
        shared_weight_bytes=0,
        disk_ratio=0.0,
        lora_parameters=nothing,
        saved_bytes=nothing,
        shared_saved_bytes=0,
        layer_input_bytes=0,
        temporary_bytes=nothing,
        loss_bytes=0,
        gradient_checkpointing=False,
    )
    return ModelSpec(
        num_layers=LAYERS,
        shared_tensors=("embed", "head", "norm"),
        component_tensors={c: (f"layers.{c}.weight",) for c in components},
        lora_targets={c: (LoraTarget(f"layers.{c}.proj", 4, 6),) for c in components},
        fan_in_fan_out=False,
        memory=memory,
    )


def random_similarity(seed: int, n: int = LAYERS) -> np.ndarray:
    raw = np.random.default_rng(seed).uniform(0.2, 1.0, size=(n, n))
    return (raw + raw.T) / 2


def plan(
    budget_mib: float,
    *,
    granularity: Granularity = Granularity.LAYER,
    importance: dict[Family, tuple[float, ...]] | None = None,
    sample: bool = True,
    client_id: str = "a",
) -> ClientPlan:
    families = {
        family: FamilyStatistics(
            random_similarity(index),
            (importance or {}).get(family, tuple(float(i % 3 + 1) for i in range(LAYERS))),
        )
        for index, family in enumerate(granularity.families)
    }
    return plan_client(
        model(),
        Statistics(families, source="public", score="loo"),
        PlanSettings(granularity, sample=sample, protect=(), margin=0.0, seed=0),
        client_id=client_id,
        round_number=1,
        budget_bytes=int(EMPTY + budget_mib * MIB),
        floor_bytes=0,
    )


def test_every_device_gets_a_submodel_of_whole_layers_that_fits_its_memory():
    """METHOD, statement 2."""
    for budget_mib in (3, 7.5, 12, 20):
        submodel = plan(budget_mib).submodel
        assert len(submodel.components) == 2 * len(submodel.layers())
        assert 3 * len(submodel.layers()) <= budget_mib < 3 * (len(submodel.layers()) + 1)


def test_similarity_is_hsic_over_the_root_of_both_self_hsics():
    """METHOD, statement 3: CKA(i, j) = HSIC(i, j) / sqrt(HSIC(i, i) HSIC(j, j))."""
    k = np.zeros((4, 4))
    k[[0, 1, 2, 3], [1, 0, 3, 2]] = 1  # edges 0-1, 2-3
    m = k.copy()
    m[[0, 2], [2, 0]] = 1  # and 0-2
    # By hand, n = 4: HSIC = (tr(KL) + sum K sum L / 6 - sum of KL) / 4.
    assert hsic1(k, k) == pytest.approx((4 + 16 / 6 - 4) / 4)  # 2/3
    assert hsic1(m, m) == pytest.approx((6 + 36 / 6 - 10) / 4)  # 1/2
    assert hsic1(k, m) == pytest.approx((4 + 24 / 6 - 6) / 4)  # 1/2
    accumulator = CkaAccumulator(2)
    accumulator.add([k, m])
    # (1/2) / sqrt(2/3 * 1/2) = sqrt(3) / 2
    assert accumulator.matrix()[0, 1] == pytest.approx(np.sqrt(3) / 2)


def test_similarity_is_linear_cka_of_the_layers_outputs():
    """METHOD, statement 4: for many tokens, |Y'X|^2 / (|X'X| |Y'Y|) of centred features."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 8))
    y = x @ rng.normal(size=(8, 8)) + 2 * rng.normal(size=(1500, 8))
    accumulator = CkaAccumulator(2)
    accumulator.add([gram(x), gram(y)])
    centred = []
    for features in (x, y):
        rows = features / np.sqrt((features**2).mean(axis=1, keepdims=True))
        centred.append(rows - rows.mean(axis=0))
    a, b = centred
    expected = np.linalg.norm(b.T @ a) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert 0.2 < expected < 0.95
    assert accumulator.matrix()[0, 1] == pytest.approx(expected, abs=0.02)


def test_the_graph_of_layers_is_complete_and_undirected():
    """METHOD, statement 5: every pair of layers is an edge, however weak, in both directions."""
    similarity = np.full((4, 4), 0.01)
    for i, j in ((0, 2), (1, 3)):
        similarity[i, j] = similarity[j, i] = 0.02
    # No threshold: the same pattern of weak edges decides as a strong one would.
    for scale in (1.0, 50.0):
        assert spectral_groups(scale * similarity, 2, seed=0).tolist() == [0, 1, 0, 1]
    one_sided = np.triu(similarity) * 2  # the mean of both directions is what it was
    assert spectral_groups(one_sided, 2, seed=0).tolist() == [0, 1, 0, 1]


def test_the_layers_fall_into_k_disjoint_groups():
    """METHOD, statement 6."""
    for num_kept in range(1, LAYERS + 1):
        choices = plan(3 * num_kept).choices[Family.LAYER]
        assert len(choices) == num_kept
        members = [item for choice in choices for item in choice.members]
        assert sorted(members) == list(range(LAYERS))


def partitions(n: int, k: int) -> Iterator[tuple[int, ...]]:
    """Every way to put n items into k groups, labels ordered by their first item."""
    for labels in product(range(k), repeat=n):
        firsts = list(dict.fromkeys(labels))
        if firsts == list(range(k)):
            yield labels


def scatter(points: np.ndarray, labels: tuple[int, ...]) -> float:
    """What k-means minimises: squared distances to the centre of one's group."""
    total = 0.0
    for label in set(labels):
        group = points[np.array(labels) == label]
        total += float(((group - group.mean(axis=0)) ** 2).sum())
    return total


def best_partition(laplacian: np.ndarray, k: int) -> list[int]:
    _, vectors = np.linalg.eigh(laplacian)
    points = vectors[:, :k]
    return list(min(partitions(len(points), k), key=lambda labels: scatter(points, labels)))


@pytest.mark.parametrize("k", [2, 3])
def test_groups_are_k_means_of_the_k_smallest_eigenvectors_of_d_minus_w(k):
    """METHOD, statements 7 and 8: against all partitions of six layers, tried one by one."""
    normalised_differs = False
    for seed in range(6):
        weights = random_similarity(seed, 6)
        np.fill_diagonal(weights, 0.0)
        degrees = weights.sum(axis=1)
        laplacian = np.diag(degrees) - weights
        found = spectral_groups(weights, k, seed=0).tolist()
        assert found == best_partition(laplacian, k)
        root = np.sqrt(np.outer(degrees, degrees))
        normalised_differs |= found != best_partition(laplacian / root, k)
    assert normalised_differs  # the unnormalised Laplacian is not just any Laplacian


def test_groups_need_not_be_contiguous():
    """METHOD, statement 9."""
    similarity = np.full((6, 6), 0.1)
    for group in ([0, 3, 5], [1, 2, 4]):
        similarity[np.ix_(group, group)] = 0.9
    assert spectral_groups(similarity, 2, seed=0).tolist() == [0, 1, 1, 0, 1, 0]


def test_an_outlier_is_a_group_of_its_own_beside_one_large_group():
    """METHOD, statement 10: group sizes may be very unequal."""
    similarity = np.full((12, 12), 0.9) + np.random.default_rng(0).uniform(-0.02, 0.02, (12, 12))
    similarity[0, :] = similarity[:, 0] = 0.2
    assert spectral_groups(similarity, 2, seed=0).tolist() == [0] + [1] * 11


def test_every_group_is_represented_by_exactly_one_of_its_layers():
    """METHOD, statement 11."""
    for budget_mib in (6, 12, 18):
        result = plan(budget_mib)
        kept = set(result.submodel.layers())
        for choice in result.choices[Family.LAYER]:
            assert kept & set(choice.members) == {choice.chosen}


def test_a_layer_is_selected_with_a_probability_proportional_to_its_importance():
    """METHOD, statements 11 and 12: over many draws, layers worth 1 to 4 are drawn so often."""
    rng = np.random.default_rng(0)
    num_draws = 20_000
    counts = np.zeros(4)
    for uniform in rng.random(num_draws):
        counts[choose([0] * 4, [1.0, 2.0, 3.0, 4.0], uniforms=[uniform])[0].chosen] += 1
    # 1/10 .. 4/10; the standard deviation is at most sqrt(0.24 / 20000) = 0.0035
    np.testing.assert_allclose(counts / num_draws, [0.1, 0.2, 0.3, 0.4], atol=0.014)


def test_devices_with_the_same_memory_draw_their_own_layers():
    """METHOD, statement 10: the selection is a draw."""
    drawn = {plan(9, client_id=f"device-{i}").submodel.layers() for i in range(12)}
    assert len(drawn) > 3


def test_a_submodel_is_its_selected_layers_in_original_order_and_the_shared_tensors():
    """METHOD, statement 13."""
    spec, result = model(), plan(9)
    chosen = [choice.chosen for choice in result.choices[Family.LAYER]]
    assert [c.layer for c in result.submodel.components] == [
        i for i in sorted(chosen) for _ in (0, 1)
    ]
    expected = {"embed", "head", "norm"}
    for layer in chosen:
        expected |= {f"layers.{layer}.attention.weight", f"layers.{layer}.ffn.weight"}
    assert set(spec.tensor_names(result.submodel)) == expected


def test_only_kept_layers_carry_lora():
    """METHOD, statement 13."""
    spec = model()
    submodel = Submodel.of(LAYERS, [c for c in all_components(LAYERS) if c.layer in (2, 5)])
    names = spec.adapter_shapes(4, submodel.components)
    assert {name.split(".")[1] for name in names} == {"2", "5"}
    assert len(names) == 8  # two layers, two halves, A and B
    assert len(spec.adapter_shapes(4)) == 32  # the global adapter has all eight


def test_the_server_averages_a_and_b_of_each_layer_over_the_devices_that_trained_it():
    """METHOD, statement 14: weighted by examples; a layer nobody trained stays."""

    def layer(number: int, a: float, b: float) -> dict[str, np.ndarray]:
        return {
            f"{number}.lora_A": np.full((2, 3), a, dtype=np.float32),
            f"{number}.lora_B": np.full((4, 2), b, dtype=np.float32),
        }

    current = layer(0, 9, 9) | layer(1, 9, 9) | layer(2, 7, 8)
    updates = [
        ClientUpdate("small", 10, layer(0, 1, 4)),
        ClientUpdate("large", 30, layer(0, 5, 8) | layer(1, 2, 3)),
    ]
    new = aggregate(current, updates)
    # Layer 0: (10 * 1 + 30 * 5) / 40 = 4 and (10 * 4 + 30 * 8) / 40 = 7. Layer 1: `large` alone.
    expected = layer(0, 4, 7) | layer(1, 2, 3) | layer(2, 7, 8)
    for name, values in expected.items():
        np.testing.assert_array_equal(new[name], values)


def test_fedpruner_plus_groups_and_selects_attention_and_ffn_separately():
    """METHOD, statement 16."""
    late = tuple(float(i) for i in range(LAYERS))
    result = plan(
        9,
        granularity=Granularity.COMPONENT,
        importance={Family.ATTENTION: late, Family.FFN: late[::-1]},
        sample=False,
    )
    # 9 MiB hold three of each. One attention per group, one ffn per group, groups of their own.
    assert set(result.choices) == {Family.ATTENTION, Family.FFN}
    for family, worth in ((Family.ATTENTION, late), (Family.FFN, late[::-1])):
        choices = result.choices[family]
        assert len(choices) == 3
        assert sorted(i for choice in choices for i in choice.members) == list(range(LAYERS))
        for choice in choices:
            assert worth[choice.chosen] == max(worth[i] for i in choice.members)
    kept = {kind: {c.layer for c in result.submodel.components if c.kind is kind} for kind in Kind}
    assert kept[Kind.ATTENTION] != kept[Kind.FFN]
    assert 7 in kept[Kind.ATTENTION]
    assert 0 in kept[Kind.FFN]


def test_the_number_of_groups_grows_with_the_memory_of_the_device():
    """METHOD, statement 6: K is determined by the memory budget."""
    sizes = [len(plan(budget_mib).choices[Family.LAYER]) for budget_mib in range(3, 26)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, LAYERS)
    # 3 MiB a layer: 3, 4, 5 -> 1; 6, 7, 8 -> 2; ...; 24, 25 -> 8
    assert sizes == [budget_mib // 3 for budget_mib in range(3, 26)]
