"""Attention weighs 1 MiB, ffn 2 MiB, floor 8 MiB, text 12 MiB: k layers cost 20 + 3 k MiB."""

from collections import Counter
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
from toy_model import MIB, component, toy_memory, toy_spec, toy_statistics

from fedpruner_common.budget import predicted_peak_bytes
from fedpruner_common.components import all_components
from fedpruner_common.errors import BudgetTooSmall
from fedpruner_common.statistics import Family, Granularity
from fedpruner_common.submodel import Submodel
from fedpruner_server.core.coverage import Coverage
from fedpruner_server.core.grouping import Grouping
from fedpruner_server.core.planning import (
    ClientPlan,
    Offer,
    PlanSettings,
    Policy,
    fit,
    left_uncovered,
    most_runs,
    peak_of_sizes,
    plan_client,
    plan_round,
    submodel_peak_bytes,
)
from fedpruner_server.core.selection import replay

FLOOR = 8 * MIB
SPEC = toy_spec(4)
IMPORTANCE = (0.1, 0.4, 0.3, 0.2)
SETTINGS = PlanSettings(Granularity.LAYER, sample=False, protect=(), margin=0.0, seed=0)
HALVES = replace(SETTINGS, granularity=Granularity.COMPONENT)


def plan(budget_mib, settings=SETTINGS, spec=SPEC, statistics=None, client_id="a", round_number=1):
    return plan_client(
        spec,
        statistics or toy_statistics(IMPORTANCE, granularity=settings.granularity),
        settings,
        client_id=client_id,
        round_number=round_number,
        budget_bytes=int(budget_mib * MIB),
        floor_bytes=FLOOR,
    )


def sizes(budget_mib, settings=SETTINGS):
    found = fit(SPEC, settings, budget_bytes=int(budget_mib * MIB), floor_bytes=FLOOR)
    return {family.value: size for family, size in found.items()}


@pytest.mark.parametrize(
    ("budget_mib", "num_layers"), [(23, 1), (25.9, 1), (26, 2), (29, 3), (32, 4), (1000, 4)]
)
def test_the_number_of_layers_follows_from_the_budget(budget_mib, num_layers):
    submodel = plan(budget_mib).submodel
    assert len(submodel.layers()) == num_layers
    assert len(submodel.components) == 2 * num_layers


def test_the_margin_stays_free():
    # half of 58 is 29, which is 20 + 3 * 3
    assert sizes(58, replace(SETTINGS, margin=0.5)) == {"layer": 3}
    assert sizes(57.9, replace(SETTINGS, margin=0.5)) == {"layer": 2}


def test_the_predicted_peak_is_that_of_the_submodel():
    assert plan(27).predicted_peak_bytes == 26 * MIB


def test_protected_layers_are_kept_at_every_budget():
    settings = replace(SETTINGS, protect=(0, -1))
    for budget_mib in range(26, 40):
        assert {0, 3} <= set(plan(budget_mib, settings).submodel.layers())


def test_protected_layers_count_towards_what_fits():
    settings = replace(SETTINGS, protect=(0, -1))
    assert plan(26, settings).submodel.layers() == (0, 3)
    # one group of the layers 1 and 2, of which 1 is worth more
    assert plan(29, settings).submodel.layers() == (0, 1, 3)


def test_a_layer_protected_twice_counts_once():
    assert replace(SETTINGS, protect=(0, -4, -1, 3)).protected(4) == (0, 3)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_protected_layer_that_the_model_does_not_have_is_refused(layer):
    with pytest.raises(ValueError, match="the model has 4 layers"):
        replace(SETTINGS, protect=(layer,)).protected(4)


def test_a_budget_too_small_is_refused_with_what_is_missing():
    # two protected layers cost 26 MiB
    with pytest.raises(
        BudgetTooSmall, match=r"6 MiB short of the smallest submodel \(2 of 4 layers"
    ):
        plan(20, replace(SETTINGS, protect=(0, -1)))
    # usable is half of 40: 20, the smallest is one layer, 23
    with pytest.raises(BudgetTooSmall, match=r"\(50% of it kept free\) is 3 MiB short"):
        plan(40, replace(SETTINGS, margin=0.5))


def test_with_halves_what_is_left_goes_to_one_more_half():
    assert sizes(26, HALVES) == {"attention": 2, "ffn": 2}
    # 1 MiB left: one attention
    assert sizes(27, HALVES) == {"attention": 3, "ffn": 2}
    # 2 MiB left: an attention; then an ffn (2) does not fit any more, another attention does
    assert sizes(28, HALVES) == {"attention": 4, "ffn": 2}
    assert sizes(29, HALVES) == {"attention": 3, "ffn": 3}
    assert sizes(1000, HALVES) == {"attention": 4, "ffn": 4}


def test_with_halves_a_submodel_has_as_many_of_each_as_was_planned():
    submodel = plan(27, HALVES).submodel
    kinds = [c.kind.value for c in submodel.components]
    assert (kinds.count("attention"), kinds.count("ffn")) == (3, 2)


def test_without_sampling_the_most_important_of_each_group_is_kept():
    similarity = np.array(
        [[1, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0.9], [0, 0, 0.9, 1]], dtype=float
    )
    statistics = toy_statistics(IMPORTANCE, similarity=similarity)
    result = plan(26, statistics=statistics)
    assert result.submodel.layers() == (1, 2)  # 0.4 of {0: .1, 1: .4} and 0.3 of {2: .3, 3: .2}
    assert [c.members for c in result.choices[Family.LAYER]] == [(0, 1), (2, 3)]


def test_the_same_seed_client_and_round_give_the_same_plan():
    settings = replace(SETTINGS, sample=True)
    assert plan(26, settings) == plan(26, settings)


def test_draws_differ_between_clients_rounds_and_seeds():
    settings = replace(SETTINGS, sample=True)
    uniforms = {
        choice.uniform
        for result in (
            plan(26, settings),
            plan(26, settings, client_id="b"),
            plan(26, settings, round_number=2),
            plan(26, replace(settings, seed=1)),
        )
        for choice in result.choices[Family.LAYER]
    }
    assert len(uniforms) == 8  # 4 plans of 2 groups, no number twice


def test_a_plan_tells_the_probabilities_and_the_numbers_it_was_drawn_with():
    settings = replace(SETTINGS, sample=True, protect=(0,))
    result = plan(29, settings)
    choices = result.choices[Family.LAYER]
    assert len(choices) == 3
    for choice in choices:
        assert sum(choice.probabilities) == pytest.approx(1.0)
        assert choice.chosen in choice.members
        if choice.members == (0,):
            assert choice.uniform is None  # protected: not drawn
        else:
            borders = np.cumsum(choice.probabilities)
            assert choice.members[int((borders <= choice.uniform).sum())] == choice.chosen
    members = sorted(item for choice in choices for item in choice.members)
    assert members == [0, 1, 2, 3]
    assert result.submodel.layers() == tuple(choice.chosen for choice in choices)


def test_a_budget_for_everything_keeps_everything_whatever_is_drawn():
    for settings in (SETTINGS, HALVES, replace(SETTINGS, sample=True, protect=(0, -1))):
        assert plan(1000, settings).submodel.is_full


def random_memory(rng, num_layers, *, checkpointing):
    components = all_components(num_layers)

    def each(most):
        return {c: rng.randrange(1, most) for c in components}

    return toy_memory(
        num_layers,
        weight_bytes=each(3 * MIB),
        shared_weight_bytes=MIB,
        disk_ratio=rng.choice([0.0, 0.5, 1.0, 2.0]),
        lora_parameters=each(MIB // 4),
        saved_bytes=each(2 * MIB),
        shared_saved_bytes=MIB // 2,
        layer_input_bytes=MIB // 4,
        temporary_bytes=each(2 * MIB),
        loss_bytes=rng.randrange(3 * MIB),
        gradient_checkpointing=checkpointing,
    )


@pytest.mark.parametrize("settings", [SETTINGS, HALVES, replace(HALVES, protect=(0, -1))])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_plan_is_predicted_to_need_more_than_the_budget_less_the_margin(settings, checkpointing):
    """Whichever items are chosen; every part of every layer has a size of its own here."""
    rng = Random(0)
    settings = replace(settings, margin=0.05)
    planned = 0
    for _ in range(8):
        memory = random_memory(rng, 4, checkpointing=checkpointing)
        spec = toy_spec(4, memory)
        least = predicted_peak_bytes(memory, (), floor_bytes=FLOOR) / MIB
        most = predicted_peak_bytes(memory, all_components(4), floor_bytes=FLOOR) / MIB
        statistics = toy_statistics(
            tuple(rng.random() for _ in range(4)), granularity=settings.granularity
        )
        for share in (0.6, 0.8, 1.0):
            budget_mib = least + share * (most - least)
            try:
                result = plan(budget_mib, settings, spec, statistics)
            except BudgetTooSmall:
                continue
            planned += 1
            assert result.predicted_peak_bytes <= budget_mib * MIB * 0.95
    assert planned >= 5


def test_a_layer_that_is_light_but_needs_much_for_its_backward_is_not_underestimated():
    # Layer 0 weighs 6 MiB, the others 3; the ffn of layer 3 needs 9 MiB beside, so alone it costs
    # 20 + 3 + 9 = 32 and layer 0 alone 20 + 6 = 26. With 27 MiB nothing may choose layer 3.
    memory = toy_memory(4)
    weights = {c: 3 * MIB if c.layer == 0 else b for c, b in memory.weight_bytes.items()}
    temporary = {c: 9 * MIB if str(c) == "3.ffn" else 0 for c in all_components(4)}
    spec = toy_spec(4, replace(memory, weight_bytes=weights, temporary_bytes=temporary))
    statistics = toy_statistics((0.1, 0.1, 0.1, 0.9))
    try:
        result = plan(27, spec=spec, statistics=statistics)
    except BudgetTooSmall:
        return
    assert result.predicted_peak_bytes <= 27 * MIB


# Policies

DEEP = toy_spec(6)  # k layers cost 20 + 3 k MiB
DEEP_IMPORTANCE = (0.1, 0.5, -0.2, 0.3, 0.6, 0.2)
BUDGET_OF = {k: 20 + 3 * k for k in range(1, 7)}


def plan_deep(num_layers, settings, **options):
    statistics = toy_statistics(DEEP_IMPORTANCE, granularity=settings.granularity)
    return plan(BUDGET_OF[num_layers], settings, DEEP, statistics, **options)


@pytest.mark.parametrize(
    ("policy", "layers"),
    [
        (Policy.DEPTH, {1: (0,), 3: (0, 1, 2), 5: (0, 1, 2, 3, 4)}),
        (Policy.LAST, {1: (5,), 3: (0, 1, 5), 5: (0, 1, 2, 3, 5)}),
        (Policy.EVEN, {1: (0,), 3: (0, 3, 5), 4: (0, 2, 3, 5)}),
        (Policy.TOP, {1: (4,), 3: (1, 3, 4), 5: (0, 1, 3, 4, 5)}),
    ],
)
def test_a_policy_keeps_exactly_its_layers(policy, layers):
    settings = replace(SETTINGS, policy=policy, protect=(0, -1))  # protects nothing here
    for num_layers, expected in layers.items():
        result = plan_deep(num_layers, settings)
        assert result.submodel.layers() == expected
        assert [choice.chosen for choice in result.choices[Family.LAYER]] == list(expected)


def test_a_policy_goes_by_each_half_on_its_own():
    settings = replace(HALVES, policy=Policy.TOP)
    statistics = toy_statistics(
        (0.1, 0.2, 0.3, 0.4), granularity=Granularity.COMPONENT, ffn_importance=(9.0, 8.0, 1.0, 0.0)
    )
    # 27 MiB hold three attentions and two ffns
    kept = plan(27, settings, statistics=statistics).submodel.components
    assert [str(c) for c in kept] == ["0.ffn", "1.attention", "1.ffn", "2.attention", "3.attention"]


def test_the_random_policy_draws_any_layers_anew_for_every_client_and_round():
    settings = replace(SETTINGS, policy=Policy.RANDOM, protect=(0,))
    drawn = Counter(
        layer
        for client_id, round_number in product("abcdef", range(50))
        for layer in plan_deep(
            2, settings, client_id=client_id, round_number=round_number
        ).submodel.layers()
    )
    # 300 plans of two of six layers: 100 each; the standard deviation is sqrt(300 * 2/9) = 8.2
    assert sum(drawn.values()) == 600
    assert all(abs(drawn[layer] - 100) < 33 for layer in range(6))


def test_only_devices_that_hold_everything_take_part_in_the_exclusive_policy():
    settings = replace(SETTINGS, policy=Policy.EXCLUSIVE, protect=(0, -1))
    assert plan_deep(6, settings).submodel.is_full
    with pytest.raises(
        BudgetTooSmall, match=r"3 MiB short of all 6 layers, and the policy `exclusive` leaves out"
    ):
        plan_deep(5, settings)


def test_the_full_policy_gives_everything_whatever_the_budget():
    result = plan(1, replace(SETTINGS, policy=Policy.FULL), DEEP)
    assert result.submodel.is_full
    assert result.predicted_peak_bytes == 38 * MIB


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("policy", list(Policy))
def test_a_device_that_fits_everything_gets_it_under_every_policy(policy, granularity):
    for sample, coverage in product((False, True), Coverage):
        settings = replace(
            SETTINGS, policy=policy, granularity=granularity, sample=sample, coverage=coverage
        )
        assert plan_deep(6, settings).submodel.is_full


# Whole rounds

OFFERS = tuple(
    Offer(client_id, BUDGET_OF[k] * MIB, FLOOR)
    for client_id, k in zip("abcdefg", (3, 2, 3, 5, 3, 2, 6), strict=True)
)
EVERY_OPTION = [
    replace(SETTINGS, policy=policy, granularity=granularity, sample=sample, joint=joint, **more)
    for policy, granularity, (sample, joint) in product(
        Policy, Granularity, [(False, False), (True, False), (True, True)]
    )
    for more in (
        [{}]
        if policy is not Policy.FEDPRUNER
        else [
            {"protect": (0, -1), "grouping": grouping, "coverage": coverage}
            for grouping, coverage in [
                (Grouping.SPECTRAL, Coverage.HARD),
                (Grouping.CONTIGUOUS, Coverage.SOFT),
                (Grouping.NONE, Coverage.HARD),
            ]
        ]
    )
]


def plan_deep_round(settings, offers=OFFERS, *, round_number=1, ages=None):
    statistics = toy_statistics(DEEP_IMPORTANCE, granularity=settings.granularity)
    return plan_round(DEEP, statistics, settings, offers, round_number=round_number, ages=ages)


def told(results):
    """A plan, or what its refusal says."""
    return {
        client_id: result if isinstance(result, ClientPlan) else str(result)
        for client_id, result in results.items()
    }


SOME_AGES = {component("2.attention"): 12, component("2.ffn"): 3, component("5.ffn"): 10}


@pytest.mark.parametrize("settings", EVERY_OPTION)
def test_a_round_does_not_depend_on_the_order_of_its_offers(settings):
    first = told(plan_deep_round(settings, ages=SOME_AGES))
    mixed = Random(1).sample(OFFERS, len(OFFERS))
    assert told(plan_deep_round(settings, mixed, ages=SOME_AGES)) == first
    assert list(first) == list("abcdefg")


@pytest.mark.parametrize("settings", EVERY_OPTION)
def test_every_plan_of_a_round_fits_and_holds_nothing_twice(settings):
    results = plan_deep_round(settings, ages=SOME_AGES)
    for offer in OFFERS:
        result = results[offer.client_id]
        if isinstance(result, BudgetTooSmall):
            assert settings.policy is Policy.EXCLUSIVE
            continue
        assert len(result.submodel.components) > 0
        if settings.policy is not Policy.FULL:
            assert result.predicted_peak_bytes <= offer.budget_bytes
        for family, choices in result.choices.items():
            items = [item for choice in choices for item in choice.items]
            assert len(set(items)) == len(items)
            assert {c for item in items for c in family.components(item)} <= set(
                result.submodel.components
            )
            for choice in choices:
                assert choice.kept or replay(choice) == choice.chosen


@pytest.mark.parametrize(
    "settings",
    [
        s
        for s in EVERY_OPTION
        if s.policy is Policy.RANDOM or (s.sample and s.policy is Policy.FEDPRUNER)
    ],
)
def test_every_round_draws_its_own(settings):
    plans = [plan_deep_round(settings, round_number=number) for number in range(4)]
    assert len({str(told(p)) for p in plans}) == 4


def test_a_client_offers_once():
    with pytest.raises(ValueError, match="once per round"):
        plan_deep_round(SETTINGS, [OFFERS[0], OFFERS[0]])


def test_a_budget_too_small_for_one_leaves_the_others_their_plans():
    small = Offer("small", 22 * MIB, FLOOR)
    results = plan_deep_round(SETTINGS, [small, *OFFERS])
    assert isinstance(results["small"], BudgetTooSmall)
    assert "1 MiB short of the smallest submodel (1 of 6 layers)" in str(results["small"])
    del results["small"]
    assert results == plan_deep_round(SETTINGS)


def test_a_client_alone_gets_what_it_would_get_in_a_round_without_shared_draws():
    settings = replace(SETTINGS, sample=True)
    results = plan_deep_round(settings)
    assert results["a"] == plan_deep(3, settings, client_id="a")


def test_every_client_may_have_statistics_of_its_own():
    settings = replace(SETTINGS, sample=True, joint=True)
    early = toy_statistics((9.0, 8.0, 0.0, 0.0, 0.0, 0.0))
    late = toy_statistics((0.0, 0.0, 0.0, 0.0, 8.0, 9.0))
    offers = [Offer(client_id, BUDGET_OF[1] * MIB, FLOOR) for client_id in "ab"]
    results = plan_round(DEEP, {"a": early, "b": late}, settings, offers, round_number=1)
    assert results["a"].submodel.layers()[0] < 2
    assert results["b"].submodel.layers()[0] > 3


def joint_round(num_clients, *, round_number=1, joint=True):
    settings = replace(SETTINGS, sample=True, joint=joint, protect=(0,))
    offers = [Offer(f"c{i}", BUDGET_OF[3] * MIB, FLOOR) for i in range(num_clients)]
    return plan_deep_round(settings, offers, round_number=round_number)


def test_clients_with_the_same_memory_share_a_draw_that_gives_every_layer_its_share():
    results = joint_round(7)
    groups = {}
    for result in results.values():
        for choice in result.choices[Family.LAYER]:
            groups.setdefault(choice.members, []).append(choice)
    assert sorted(item for members in groups for item in members) == list(range(6))
    for members, choices in groups.items():
        assert len(choices) == 7
        for member, share in zip(members, choices[0].probabilities, strict=True):
            held = sum(choice.chosen == member for choice in choices)
            assert abs(held - 7 * share) < 1 + 1e-9
    points = sorted(c.uniform for c in groups[(0,)] if c.uniform is not None)
    assert points == []  # protected: not drawn
    for members, choices in groups.items():
        if members != (0,):
            offsets = sorted(choice.uniform * 7 for choice in choices)
            assert [int(offset) for offset in offsets] == list(range(7))


def test_the_points_of_a_shared_draw_are_dealt_anew_in_every_group_and_round():
    orders = {
        tuple(result.choices[Family.LAYER][position].uniform > 0.5 for result in results.values())
        for results in (joint_round(6, round_number=number) for number in range(5))
        for position in (1, 2)
    }
    assert len(orders) > 5


def test_a_shared_draw_says_how_each_layer_was_chosen():
    for result in joint_round(5).values():
        for choice in result.choices[Family.LAYER]:
            assert replay(choice) == choice.chosen


def test_grouping_reaches_the_plan():
    # even thirds of six, of which 1, 3 and 4 are worth most
    result = plan_deep(3, replace(SETTINGS, grouping=Grouping.EVEN))
    assert [c.members for c in result.choices[Family.LAYER]] == [(0, 1), (2, 3), (4, 5)]
    assert result.submodel.layers() == (1, 3, 4)


def test_without_groups_the_most_important_layers_are_kept():
    settings = replace(SETTINGS, grouping=Grouping.NONE)
    assert plan_deep(2, settings).submodel.layers() == (1, 4)
    # 5 is protected and 1, 4 are worth most
    assert plan_deep(3, replace(settings, protect=(-1,))).submodel.layers() == (1, 4, 5)


# Coverage


def ages_of(*ages):
    return {c: ages[c.layer] for c in all_components(len(ages))}


def test_soft_coverage_prefers_layers_that_have_waited():
    settings = replace(SETTINGS, grouping=Grouping.NONE, coverage=Coverage.SOFT)
    offers = [Offer("a", BUDGET_OF[1] * MIB, FLOOR)]

    def kept(ages, **changes):
        results = plan_deep_round(replace(settings, **changes), offers, ages=ages)
        return results["a"].submodel.layers()

    assert kept({}) == (4,)
    assert kept(ages_of(0, 4, 0, 0, 0, 0)) == (1,)  # 0.5 * 1.4 = 0.7 > 0.6
    assert kept(ages_of(0, 1, 0, 0, 0, 0)) == (4,)  # 0.5 * 1.1 = 0.55
    assert kept(ages_of(0, 1, 0, 0, 0, 0), coverage_rounds=2) == (1,)  # 0.5 * 1.5
    assert kept(ages_of(0, 4, 0, 0, 0, 0), coverage_kappa=0.1) == (4,)  # 0.5 * 1.04
    assert kept(ages_of(0, 4, 0, 0, 0, 0), coverage=Coverage.OFF) == (4,)
    # a layer is as old as its older half
    assert kept({component("1.ffn"): 4}) == (1,)


def test_hard_coverage_puts_a_layer_that_is_too_old_in_the_place_of_one_of_its_group():
    settings = replace(SETTINGS, grouping=Grouping.EVEN, coverage=Coverage.HARD, coverage_kappa=0.0)
    results = plan_deep_round(settings, ages=ages_of(0, 0, 10, 0, 0, 0))
    # `d` holds five layers, in groups of 0 1, 2, 3, 4, 5 (5 i // 6), so 2 anyway
    assert 2 in results["d"].submodel.layers()
    assert told(results) == told(plan_deep_round(settings))
    offers = [OFFERS[0], OFFERS[1]]  # a: three layers, b: two
    results = plan_deep_round(settings, offers, ages=ages_of(0, 0, 10, 0, 0, 0))
    assert results["a"].submodel.layers() == (1, 2, 4)  # 2 instead of 3
    swapped = results["a"].choices[Family.LAYER][1]
    assert (swapped.members, swapped.chosen, swapped.swapped_in) == ((2, 3), 2, (2,))
    assert results["b"].submodel.layers() == (1, 4)


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("grouping", [Grouping.SPECTRAL, Grouping.NONE])
def test_with_hard_coverage_and_enough_slots_nothing_waits_longer_than_the_limit(
    granularity, sample, grouping
):
    settings = replace(
        SETTINGS,
        granularity=granularity,
        sample=sample,
        grouping=grouping,
        coverage=Coverage.HARD,
        coverage_rounds=5,
        protect=(0,),
    )
    offers = OFFERS[:3]
    ages = dict.fromkeys(all_components(6), 0)
    for number in range(60):
        plans = plan_deep_round(settings, offers, round_number=number, ages=ages)
        assert left_uncovered(plans, ages, coverage_rounds=5) == ()
        held = {c for plan in plans.values() for c in plan.submodel.components}
        ages = {c: 0 if c in held else age + 1 for c, age in ages.items()}
        assert max(ages.values()) <= 5


def test_components_that_no_plan_could_cover_are_named():
    settings = replace(SETTINGS, coverage=Coverage.HARD, protect=(0, -1))
    ages = ages_of(0, 10, 11, 10, 9, 0)
    # two slots, both protected
    plans = plan_deep_round(settings, [OFFERS[1]], ages=ages)
    named = left_uncovered(plans, ages, coverage_rounds=10)
    assert [str(c) for c in named] == [
        "1.attention", "1.ffn", "2.attention", "2.ffn", "3.attention", "3.ffn"
    ]  # fmt: skip
    # one more slot takes the oldest
    plans = plan_deep_round(settings, [OFFERS[0]], ages=ages)
    named = left_uncovered(plans, ages, coverage_rounds=10)
    assert {c.layer for c in named} == {1, 3}


def test_coverage_is_the_methods_own_and_leaves_the_other_policies_alone():
    for policy in (Policy.DEPTH, Policy.TOP, Policy.RANDOM):
        settings = replace(SETTINGS, policy=policy, coverage=Coverage.HARD)
        assert told(plan_deep_round(settings, ages=ages_of(*[50] * 6))) == told(
            plan_deep_round(settings)
        )


# Halves


def values_kept(result, statistics):
    """What the kept halves are worth, below zero counting as zero."""
    return sum(
        max(0.0, statistics.families[family].importance[item])
        for family, choices in result.choices.items()
        for choice in choices
        for item in choice.items
    )


def greedy_value(spec, statistics, settings, *, budget_bytes):
    """The best half of each of as many groups as fit: what was done before the knapsack."""
    found = fit(spec, settings, budget_bytes=budget_bytes, floor_bytes=FLOOR)
    total = 0.0
    protected = settings.protected(spec.num_layers)
    rest = [i for i in range(spec.num_layers) if i not in protected]
    for family, size in found.items():
        of_family = statistics.families[family]
        worth = [max(0.0, value) for value in of_family.importance]
        total += sum(worth[i] for i in protected)
        if size > len(protected):
            labels = group_even(len(rest), size - len(protected))
            for label in set(labels):
                total += max(worth[i] for i, own in zip(rest, labels, strict=True) if own == label)
    return total


def group_even(num_items, num_groups):
    return [i * num_groups // num_items for i in range(num_items)]


@pytest.mark.parametrize("protect", [(), (0, -1)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bridge_bytes", [0, MIB // 3, 4 * MIB])
def test_halves_of_any_sizes_fit_and_are_worth_no_less_than_one_per_group(
    protect, checkpointing, bridge_bytes
):
    rng = Random(7)
    settings = replace(
        HALVES,
        protect=protect,
        margin=0.05,
        grouping=Grouping.EVEN,
        bridge_bytes_per_run=bridge_bytes,
    )
    better = planned = 0
    for _ in range(12):
        memory = random_memory(rng, 5, checkpointing=checkpointing)
        spec = toy_spec(5, memory)
        least = predicted_peak_bytes(memory, (), floor_bytes=FLOOR)
        most = predicted_peak_bytes(memory, all_components(5), floor_bytes=FLOOR)
        statistics = toy_statistics(
            tuple(rng.uniform(-0.2, 1) for _ in range(5)),
            granularity=Granularity.COMPONENT,
            ffn_importance=tuple(rng.uniform(-0.2, 1) for _ in range(5)),
        )
        for share in (0.5, 0.7, 0.9, 1.06):
            budget_bytes = int(least + share * (most - least))
            try:
                result = plan(budget_bytes / MIB, settings, spec, statistics)
            except BudgetTooSmall:
                continue
            planned += 1
            assert result.predicted_peak_bytes <= budget_bytes * 0.95
            assert result.predicted_peak_bytes == submodel_peak_bytes(
                spec, settings, result.submodel, floor_bytes=FLOOR
            )
            value = values_kept(result, statistics)
            greedy = greedy_value(spec, statistics, settings, budget_bytes=budget_bytes)
            assert value >= greedy - 1e-4  # what is worth nothing counts 1e-6 of the best
            better += value > greedy + 1e-3
            for choices in result.choices.values():
                assert all(choice.items for choice in choices)
    assert planned >= 5
    assert better >= 3


def test_the_knapsack_takes_the_halves_that_are_worth_most_for_their_bytes():
    # Attention 1 MiB, ffn 2 MiB: 28 MiB hold two of each and two more MiB. One more ffn is worth
    # 0.3, two more attentions 0.1 + 0.1.
    statistics = toy_statistics(
        (0.1, 0.9, 0.1, 0.8),
        granularity=Granularity.COMPONENT,
        ffn_importance=(0.9, 0.3, 0.8, 0.0),
    )
    settings = replace(HALVES, grouping=Grouping.EVEN)
    result = plan(28, settings, statistics=statistics)
    assert [str(c) for c in result.submodel.components] == [
        "0.ffn", "1.attention", "1.ffn", "2.ffn", "3.attention"
    ]  # fmt: skip
    assert result.predicted_peak_bytes == 28 * MIB
    ffn = result.choices[Family.FFN]
    assert [choice.members for choice in ffn] == [(0, 1), (2, 3)]
    assert [choice.kept for choice in ffn] == [(0, 1), (2,)]
    assert [choice.chosen for choice in ffn] == [0, 2]
    assert ffn[0].values == pytest.approx((0.9, 0.3), abs=1e-5)
    assert ffn[0].probabilities == pytest.approx((0.75, 0.25), abs=1e-5)
    assert ffn[0].noise == ()


def test_where_no_knapsack_finds_what_fits_the_best_of_each_group_are_kept():
    # 58 MiB less floor and text: 38. Conversion takes 3 W, training W + saved + 16.
    #                  0.attention  0.ffn  1.attention  1.ffn
    # W                     4         2         5         4
    # saved                 4         9         3         2
    # Training alone (22 left): all but 0.ffn, 8 + 8 + 6, but 3 * 13 = 39. Conversion alone: all but
    # 0.attention, 3 * 11 = 33, but 11 + 14 + 16 = 41. Safe for both: 12, 11, 15, 12 of 22, so none.
    halves = all_components(2)
    memory = toy_memory(
        2,
        weight_bytes={c: w * MIB for c, w in zip(halves, (4, 2, 5, 4), strict=True)},
        saved_bytes={c: s * MIB for c, s in zip(halves, (4, 9, 3, 2), strict=True)},
        loss_bytes=16 * MIB,
        disk_ratio=2.0,
    )
    statistics = toy_statistics((0.2, 0.9), granularity=Granularity.COMPONENT)
    result = plan(58, HALVES, toy_spec(2, memory), statistics)
    assert [str(c) for c in result.submodel.components] == ["1.attention", "1.ffn"]
    assert result.predicted_peak_bytes == (20 + 9 + 5 + 16) * MIB


def test_halves_are_drawn_by_noise_that_the_plan_tells():
    settings = replace(HALVES, sample=True, temperature=0.5, grouping=Grouping.EVEN)
    result = plan(26, settings)
    assert result == plan(26, settings)
    for family in (Family.ATTENTION, Family.FFN):
        for choice in result.choices[family]:
            # value = importance * e ** (temperature * noise)
            expected = [
                IMPORTANCE[i] * np.exp(0.5 * g)
                for i, g in zip(choice.members, choice.noise, strict=True)
            ]
            assert choice.values == pytest.approx(expected, rel=1e-4)
            assert choice.chosen == choice.members[int(np.argmax(choice.values))]


def test_halves_are_drawn_in_proportion_to_their_importance_where_one_per_group_fits():
    # 23 MiB hold one attention and one ffn of one group each
    settings = replace(HALVES, sample=True, grouping=Grouping.EVEN)
    drawn = Counter(
        plan(23, settings, round_number=number).choices[Family.ATTENTION][0].chosen
        for number in range(1500)
    )
    # the standard deviation of each share is at most sqrt(0.24 / 1500) = 0.013
    assert [drawn[i] / 1500 for i in range(4)] == pytest.approx(IMPORTANCE, abs=0.05)


# Bridges


def submodel_of(text, num_layers=4):
    return Submodel.of(num_layers, [component(part) for part in text.split()])


@pytest.mark.parametrize("protect", [(), (0,), (0, -1), (0, 1), (1, 2, -1)])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_no_choice_leaves_more_runs_than_were_reckoned_with(granularity, protect):
    settings = replace(SETTINGS, granularity=granularity, protect=protect)
    protected = settings.protected(4)
    most = Counter()
    for taken in product((False, True), repeat=8):
        kept = [c for c, is_kept in zip(all_components(4), taken, strict=True) if is_kept]
        found = {
            family: sum(set(family.components(i)) <= set(kept) for i in range(4))
            for family in granularity.families
        }
        whole = sum(len(f.components(0)) * size for f, size in found.items()) == len(kept)
        if whole and {(i, k) for i in protected for k in (0, 1)} <= {
            (c.layer, int(c.kind.value == "ffn")) for c in kept
        }:
            key = tuple(found.values())
            most[key] = max(most[key], len(Submodel.of(4, kept).dropped_runs()))
    assert len(most) >= 2
    for key, num_runs in most.items():
        sizes_ = dict(zip(granularity.families, key, strict=True))
        reckoned = most_runs(settings, 4, sizes_)
        assert num_runs <= reckoned
        if granularity is Granularity.LAYER:
            assert num_runs == reckoned  # not one too many


def test_bridges_are_counted_run_by_run_and_fit():
    # k layers cost 20 + 3 k, bridges 1 MiB each: one layer leaves two runs at most, 25 in all
    settings = replace(SETTINGS, bridge_bytes_per_run=MIB)
    with pytest.raises(BudgetTooSmall, match="1 MiB short"):
        plan(24, settings)
    # layer 1 is worth most: runs before and after it
    assert plan(25, settings).predicted_peak_bytes == 25 * MIB
    # all four leave no run
    assert plan(32, settings).predicted_peak_bytes == 32 * MIB
    # protected at both ends: 26 and one run
    protected = replace(settings, protect=(0, -1))
    assert plan(27, protected).predicted_peak_bytes == 27 * MIB
    with pytest.raises(BudgetTooSmall):
        plan(26, protected)


def test_the_bound_of_bridges_is_part_of_the_peak_of_sizes():
    settings = replace(SETTINGS, bridge_bytes_per_run=MIB)
    for size, expected in ((1, 25), (2, 28), (3, 30), (4, 32)):  # runs: 2, 2, 1, 0
        peak = peak_of_sizes(SPEC, settings, {Family.LAYER: size}, floor_bytes=FLOOR)
        assert peak == expected * MIB
