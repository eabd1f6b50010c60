"""Attention weighs 1 MiB, ffn 2 MiB, floor 8 MiB, text 12 MiB: k layers cost 20 + 3 k MiB."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from toy_model import MIB, toy_memory, toy_spec, toy_statistics

from fedpruner_common.budget import predicted_peak_bytes
from fedpruner_common.components import all_components
from fedpruner_common.errors import BudgetTooSmall
from fedpruner_server.core.planning import PlanSettings, fit, plan_client
from fedpruner_server.core.statistics import Family, Granularity

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
