"""The byte model on a profile whose every number is small and round."""

from dataclasses import replace
from itertools import pairwise

import pytest
from toy_model import component

from fedpruner_common.budget import (
    MemoryProfile,
    activation_bytes,
    bridge_bytes,
    bridge_bytes_per_run,
    demand,
    largest_that_fits,
    predicted_peak_bytes,
    streamed_peak_bytes,
    sweep_peak_bytes,
)
from fedpruner_common.components import ComponentId, Kind, all_components
from fedpruner_common.task import NO_BRIDGE, BridgeKind, BridgeSettings

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


# Bridges


@pytest.mark.parametrize(
    ("kind", "rank", "expected"),
    [
        (BridgeKind.OFF, 3, 0),
        (BridgeKind.SCALE, 3, 4),
        (BridgeKind.LOWRANK, 3, 4 * (2 * 10 * 3 + 10)),
        (BridgeKind.LOWRANK, 99, 4 * (2 * 10 * 10 + 10)),  # no more than the width
        (BridgeKind.FULL, 3, 4 * (100 + 10)),
    ],
)
def test_a_bridge_is_its_matrices_and_its_constant_in_float32(kind, rank, expected):
    assert bridge_bytes(kind, hidden_size=10, rank=rank) == expected


def test_a_dropped_run_costs_its_bridge_what_that_saves_and_one_correction():
    profile = replace(PROFILE, hidden_size=10)
    # a layer's input is 5 bytes: a map saves two of them, a correction is one
    assert bridge_bytes_per_run(profile, NO_BRIDGE) == 0
    assert bridge_bytes_per_run(profile, BridgeSettings(corrected=True)) == 5
    assert bridge_bytes_per_run(profile, BridgeSettings(BridgeKind.FULL)) == 440 + 10
    both = BridgeSettings(BridgeKind.SCALE, corrected=True)
    assert bridge_bytes_per_run(profile, both) == 4 + 10 + 5


# The sweep

SWEPT = replace(
    PROFILE,
    # layer 1 is the larger one: 100 + 700
    weight_bytes={**each(100, 200), ComponentId(1, Kind.FFN): 700},
    hidden_size=3,
    num_batches=4,
)


def test_a_sweep_holds_one_layer_the_whole_adapter_and_all_hidden_states():
    # weights 1000 + 800; adapter 2 * 4 bytes * 60; 5 copies of 4 batches of 5; temporaries 6
    expected = FLOOR + TEXT + 1800 + 480 + 100 + 6
    assert sweep_peak_bytes(SWEPT, BridgeSettings(corrected=True), floor_bytes=FLOOR) == expected


def test_a_sweep_that_fits_bridges_holds_their_moments_too():
    corrected = sweep_peak_bytes(SWEPT, BridgeSettings(corrected=True), floor_bytes=FLOOR)
    for kind in (BridgeKind.SCALE, BridgeKind.LOWRANK, BridgeKind.FULL):
        fitted = BridgeSettings(kind, rank=1, local=True)
        # four matrices of float64, one wider than the hidden size for the constant
        assert sweep_peak_bytes(SWEPT, fitted, floor_bytes=FLOOR) == corrected + 4 * 8 * 16
    public = BridgeSettings(BridgeKind.FULL, corrected=True)
    assert sweep_peak_bytes(SWEPT, public, floor_bytes=FLOOR) == corrected


def test_a_sweep_of_converted_weights_holds_what_is_stored_too():
    plain = sweep_peak_bytes(SWEPT, NO_BRIDGE, floor_bytes=FLOOR)
    halved = sweep_peak_bytes(replace(SWEPT, disk_ratio=0.5), NO_BRIDGE, floor_bytes=FLOOR)
    assert halved == plain + 900


# Streaming

# 6 LoRA parameters in all: 72 bytes with Adam, 96 in its step
STREAMED = replace(PROFILE, lora_parameters=each(1, 2))


def streamed_peak(profile: MemoryProfile, *streamed: int) -> int:
    return streamed_peak_bytes(profile, streamed, floor_bytes=FLOOR)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"disk_ratio": 2.0}, {"loss_bytes": 0}, {"loss_bytes": 9}])
def test_without_streamed_layers_the_peak_is_that_of_the_full_model(checkpointing, changes):
    for profile in (PROFILE, replace(PROFILE, lora_parameters=each(1000, 2000))):
        profile = replace(profile, gradient_checkpointing=checkpointing, **changes)
        assert streamed_peak(profile) == peak(profile, FULL)


def test_with_all_layers_streamed_one_is_held_and_each_keeps_its_input():
    # weights 1000 + 300; Adam 72 for the whole adapter;
    # 7 + two inputs of 5 + one layer computed again 80 + its temporaries 6, more than the loss's 40
    expected = FLOOR + TEXT + 1300 + 72 + 103
    assert streamed_peak(STREAMED, 0, 1) == expected
    assert streamed_peak(replace(STREAMED, gradient_checkpointing=True), 0, 1) == expected


def test_a_streamed_layer_passes_beside_those_that_are_held():
    # weights 1000 + 300 held + 300 passing; 7 + the held one's 80 + an input 5 + again 80 + 6
    assert streamed_peak(STREAMED, 1) == FLOOR + TEXT + 1600 + 72 + 178


def test_with_checkpointing_a_held_layer_is_computed_again_too():
    profile = replace(STREAMED, gradient_checkpointing=True)
    # two inputs of 5 whichever is streamed, and the larger of the two layers computed again
    assert streamed_peak(profile, 1) == FLOOR + TEXT + 1600 + 72 + 7 + 10 + 86
    saves_more = {**each(30, 50), ComponentId(0, Kind.FFN): 170}
    profile = replace(profile, saved_bytes=saves_more)
    for layer in (0, 1):
        assert streamed_peak(profile, layer) == FLOOR + TEXT + 1600 + 72 + 7 + 10 + 206


def test_the_largest_streamed_layer_counts_with_what_is_stored_of_it():
    profile = replace(STREAMED, weight_bytes=SWEPT.weight_bytes, disk_ratio=0.1)
    # 800 passing, 80 of it as stored; training's 72 + 103 are more than the 100 of the shared 1000
    assert streamed_peak(profile, 0, 1) == FLOOR + TEXT + 1000 + 880 + 72 + 103
    # with a large enough ratio reading the shared tensors is the peak: 1000 * 2 > 72 + 103
    profile = replace(STREAMED, weight_bytes=SWEPT.weight_bytes, disk_ratio=2.0)
    assert streamed_peak(profile, 0, 1) == FLOOR + TEXT + 1000 + 2400 + 2000


def test_with_streamed_layers_too_the_optimizer_steps_on_the_whole_adapter():
    profile = replace(STREAMED, lora_parameters=each(10, 20))
    # 16 * 60 = 960, more than 12 * 60 + 103
    assert streamed_peak(profile, 0, 1) == FLOOR + TEXT + 1300 + 960


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("disk_ratio", [0.0, 0.5, 2.0])
def test_beyond_the_first_every_streamed_layer_of_a_model_of_equal_ones_makes_the_peak_smaller(
    checkpointing, disk_ratio
):
    components = all_components(6)
    profile = replace(
        PROFILE,
        weight_bytes=dict.fromkeys(components, 1000),
        lora_parameters=dict.fromkeys(components, 10),
        saved_bytes=dict.fromkeys(components, 50),
        temporary_bytes=dict.fromkeys(components, 5),
        disk_ratio=disk_ratio,
        gradient_checkpointing=checkpointing,
    )
    peaks = [streamed_peak(profile, *range(count)) for count in range(1, 7)]
    assert all(after < before for before, after in pairwise(peaks))
    assert peaks[-1] < streamed_peak(profile)
