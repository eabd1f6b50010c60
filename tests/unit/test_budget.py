"""The byte model on a profile whose every number is small and round."""

from dataclasses import replace

import pytest
from toy_model import component

from fedpruner_common.budget import (
    MemoryProfile,
    activation_bytes,
    demand,
    largest_that_fits,
    predicted_peak_bytes,
)
from fedpruner_common.components import Kind, all_components

TEXT = 12 * 1024 * 1024  # tokenizer, tokens, code
FLOOR = 500


def each(attention: int, ffn: int) -> dict:
    return {c: attention if c.kind is Kind.ATTENTION else ffn for c in all_components(2)}


PROFILE = MemoryProfile(
    weight_bytes=each(100, 200),
    shared_weight_bytes=1000,
    disk_ratio=0.0,
    lora_parameters=each(10, 20),
    saved_bytes=each(30, 50),
    shared_saved_bytes=7,
    layer_input_bytes=5,
    temporary_bytes=each(4, 6),
    loss_bytes=40,
    gradient_checkpointing=False,
)
LAYER_0 = [component("0.attention"), component("0.ffn")]
FULL = all_components(2)


def peak(profile: MemoryProfile, components) -> int:
    return predicted_peak_bytes(profile, components, floor_bytes=FLOOR)


def test_without_checkpointing_every_component_saves_its_activations():
    # shared 7 + saved 30 + 50 + the loss's 40, which is more than the ffn's temporaries 6
    assert activation_bytes(PROFILE, demand(PROFILE, LAYER_0)) == 127
    assert activation_bytes(PROFILE, demand(PROFILE, FULL)) == 207  # 7 + 2 * 80 + 40


def test_temporaries_count_where_they_exceed_the_loss():
    profile = replace(PROFILE, loss_bytes=1)
    assert activation_bytes(profile, demand(profile, LAYER_0)) == 93  # 7 + 80 + 6
    attention = demand(profile, [component("1.attention")])
    assert activation_bytes(profile, attention) == 41  # 7 + 30 + 4


def test_with_checkpointing_one_input_a_layer_and_one_layer_recomputed():
    profile = replace(PROFILE, gradient_checkpointing=True)
    # 7 + 2 inputs of 5 + (one layer 80 + temporaries 6, more than the loss's 40)
    assert activation_bytes(profile, demand(profile, FULL)) == 103
    # halves of two layers: 7 + 2 * 5 + (the larger half 50 + temporaries 6)
    halves = demand(profile, [component("0.ffn"), component("1.attention")])
    assert activation_bytes(profile, halves) == 73


def test_with_checkpointing_a_large_loss_is_the_peak():
    profile = replace(PROFILE, gradient_checkpointing=True, loss_bytes=400)
    assert activation_bytes(profile, demand(profile, FULL)) == 417  # 7 + 2 * 5 + 400


def test_the_peak_is_floor_text_weights_adapter_and_activations():
    # weights 1000 + 100 + 200; adapter and Adam 12 * 30; activations 127
    assert peak(PROFILE, LAYER_0) == FLOOR + TEXT + 1300 + 360 + 127


def test_the_peak_while_the_dtype_is_converted_holds_the_stored_tensors_too():
    profile = replace(PROFILE, disk_ratio=0.5)
    # stored 0.5 * 1300 = 650, more than the 487 of training
    assert peak(profile, LAYER_0) == FLOOR + TEXT + 1300 + 650


def test_the_optimizer_step_is_the_peak_where_the_adapter_is_larger_than_the_activations():
    profile = replace(PROFILE, lora_parameters=each(100, 200))
    # step: 16 * 300 = 4800, without activations; training: 12 * 300 + 127 = 3727
    assert peak(profile, LAYER_0) == FLOOR + TEXT + 1300 + 4800


def test_no_components_cost_the_shared_tensors_and_the_loss():
    assert peak(PROFILE, []) == FLOOR + TEXT + 1000 + 47  # 7 + 40


def test_the_order_of_the_components_does_not_matter():
    assert peak(PROFILE, FULL) == peak(PROFILE, reversed(FULL))


@pytest.mark.parametrize(("budget", "size"), [(9, None), (10, 1), (29, 2), (30, 3), (1000, 4)])
def test_the_largest_size_within_the_budget_is_taken(budget, size):
    assert largest_that_fits(lambda k: 10 * k, range(1, 5), budget) == size
