"""What the paper says, statement by statement, and what `profile = "paper"` does about it.

Statements are numbered as in section 1 of the project's METHOD notes; where the paper does not say
(marked *), the test tells our reading. T: also, or only, in `test_paper_training`, where a model
is.

     1 T  the base model takes most of the memory     11 T  one representative of every group
     2 T  submodels of whole layers that fit          12*T  probability: share of the importance
     3 T  CKA of the layers' outputs                  13 T  kept layers in order, LoRA on them only
     4*T  linear kernel, tokens as rows               14 T  mean of A and of B over the holders
     5    complete graph                              15*T  what travels
     6    K groups, K from the budget                 16    FedPruner+: halves of layers
     7    L = D - W                                   17    see below
     8    k-means of the K smallest eigenvectors      18 T  similarity and selection in every round
     9    groups need not be contiguous               19 T  a quarter of the memory
    10    unequal groups, selection by a draw         20 T  ways to drop layers, compared by loss

Statement 17 says that a convergence analysis exists. Its assumptions are not known, so there is
nothing to test; the same holds of the accuracies in statement 19, which need real models.

In the paper a device groups and selects by itself. Here it measures, and the coordinator computes
groups and draws from what that device alone measured: the same plan, made in another place.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpruner_common.adapters import LoraTarget
from fedpruner_common.budget import MemoryProfile
from fedpruner_common.components import Kind, all_components
from fedpruner_common.similarity import CkaAccumulator, gram, hsic1
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import (
    Family,
    FamilyStatistics,
    Granularity,
    Score,
    Statistics,
)
from fedpruner_common.task import BridgeKind
from fedpruner_server import method
from fedpruner_server.config import PlanOptions, ServerSettings
from fedpruner_server.core.aggregation import Aggregation
from fedpruner_server.core.coverage import Coverage
from fedpruner_server.core.grouping import Grouping, spectral_groups
from fedpruner_server.core.planning import ClientPlan, Offer, Policy, plan_round
from fedpruner_server.core.selection import choose
from fedpruner_server.core.server_optimizer import ServerOptimizer
from fedpruner_server.profiles import PROFILES

MIB = 1 << 20
EMPTY = 12 * MIB  # what the process needs beside a floor of 0 and the weights
LAYERS = 8


def settings(profile: str = "paper", **plan: Any) -> ServerSettings:
    """A profile's settings; nothing of a budget stays free: bytes can be counted by hand."""
    return ServerSettings(model=Path("model"), profile=profile, plan={"margin": 0.0, **plan})


def model(num_layers: int = LAYERS) -> ModelSpec:
    """Layers whose attention weighs 1 MiB and whose ffn weighs 2 MiB; nothing else costs."""
    components = all_components(num_layers)
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
        num_layers=num_layers,
        shared_tensors=("embed", "head", "norm"),
        component_tensors={c: (f"layers.{c}.weight",) for c in components},
        lora_targets={c: (LoraTarget(f"layers.{c}.proj", 4, 6),) for c in components},
        fan_in_fan_out=False,
        memory=memory,
    )


def random_similarity(seed: int, n: int = LAYERS) -> np.ndarray:
    raw = np.random.default_rng(seed).uniform(0.2, 1.0, size=(n, n))
    return (raw + raw.T) / 2


def plans(
    offers: dict[str, float],
    options: ServerSettings,
    families: dict[Family, FamilyStatistics],
) -> dict[str, ClientPlan]:
    """The plans of clients with so many MiB for layers, all with the same statistics."""
    (num_layers,) = {len(item.importance) for item in families.values()}
    spec = model(num_layers)
    found = plan_round(
        spec,
        Statistics(families, source="device", score="loo"),
        method.plan_settings(options, spec),
        [Offer(name, int(EMPTY + mib * MIB), floor_bytes=0) for name, mib in offers.items()],
        round_number=1,
    )
    assert all(isinstance(plan, ClientPlan) for plan in found.values())
    return found


def layer_statistics(importance: tuple[float, ...] | None = None) -> dict[Family, FamilyStatistics]:
    values = importance or tuple(float(i % 3 + 1) for i in range(LAYERS))
    return {Family.LAYER: FamilyStatistics(random_similarity(0), values)}


@cache
def plan(budget_mib: float) -> ClientPlan:
    """Of one client, as the paper makes it."""
    return plans({"a": budget_mib}, settings(), layer_statistics())["a"]


# The macro step


def test_statement_02_every_device_gets_a_submodel_of_whole_layers_that_fits_its_memory():
    for budget_mib in (3, 7.5, 12, 20):
        submodel = plan(budget_mib).submodel
        assert len(submodel.components) == 2 * len(submodel.layers())
        assert 3 * len(submodel.layers()) <= budget_mib < 3 * (len(submodel.layers()) + 1)


def test_statement_03_similarity_is_hsic_over_the_root_of_both_self_hsics():
    """CKA(i, j) = HSIC(i, j) / sqrt(HSIC(i, i) HSIC(j, j))."""
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


def test_statement_04_similarity_is_linear_cka_of_the_layers_outputs():
    """For many tokens, |Y'X|^2 / (|X'X| |Y'Y|) of centred features, tokens as they are."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.2, 3.0, size=(1500, 1))
    x = lengths * rng.normal(size=(1500, 8))
    y = x @ rng.normal(size=(8, 8)) + 2 * rng.normal(size=(1500, 8))
    accumulator = CkaAccumulator(2)
    accumulator.add([gram(features, rms_rows=settings().plan.rms_rows) for features in (x, y)])
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    expected = np.linalg.norm(b.T @ a) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert 0.2 < expected < 0.95
    assert accumulator.matrix()[0, 1] == pytest.approx(expected, abs=0.005)


def test_statement_05_the_graph_of_layers_is_complete_and_undirected():
    """Every pair of layers is an edge, however weak, in both directions."""
    similarity = np.full((4, 4), 0.01)
    for i, j in ((0, 2), (1, 3)):
        similarity[i, j] = similarity[j, i] = 0.02
    # No threshold: the same pattern of weak edges decides as a strong one would.
    for scale in (1.0, 50.0):
        assert spectral_groups(scale * similarity, 2, seed=0).tolist() == [0, 1, 0, 1]
    one_sided = np.triu(similarity) * 2  # the mean of both directions is what it was
    assert spectral_groups(one_sided, 2, seed=0).tolist() == [0, 1, 0, 1]


def test_statement_06_the_layers_fall_into_k_disjoint_groups():
    for num_kept in range(1, LAYERS + 1):
        choices = plan(3 * num_kept).choices[Family.LAYER]
        assert len(choices) == num_kept
        members = [item for choice in choices for item in choice.members]
        assert sorted(members) == list(range(LAYERS))


def test_statement_06_the_number_of_groups_follows_from_the_memory_of_the_device():
    """K is determined by the memory budget: as many layers of 3 MiB as there is room for."""
    expected = {3: 1, 5.9: 1, 6: 2, 8.9: 2, 9: 3, 23.9: 7, 24: LAYERS, 25: LAYERS}
    found = {mib: len(plan(mib).choices[Family.LAYER]) for mib in expected}
    assert found == expected


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
def test_statement_07_and_08_groups_are_k_means_of_the_k_smallest_eigenvectors_of_d_minus_w(k):
    """Against all partitions of six layers, tried one by one."""
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


def test_statement_09_groups_need_not_be_contiguous():
    similarity = np.full((6, 6), 0.1)
    for group in ([0, 3, 5], [1, 2, 4]):
        similarity[np.ix_(group, group)] = 0.9
    assert spectral_groups(similarity, 2, seed=0).tolist() == [0, 1, 1, 0, 1, 0]


def test_statement_10_an_outlier_is_a_group_of_its_own_beside_one_large_group():
    """Group sizes may be very unequal."""
    similarity = np.full((12, 12), 0.9) + np.random.default_rng(0).uniform(-0.02, 0.02, (12, 12))
    similarity[0, :] = similarity[:, 0] = 0.2
    assert spectral_groups(similarity, 2, seed=0).tolist() == [0] + [1] * 11


# The micro step


def test_statement_10_in_a_group_of_twenty_layers_each_has_probability_0_05_and_one_is_drawn():
    """What a reader of the paper reports of its sixth group; its layers are worth about the same.

    25 layers, of which five are like no other: with K = 6 these are alone.
    """
    rng = np.random.default_rng(0)
    similarity = 0.9 + rng.uniform(-0.02, 0.02, (25, 25))
    outliers = (0, 1, 2, 23, 24)
    for rank, layer in enumerate(outliers):
        similarity[layer, :] = similarity[:, layer] = 0.1 + 0.05 * rank
    importance = tuple(float(value) for value in rng.uniform(0.98, 1.02, 25))
    statistics = {Family.LAYER: FamilyStatistics(similarity, importance)}
    found = plans({f"device-{i:03}": 18.0 for i in range(100)}, settings(), statistics)
    drawn = set()
    for own in found.values():
        groups = {len(choice.members): choice for choice in own.choices[Family.LAYER]}
        assert sorted(len(choice.members) for choice in own.choices[Family.LAYER]) == [1] * 5 + [20]
        assert {f"{p:.2f}" for p in groups[20].probabilities} == {"0.05"}
        assert set(own.submodel.layers()) == {*outliers, groups[20].chosen}
        drawn.add(groups[20].chosen)
    # A layer is drawn by none of 100 with a probability of 0.95^100 = 0.6 %.
    assert len(drawn) >= 18


def test_statement_10_devices_with_the_same_memory_draw_their_own_layers():
    """The selection is a draw, and one device's draw says nothing about another's."""
    same = plans({f"device-{i}": 9.0 for i in range(12)}, settings(), layer_statistics())
    assert len({own.submodel.layers() for own in same.values()}) > 3
    alone = plans({"device-5": 9.0}, settings(), layer_statistics())
    assert alone["device-5"] == same["device-5"]


def test_statement_11_every_group_is_represented_by_exactly_one_of_its_layers():
    for budget_mib in (6, 12, 18):
        result = plan(budget_mib)
        kept = set(result.submodel.layers())
        for choice in result.choices[Family.LAYER]:
            assert kept & set(choice.members) == {choice.chosen}


def test_statement_12_a_layer_is_selected_with_a_probability_proportional_to_its_importance():
    """Over many draws, layers worth 1 to 4 are drawn so often."""
    rng = np.random.default_rng(0)
    num_draws = 20_000
    counts = np.zeros(4)
    for uniform in rng.random(num_draws):
        counts[choose([0] * 4, [1.0, 2.0, 3.0, 4.0], uniforms=[uniform])[0].chosen] += 1
    # 1/10 .. 4/10; the standard deviation is at most sqrt(0.24 / 20000) = 0.0035
    np.testing.assert_allclose(counts / num_draws, [0.1, 0.2, 0.3, 0.4], atol=0.014)


def test_statement_12_probabilities_are_shares_of_the_importance_within_the_group():
    """All of it: no temperature, no floor, and neither age nor depth counts."""
    importance = (0.5, 0.1, 3.0, 0.2, 0.0, 1.4, 0.4, 2.0)
    choices = plans({"a": 9.0}, settings(), layer_statistics(importance))["a"].choices[Family.LAYER]
    assert max(len(choice.members) for choice in choices) > 1
    for choice in choices:
        worth = np.array([importance[i] for i in choice.members])
        np.testing.assert_allclose(choice.probabilities, worth / worth.sum(), atol=1e-5)


# FedPruner+

# Three groups of attention, three other ones of ffn, and what each half is worth; groups are worth
# very different amounts, which is to make no difference within them.
_ATTENTION_GROUPS = ((0, 1, 2), (3, 4), (5, 6, 7))
_FFN_GROUPS = ((0,), (1, 2, 3, 4), (5, 6, 7))
_ATTENTION_WORTH = (1.0, 2.0, 5.0, 0.03, 0.01, 40.0, 40.0, 20.0)
_FFN_WORTH = (1.0, 4.0, 3.0, 2.0, 1.0, 1.0, 6.0, 3.0)


def block_statistics(
    groups: tuple[tuple[int, ...], ...], importance: tuple[float, ...]
) -> FamilyStatistics:
    similarity = np.full((LAYERS, LAYERS), 0.1)
    for members in groups:
        similarity[np.ix_(members, members)] = 0.9
    return FamilyStatistics(similarity, importance)


def test_statement_16_fedpruner_plus_groups_and_selects_attention_and_ffn_separately():
    """As whole layers are: a draw in every group, by the halves' shares of its importance."""
    families = {
        Family.ATTENTION: block_statistics(_ATTENTION_GROUPS, _ATTENTION_WORTH),
        Family.FFN: block_statistics(_FFN_GROUPS, _FFN_WORTH),
    }
    num_clients = 300
    # 9 MiB hold three of each: 3 * 1 + 3 * 2.
    offers = {f"device-{i:03}": 9.0 for i in range(num_clients)}
    found = plans(offers, settings("paper-plus"), families)
    for family, groups, worth in (
        (Family.ATTENTION, _ATTENTION_GROUPS, _ATTENTION_WORTH),
        (Family.FFN, _FFN_GROUPS, _FFN_WORTH),
    ):
        counts = np.zeros(LAYERS)
        for own in found.values():
            choices = own.choices[family]
            assert {choice.members for choice in choices} == set(groups)
            assert all(len(choice.items) == 1 for choice in choices)
            counts[[choice.chosen for choice in choices]] += 1
        for members in groups:
            own_worth = np.array([worth[i] for i in members])
            # Four standard deviations: sqrt(0.25 / 300) = 0.029
            np.testing.assert_allclose(
                counts[list(members)] / num_clients, own_worth / own_worth.sum(), atol=0.116
            )
    differing = 0
    for own in found.values():
        first, second = (
            {c.layer for c in own.submodel.components if c.kind is kind} for kind in Kind
        )
        differing += first != second
    assert differing > num_clients / 2  # neither half drags the other along


# The round, and the profile as a whole


def test_statement_18_the_layers_are_measured_before_every_round():
    due = [
        method.statistics_due(settings(), number, measured=number - 1 or None, drift=0.0)
        for number in range(1, 13)
    ]
    assert all(due)
    default = settings("default")
    assert not method.statistics_due(default, 2, measured=1, drift=0.0)


ASKED: dict[str, Any] = {
    "policy": Policy.FEDPRUNER,  # 5 to 11: groups and importance
    "granularity": Granularity.LAYER,  # 2: whole layers
    "grouping": Grouping.SPECTRAL,  # 7 and 8
    "selection": "sample",  # 10: a draw
    "joint": False,  # 10, 18: every device's own
    "protect": (),  # 11: from every group one, and from no group more
    "temperature": 1.0,  # 12: shares of the importance as they are
    "floor": 0.0,  # 12
    "importance": Score.LOO,  # 12: our reading of "contribution to model performance"
    "coverage": Coverage.OFF,  # 12: nothing but the importance counts
    "statistics": "device",  # 3: on local data
    "statistics_every": 1,  # 3, 18: in each round
    "rms_rows": False,  # 4: the outputs as they are
    "bridge": BridgeKind.OFF,  # 13: the selected layers, embeddings and head, nothing else
    "correction": False,  # 13
    "streaming": False,  # 2, 13: what does not fit is dropped
}
# Not the method's: what a device keeps free, and options that those above leave without effect.
SILENT = {"margin", "coverage_kappa", "coverage_rounds", "bridge_rank", "bridge_data"}
SILENT |= {"statistics_drift"}  # every round is due anyway
SILENT |= {"stream_seconds"}  # nothing is streamed


def test_the_paper_profile_sets_every_option_that_the_statements_ask_for():
    found = ServerSettings(model=Path("model"), profile="paper")
    assert {key: getattr(found.plan, key) for key in ASKED} == ASKED
    assert set(PlanOptions.model_fields) == ASKED.keys() | SILENT
    # 14: a plain mean, taken as it is, over whoever trained the layer.
    combined = found.aggregation
    assert combined.method is Aggregation.FEDIT
    assert combined.server_optimizer is ServerOptimizer.FEDAVG
    assert (combined.min_holders, combined.shrink, combined.error_feedback) == (1, 0.0, False)
    assert (combined.server_learning_rate, found.training.proximal_mu) == (1.0, 0.0)


def test_the_paper_plus_profile_differs_from_it_by_the_granularity_alone():
    plus = ServerSettings(model=Path("model"), profile="paper-plus").model_dump()
    paper = ServerSettings(model=Path("model"), profile="paper").model_dump()
    assert plus["plan"].pop("granularity") is Granularity.COMPONENT
    assert paper["plan"].pop("granularity") is Granularity.LAYER
    assert plus | {"profile": "paper"} == paper


def changed(found: ServerSettings, base: ServerSettings) -> set[str]:
    """The settings in which two differ, as `table.key`."""
    a, b = found.model_dump(exclude={"profile"}), base.model_dump(exclude={"profile"})
    return {
        f"{table}.{key}"
        for table in a
        if isinstance(a[table], dict)
        for key in a[table]
        if a[table][key] != b[table][key]
    }


@pytest.mark.parametrize("key", PROFILES["paper"]["plan"])
def test_each_difference_between_paper_and_default_is_one_option_that_works_alone(key):
    assert key in PlanOptions.model_fields
    paper, default = settings("paper"), settings("default")
    differs = {f"plan.{key}"} & changed(paper, default)
    alone = settings("default", **{key: getattr(paper.plan, key)})
    without = settings("paper", **{key: getattr(default.plan, key)})
    assert changed(alone, default) == changed(without, paper) == differs
    for options in (alone, without):
        found = plans({"a": 9.0, "b": 9.0}, options, layer_statistics())
        assert {len(own.submodel.components) for own in found.values()} == {6}


def test_paper_and_default_differ_in_more_than_their_names():
    """So that the test above has something to look at."""
    found = changed(settings("paper"), settings("default"))
    expected = "selection statistics statistics_every rms_rows protect coverage joint correction"
    assert found == {f"plan.{key}" for key in expected.split()}
