"""What a plan does about what does not fit: correct it, bridge it, stream it, or just drop it.

Attention weighs 1 MiB, ffn 2 MiB, text 12 MiB, floor 8 MiB: k layers cost 20 + 3 k MiB to train,
and a sweep, which holds one, 23 MiB and its hidden states.
"""

from dataclasses import replace

import pytest
from toy_model import MIB, toy_memory, toy_spec, toy_statistics

from fedpruner_common.budget import (
    streamed_peak_bytes,
    streaming_seconds,
    sweep_peak_bytes,
)
from fedpruner_common.components import all_components
from fedpruner_common.errors import BudgetTooSmall
from fedpruner_common.statistics import Granularity
from fedpruner_common.task import NO_BRIDGE, BridgeKind, BridgeSettings
from fedpruner_server.core.planning import PlanSettings, Policy, plan_client

FLOOR = 8 * MIB
IMPORTANCE = (0.1, 0.4, 0.3, 0.2)
SETTINGS = PlanSettings(Granularity.LAYER, sample=False, protect=(), margin=0.0, seed=0)
# Of 7 MiB, through 5 copies of 7 micro-batches of 0.2 MiB: a sweep costs 30 MiB.
LONG = toy_memory(4, layer_input_bytes=MIB // 5, num_batches=7, hidden_size=1)
SWEEP = 30 * MIB
CORRECTED = BridgeSettings(corrected=True)
LOCAL = BridgeSettings(BridgeKind.FULL, local=True)
BOTH = BridgeSettings(BridgeKind.FULL, local=True, corrected=True)
PUBLIC = BridgeSettings(BridgeKind.FULL)
PUBLIC_CORRECTED = BridgeSettings(BridgeKind.FULL, corrected=True)
STREAMING = replace(SETTINGS, streaming=True)
HALVES = replace(STREAMING, granularity=Granularity.COMPONENT)


def plan(budget_mib, settings=SETTINGS, memory=LONG, importance=IMPORTANCE, read_bytes_per_s=0):
    return plan_client(
        toy_spec(4, memory),
        toy_statistics(importance, granularity=settings.granularity),
        settings,
        client_id="a",
        round_number=1,
        budget_bytes=int(budget_mib * MIB),
        floor_bytes=FLOOR,
        read_bytes_per_s=read_bytes_per_s,
    )


def bridged(bridge, **changes):
    return replace(SETTINGS, bridge=bridge, **changes)


# Bridges and corrections


def test_the_sweep_of_this_file_costs_what_it_says():
    found = sweep_peak_bytes(LONG, CORRECTED, floor_bytes=FLOOR)
    assert SWEEP - 35 <= found <= SWEEP  # 35 copies, each a fraction of a byte short of 0.2 MiB


@pytest.mark.parametrize("bridge", [CORRECTED, PUBLIC_CORRECTED])
def test_a_device_that_can_sweep_is_corrected_and_the_sweep_may_be_its_peak(bridge):
    # three layers train in 29 MiB: the sweep's 30 are more
    found = plan(31, bridged(bridge))
    assert len(found.submodel.layers()) == 3
    assert found.bridge == bridge
    assert found.predicted_peak_bytes == sweep_peak_bytes(LONG, bridge, floor_bytes=FLOOR)


def test_training_is_the_peak_where_it_needs_more_than_the_sweep():
    found = plan(31, bridged(CORRECTED), memory=toy_memory(4, layer_input_bytes=1))
    assert found.bridge == CORRECTED
    assert found.predicted_peak_bytes == 29 * MIB  # the sweep: 23 and five bytes


@pytest.mark.parametrize(
    ("bridge", "left"),
    [
        (CORRECTED, NO_BRIDGE),
        # the coordinator's bridges come anyway, uncorrected
        (PUBLIC_CORRECTED, PUBLIC),
        # without the sweep there is nothing to fit bridges on
        (LOCAL, NO_BRIDGE),
        (BOTH, NO_BRIDGE),
    ],
)
def test_a_device_that_holds_the_submodel_but_not_the_sweep_trains_without_one(bridge, left):
    found = plan(29.5, bridged(bridge))
    assert len(found.submodel.layers()) == 3
    assert found.bridge == left
    assert not found.bridge.sweeps
    assert found.predicted_peak_bytes == 29 * MIB


@pytest.mark.parametrize("bridge", [CORRECTED, LOCAL, BOTH, PUBLIC_CORRECTED])
def test_the_sweep_is_judged_by_what_the_margin_leaves(bridge):
    # half of 59 is 29.5, half of 61 is 30.5
    assert not plan(59, bridged(bridge, margin=0.5)).bridge.sweeps
    assert plan(61, bridged(bridge, margin=0.5)).bridge == bridge


def test_bridges_of_the_coordinator_need_no_sweep():
    assert plan(23, bridged(PUBLIC)).bridge == PUBLIC


@pytest.mark.parametrize("bridge", [CORRECTED, LOCAL, PUBLIC, BOTH])
def test_the_full_model_has_nothing_to_bridge(bridge):
    found = plan(100, bridged(bridge))
    assert found.submodel.is_full
    assert found.bridge == NO_BRIDGE
    assert found.predicted_peak_bytes == 32 * MIB


@pytest.mark.parametrize("bridge", [NO_BRIDGE, CORRECTED, LOCAL, PUBLIC, BOTH])
@pytest.mark.parametrize("granularity", Granularity)
def test_whatever_the_budget_the_predicted_peak_is_within_it(bridge, granularity):
    settings = bridged(bridge, granularity=granularity, bridge_bytes_per_run=MIB // 3)
    for budget in (25, 27.5, 29.5, 30.2, 33):
        assert plan(budget, settings).predicted_peak_bytes <= budget * MIB


def test_a_sweep_never_changes_which_layers_are_kept():
    for budget in (23, 26, 29, 31):
        assert plan(budget, bridged(CORRECTED)).submodel == plan(budget).submodel


# Streaming

# A layer in memory costs 3 MiB of weights and 6 of activations, a streamed one an input of 1 MiB.
# Text and floor 20; beside what is held, one layer passes (3) and is computed again (6):
#   all held 20 + 4 * 9 = 56; one streamed 20 + 3 * 9 + 1 + 9 = 57; two 20 + 18 + 2 + 9 = 49;
#   three 20 + 9 + 3 + 9 = 41; all 20 + 4 + 9 = 33. Pruned: 29, 38, 47, 56 for 1 to 4 layers.
DEEP = toy_memory(
    4,
    saved_bytes=dict.fromkeys(all_components(4), 3 * MIB),
    layer_input_bytes=MIB,
)


def streams(budget_mib, settings=STREAMING, **arguments):
    return plan(budget_mib, settings, memory=DEEP, **arguments)


@pytest.mark.parametrize(
    ("budget_mib", "num_held", "peak_mib"),
    [(33, 0, 33), (40.9, 0, 33), (41, 1, 41), (49, 2, 49), (55.9, 2, 49), (56, 4, 56), (90, 4, 56)],
)
def test_as_many_layers_are_held_as_fit_and_the_rest_are_streamed(budget_mib, num_held, peak_mib):
    found = streams(budget_mib)
    assert found.submodel.is_full
    assert len(found.streamed) == 4 - num_held
    assert found.predicted_peak_bytes == peak_mib * MIB
    assert found.bridge == NO_BRIDGE


def test_the_layers_that_were_chosen_are_held_first_and_then_those_worth_most():
    # at 49 MiB three layers would be kept by importance, of which two fit beside the streamed ones
    settings = replace(STREAMING, policy=Policy.TOP)
    assert streams(49, settings).streamed == (0, 3)
    # at 41 two would be kept, of which one fits
    assert streams(41, settings).streamed == (0, 2, 3)
    # what was chosen comes before what is worth more: the policy keeps the first two of 41 MiB
    first = replace(STREAMING, policy=Policy.DEPTH)
    assert streams(41, first).streamed == (0, 2, 3)
    assert streams(41, first, importance=(0.2, 0.1, 0.9, 0.9)).streamed == (1, 2, 3)


def test_where_not_even_one_layer_at_a_time_fits_the_others_are_dropped():
    # 29 holds one pruned layer; streaming needs 33
    found = streams(32.9)
    assert found.streamed == ()
    assert len(found.submodel.layers()) == 1
    assert found.predicted_peak_bytes == 29 * MIB
    assert found == plan(32.9, memory=DEEP)


def test_where_streaming_does_not_fit_the_bridges_of_pruning_come_back():
    found = streams(32.9, replace(STREAMING, bridge=PUBLIC))
    assert found.bridge == PUBLIC
    assert streams(33, replace(STREAMING, bridge=PUBLIC)).bridge == NO_BRIDGE


def test_without_streaming_nothing_is_streamed():
    assert plan(41, memory=DEEP).streamed == ()
    assert not plan(41, memory=DEEP).submodel.is_full


def test_halves_of_a_layer_are_held_or_streamed_together():
    for budget in (33, 41, 50, 56, 57):
        found = streams(budget, HALVES)
        assert found.submodel.is_full
        peak = streamed_peak_bytes(DEEP, found.streamed, floor_bytes=FLOOR)
        assert found.predicted_peak_bytes == peak <= budget * MIB


def test_a_streaming_plan_leaves_the_margin_free():
    assert streams(98, replace(STREAMING, margin=0.5)).predicted_peak_bytes == 49 * MIB
    assert streams(97, replace(STREAMING, margin=0.5)).predicted_peak_bytes == 41 * MIB


def test_a_device_too_small_for_any_submodel_is_refused_with_streaming_too():
    with pytest.raises(BudgetTooSmall, match="1 MiB short"):
        streams(28)


def test_a_device_too_small_for_the_protected_layers_streams_if_that_fits():
    # both ends protected: the smallest submodel takes 38, streaming all layers 33
    protected = replace(STREAMING, protect=(0, -1))
    found = streams(35, protected)
    assert found.submodel.is_full
    assert found.streamed == (0, 1, 2, 3)
    assert found.predicted_peak_bytes == 33 * MIB
    for settings in (replace(protected, streaming=False), protected):
        with pytest.raises(BudgetTooSmall, match="short of the smallest submodel"):
            streams(35 if not settings.streaming else 32, settings)


# With little time for streaming: one layer takes a second, 3 MiB read twice at 6 MiB/s.


def in_time(budget_mib, seconds, settings=STREAMING, **arguments):
    limited = replace(settings, stream_seconds=seconds)
    return streams(budget_mib, limited, **{"read_bytes_per_s": 6 * MIB, **arguments})


@pytest.mark.parametrize(
    ("seconds", "kept", "streamed", "peak_mib"),
    [
        (1, (1, 2), (), 38),  # 48 for a third layer beside two held ones
        (1.99, (1, 2), (), 38),
        (2, (1, 2, 3), (2, 3), 40),  # 20 + 9 + 2 inputs + 9 for the one that passes
        (3, (0, 1, 2, 3), (0, 2, 3), 41),
        (0, (0, 1, 2, 3), (0, 2, 3), 41),  # no limit
    ],
)
def test_as_many_layers_are_streamed_as_the_disk_brings_in_time(seconds, kept, streamed, peak_mib):
    found = in_time(41, seconds, replace(STREAMING, policy=Policy.TOP))
    assert found.submodel.layers() == kept
    assert found.streamed == streamed
    assert found.predicted_peak_bytes == peak_mib * MIB


def test_every_micro_batch_of_a_step_reads_again():
    twice = replace(STREAMING, batches_per_step=2)
    assert len(in_time(41, 5.99, twice).streamed) == 2
    assert len(in_time(41, 6, twice).streamed) == 3


def test_a_disk_that_nobody_measured_is_taken_for_a_slow_one():
    # 2 * 3 MiB at 100 MB/s are 63 ms
    assert len(in_time(41, 0.12, read_bytes_per_s=0).streamed) == 0
    assert len(in_time(41, 0.13, read_bytes_per_s=0).streamed) == 2


def test_what_is_stored_larger_than_it_is_held_takes_longer_to_read():
    larger = replace(DEEP, disk_ratio=2.0)
    limited = replace(STREAMING, stream_seconds=2.0)
    assert streaming_seconds(DEEP, (0, 1), read_bytes_per_s=6 * MIB) == 2.0
    assert streaming_seconds(larger, (0, 1), read_bytes_per_s=6 * MIB) == 4.0
    found = plan(90, limited, memory=larger, read_bytes_per_s=6 * MIB)
    assert found.streamed == ()


@pytest.mark.parametrize("bridge", [PUBLIC, CORRECTED])
def test_what_is_neither_held_nor_streamed_is_bridged(bridge):
    found = in_time(41, 2, replace(STREAMING, bridge=bridge))
    assert len(found.submodel.layers()) == 3
    assert found.bridge == bridge


def test_with_little_time_a_plan_is_within_the_budget_whatever_it_is():
    for budget in (29, 33, 37, 38, 40, 41, 45, 49, 53, 57):
        for seconds in (0.5, 1, 2, 3, 4):
            assert in_time(budget, seconds).predicted_peak_bytes <= budget * MIB


def test_a_device_that_could_only_stream_all_layers_is_refused_when_time_is_short():
    with pytest.raises(BudgetTooSmall, match="short of the smallest submodel"):
        in_time(35, 4, replace(STREAMING, protect=(0, -1)))
