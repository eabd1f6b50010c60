"""Settings -> the method's parts, and a client's task from its plan."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy_model import component, toy_memory, toy_spec

from fedpruner_common.convert_statistics import statistics_from_pb, statistics_to_pb
from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.statistics import (
    Family,
    FamilyStatistics,
    Granularity,
    ProbeCost,
    Score,
    Statistics,
)
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import NO_BRIDGE, BridgeKind, BridgeSettings
from fedpruner_server import specs
from fedpruner_server.config import AggregationOptions, PlanOptions, ServerSettings
from fedpruner_server.core.aggregation import AggregationSettings, Factor
from fedpruner_server.core.calibration import UNCALIBRATED, Calibration
from fedpruner_server.core.coverage import Coverage
from fedpruner_server.core.grouping import Grouping
from fedpruner_server.core.planning import ClientPlan, Policy
from fedpruner_server.method import (
    TaskPlan,
    adapter_components,
    ages,
    aggregation_settings,
    as_sent,
    bridge_settings,
    by_source,
    calibrated_budget,
    make_probe,
    make_task,
    mixed,
    plan_settings,
    statistics_due,
    task_plan,
    to_bridge,
    to_measure,
    training_settings,
)

HASH = "0123456789abcdef" * 4
SPEC = toy_spec(3)
NAMES = SPEC.tensor_names(SPEC.full())
TENSORS = {name: TensorInfo(name, "U8", (1,), 1, HASH) for name in NAMES}
FILES = (FileInfo("config.json", 2, HASH),)
MIDDLE = (component("1.attention"), component("1.ffn"))


def settings_of(**tables):
    return ServerSettings(model="m", **tables)


def with_plan(**plan):
    return settings_of(plan=plan)


# When to measure


def measured_before(settings, num_rounds, drift=lambda _: 0.0):
    """Rounds before which the layers are measured, when it is done whenever it is due."""
    found, last = [], None
    for number in range(1, num_rounds + 1):
        if statistics_due(settings, number, measured=last, drift=drift(number)):
            found.append(number)
            last = number
    return found


def test_the_layers_are_measured_first_and_then_every_so_many_rounds():
    assert measured_before(with_plan(statistics_every=4), 12) == [1, 5, 9]
    assert measured_before(with_plan(statistics_every=1), 3) == [1, 2, 3]


def test_the_layers_are_measured_again_when_the_adapter_has_moved_far():
    settings = with_plan(statistics_every=10, statistics_drift=0.5)
    far = {3: 0.51, 5: 0.5}  # 0.5 itself is not beyond it
    # and ten rounds after the third
    assert measured_before(settings, 14, lambda number: far.get(number, 0.0)) == [1, 3, 13]


def test_every_zero_measures_once_however_far_the_adapter_moves():
    assert measured_before(with_plan(statistics_every=0), 30, lambda _: 9.0) == [1]


def test_a_round_that_is_planned_again_is_not_measured_again():
    settings = with_plan(statistics_every=1)
    assert not statistics_due(settings, 3, measured=3, drift=9.0)


@pytest.mark.parametrize(
    ("source", "due", "expected"),
    [
        ("public", True, ["a", "b", "c"]),
        ("cohort", True, ["a", "b", "c"]),
        ("device", True, ["a", "b", "c"]),
        ("public", False, []),
        ("cohort", False, []),
        ("device", False, ["a", "c"]),  # who is new has nothing to plan with
    ],
)
def test_between_two_measurements_only_new_devices_with_statistics_of_their_own_are_asked(
    source, due, expected
):
    settings = with_plan(statistics=source)
    assert to_measure(settings, ("a", "b", "c"), {"b": "known"}, due=due) == expected


# Ages


def test_what_nobody_has_trained_is_as_old_as_the_run():
    assert set(ages({}, 2, before=1).values()) == {0}
    assert ages({}, 2, before=6) == dict.fromkeys(Submodel.full(2).components, 5)


def test_an_age_counts_the_rounds_since_the_last_one_that_brought_the_component():
    held = {4: {component("0.ffn")}, 2: {component("0.ffn"), component("1.ffn")}}
    found = ages(held, 2, before=6)
    assert found == {
        component("0.attention"): 5,
        component("0.ffn"): 1,  # of round 4, not of round 2: round 5 missed it
        component("1.attention"): 5,
        component("1.ffn"): 3,
    }
    assert ages({5: {component("0.ffn")}}, 2, before=6)[component("0.ffn")] == 0


# Tasks


def task_of(plan, settings=None, number=1):
    return make_task(
        settings or settings_of(),
        SPEC,
        plan,
        task_id="t",
        number=number,
        tensors=TENSORS,
        files=FILES,
    )


def names(tensors):
    return [tensor.name for tensor in tensors]


@pytest.mark.parametrize(
    "bridge", [BridgeSettings(corrected=True), BridgeSettings(BridgeKind.FULL, local=True)]
)
def test_a_device_that_sweeps_gets_every_tensor_of_the_full_model_once(bridge):
    task = task_of(TaskPlan(MIDDLE, 7, bridge))
    assert names(task.tensors) == ["1.attention.weight", "1.ffn.weight", "embed"]
    assert names(task.other_tensors) == [
        "0.attention.weight",
        "0.ffn.weight",
        "2.attention.weight",
        "2.ffn.weight",
    ]
    assert sorted(names(task.tensors + task.other_tensors)) == sorted(NAMES)


@pytest.mark.parametrize("bridge", [NO_BRIDGE, BridgeSettings(BridgeKind.FULL)])
def test_a_device_that_does_not_sweep_gets_its_own_tensors_only(bridge):
    task = task_of(TaskPlan(MIDDLE, 7, bridge))
    assert names(task.tensors) == ["1.attention.weight", "1.ffn.weight", "embed"]
    assert task.other_tensors == ()


def test_the_full_model_has_no_other_tensors():
    task = task_of(TaskPlan(SPEC.full().components, 7, BridgeSettings(corrected=True)))
    assert names(task.tensors) == list(NAMES)
    assert task.other_tensors == ()


def test_a_task_carries_its_plan():
    file = FileInfo("bridges.safetensors", 9, HASH)
    bridge = BridgeSettings(BridgeKind.LOWRANK, rank=3)
    task = task_of(TaskPlan(MIDDLE, 7, bridge, file, (1,)), number=4)
    assert (task.task_id, task.round, task.predicted_peak_bytes) == ("t", 4, 7)
    assert (task.bridge, task.bridge_file, task.streamed) == (bridge, file, (1,))
    assert task.submodel == Submodel.of(3, MIDDLE)
    assert task.files == FILES
    # LoRA trains the submodel's modules, whatever the device sweeps.
    assert task.lora.target_modules == ("1.attention.proj", "1.ffn.proj")


def test_a_sweep_needs_the_whole_adapter_and_training_only_its_part():
    assert adapter_components(SPEC, TaskPlan(MIDDLE, 0)) == MIDDLE
    public = BridgeSettings(BridgeKind.FULL)
    assert adapter_components(SPEC, TaskPlan(MIDDLE, 0, public)) == MIDDLE
    for bridge in (BridgeSettings(corrected=True), BridgeSettings(BridgeKind.SCALE, local=True)):
        found = adapter_components(SPEC, TaskPlan(MIDDLE, 0, bridge))
        assert found == SPEC.full().components


def test_what_is_kept_of_a_plan_is_all_that_its_task_needs():
    bridge, file = BridgeSettings(BridgeKind.SCALE), FileInfo("b", 1, HASH)
    plan = ClientPlan(Submodel.of(3, MIDDLE), 11, {}, bridge, (1,))
    assert task_plan(plan, file) == TaskPlan(MIDDLE, 11, bridge, file, (1,), 11)


def test_a_calibrated_plan_expects_what_the_device_has_shown():
    plan = ClientPlan(Submodel.of(3, MIDDLE), 1000, {})
    found = task_plan(plan, None, floor_bytes=400, calibration=Calibration(1.5))
    assert (found.predicted_peak_bytes, found.model_peak_bytes, found.floor_bytes) == (
        1300, 1000, 400,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("calibration", "usable"),
    [
        (UNCALIBRATED, 900),  # 10 % of 1000 stay free
        (Calibration(1.25), 400 + 500 / 1.25),
        (Calibration(0.5), 400 + 500 / 0.5),
        (Calibration(1.0, too_much_bytes=300), 400 + 276),  # 60 of it is every submodel's
        (Calibration(2.0, too_much_bytes=300), 400 + 250),
    ],
)
def test_a_calibrated_budget_plans_what_the_device_can_hold(calibration, usable):
    plan = replace(plan_settings(settings_of(), None), margin=0.1)
    spec = toy_spec(3, toy_memory(3, shared_weight_bytes=20, text_bytes=40))
    budget = calibrated_budget(plan, calibration, spec, budget_bytes=1000, floor_bytes=400)
    assert plan.usable_bytes(budget) == usable


@pytest.mark.parametrize(
    "plan",
    [
        TaskPlan(MIDDLE, 7),
        TaskPlan(MIDDLE[:1], 1 << 40, BridgeSettings(BridgeKind.LOWRANK, 8, True, True)),
        TaskPlan(
            MIDDLE, 7, BridgeSettings(BridgeKind.FULL), FileInfo("bridges.safetensors", 9, HASH)
        ),
        TaskPlan(SPEC.full().components, 7, streamed=(0, 2)),
    ],
)
def test_a_plan_survives_the_journal(plan):
    again = specs.plan_from_json(json.loads(json.dumps(specs.plan_to_json(plan))))
    assert again == plan
    assert isinstance(again.bridge.kind, BridgeKind)


# Training settings


def factors(method, rounds):
    settings = settings_of(aggregation={"method": method})
    return [training_settings(settings, number).train_factor for number in rounds]


def test_rolora_trains_the_factors_in_turn_and_b_first():
    assert factors("rolora", range(1, 6)) == ["B", "B", "A", "B", "A"]
    assert factors("fedit", range(1, 3)) == ["both", "both"]
    assert factors("ffa", range(1, 4)) == ["B", "B", "B"]


def test_the_learning_rate_falls_over_rounds_like_a_cosine():
    settings = settings_of(training={"learning_rate": 8.0}, run={"num_rounds": 4})
    found = [training_settings(settings, number).learning_rate for number in (1, 2, 3, 4)]
    # 8 * (1 + cos(0, 45, 90, 135 degrees)) / 2
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [8.0, 4 * (1 + half), 4.0, 4 * (1 - half)])
    constant = settings_of(training={"learning_rate": 8.0, "lr_scheduler_type": "constant"})
    assert training_settings(constant, 17).learning_rate == 8.0


def test_every_round_and_every_seed_has_a_seed_of_its_own():
    seeds = {
        training_settings(settings_of(run={"seed": seed}), number).seed
        for seed in range(5)
        for number in range(1, 101)
    }
    assert len(seeds) == 500
    assert training_settings(settings_of(run={"seed": 2}), 3).seed == 2_000_009


TRAINING = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 5,
    "max_steps": 7,
    "max_seq_length": 9,
    "weight_decay": 0.25,
    "max_grad_norm": 2.5,
    "gradient_checkpointing": True,
    "dtype": "bfloat16",
    "proximal_mu": 0.125,
}


def test_every_other_training_option_arrives_as_it_is():
    found = training_settings(settings_of(training=TRAINING), 1)
    assert {name: getattr(found, name) for name in TRAINING} == TRAINING


# What is asked about the layers


def test_a_probe_asks_for_what_the_settings_say_on_the_full_model():
    settings = settings_of(
        plan={"granularity": "component", "importance": "bi", "rms_rows": False},
        data={"num_calibration_sequences": 5},
        training={"max_seq_length": 33, "dtype": "float32"},
        run={"seed": 2},
        lora={"r": 6},
    )
    probe = make_probe(settings, SPEC, number=3, tensors=TENSORS, files=FILES)
    assert names(probe.tensors) == list(NAMES)
    assert (probe.num_layers, probe.files, probe.task_id) == (3, FILES, "")
    assert (probe.granularity, probe.score, probe.dtype) == ("component", "bi", "float32")
    assert (probe.num_sequences, probe.max_seq_length, probe.seed) == (5, 33, 2_000_009)
    assert probe.lora.r == 6
    assert not probe.rms_rows
    assert probe.lora.target_modules == tuple(
        f"{layer}.{kind}.proj" for layer in range(3) for kind in ("attention", "ffn")
    )


def statistics(similarity, *importance, score="loo", source="device", cost=None):
    matrix = np.array([[1.0, similarity], [similarity, 1.0]])
    families = {Family.LAYER: FamilyStatistics(matrix, importance)}
    return Statistics(families, source, score, cost)


def test_as_sent_is_bit_for_bit_what_the_wire_brings():
    rng = np.random.default_rng(0)
    matrix = rng.random((5, 5))
    families = {
        family: FamilyStatistics((matrix + matrix.T) / 2, tuple((rng.normal(size=5)).tolist()))
        for family in Granularity.COMPONENT.families
    }
    found = Statistics(families, "device", "", ProbeCost(2.5, 77, 1.5, 4096))
    request = pb.PushStatisticsRequest()
    statistics_to_pb(found, request)
    arrived = statistics_from_pb(request.FromString(request.SerializeToString()))
    sent = as_sent(found)
    assert arrived.families.keys() == sent.families.keys() == families.keys()
    for family, item in sent.families.items():
        np.testing.assert_array_equal(arrived.families[family].similarity, item.similarity)
        assert arrived.families[family].importance == item.importance
        assert item.importance != families[family].importance  # float64 does not fit
    assert (arrived.source, arrived.cost) == (sent.source, sent.cost)


def test_statistics_of_the_cohort_and_of_public_text_move_slowly():
    old, new = statistics(0.2, 1.0, 2.0), statistics(0.7, 3.0, 0.0)
    for source in ("cohort", "public"):
        found = mixed(with_plan(statistics=source), {source: old}, {source: new})[source]
        family = found.families[Family.LAYER]
        # 0.7 of the old and 0.3 of the new
        np.testing.assert_allclose(family.similarity, [[1.0, 0.35], [0.35, 1.0]])
        np.testing.assert_allclose(family.importance, [1.6, 1.4])


def test_statistics_of_a_device_are_taken_as_they_are_and_those_of_others_stay():
    old, new, other = statistics(0.2, 1.0, 2.0), statistics(0.7, 3.0, 0.0), statistics(0, 9.0, 9.0)
    found = mixed(with_plan(statistics="device"), {"a": old, "b": other}, {"a": new})
    assert found == {"a": new, "b": other}


def test_a_survey_is_the_cohorts_mean_by_tokens_or_fills_in_who_did_not_answer():
    small, large = (
        Statistics(
            {Family.LAYER: FamilyStatistics(np.eye(2), importance)},
            "device",
            "",
            ProbeCost(1.0, num_tokens, 1.0, 0),
        )
        for importance, num_tokens in (((1.0, 4.0), 100), ((5.0, 8.0), 300))
    )
    found = {"a": small, "b": large}
    cohort = by_source(with_plan(statistics="cohort"), found, ["a", "b", "c"])
    assert cohort.keys() == {"cohort"}
    # (1 * 100 + 5 * 300) / 400 and (4 * 100 + 8 * 300) / 400
    assert cohort["cohort"].families[Family.LAYER].importance == (4.0, 7.0)
    each = by_source(with_plan(statistics="device"), found, ["a", "b", "c"])
    assert (each["a"], each["b"]) == (small, large)
    assert each["c"].families[Family.LAYER].importance == (3.0, 6.0)


def test_the_first_statistics_are_taken_as_they_are():
    new = statistics(0.7, 3.0, 0.0)
    assert mixed(with_plan(statistics="cohort"), {}, {"cohort": new}) == {"cohort": new}


# Settings


@pytest.mark.parametrize(
    ("plan", "expected", "sweeps"),
    [
        ({"bridge": "off", "correction": False}, NO_BRIDGE, False),
        ({"bridge": "off", "correction": True}, BridgeSettings(corrected=True), True),
        # Nothing to fit: where the text is does not matter.
        (
            {"bridge": "off", "bridge_data": "local", "correction": False},
            NO_BRIDGE,
            False,
        ),
        (
            {"bridge": "scale", "correction": False},
            BridgeSettings(BridgeKind.SCALE),
            False,
        ),
        (
            {"bridge": "lowrank", "bridge_rank": 5, "correction": False},
            BridgeSettings(BridgeKind.LOWRANK, rank=5),
            False,
        ),
        (
            {"bridge": "full", "bridge_data": "local", "correction": False},
            BridgeSettings(BridgeKind.FULL, local=True),
            True,
        ),
        (
            {"bridge": "full", "correction": True},
            BridgeSettings(BridgeKind.FULL, corrected=True),
            True,
        ),
        (
            {"bridge": "lowrank", "bridge_rank": 5, "bridge_data": "local", "correction": True},
            BridgeSettings(BridgeKind.LOWRANK, rank=5, local=True, corrected=True),
            True,
        ),
    ],
)
def test_the_bridges_follow_from_kind_data_and_correction(plan, expected, sweeps):
    found = bridge_settings(with_plan(**plan))
    assert found == expected
    assert found.sweeps is sweeps


# Another value than the base's below; for those of `NOT_FOR_PLANS`, planning does not use them.
BASE = {"bridge": "lowrank", "correction": False}
CHANGED = {
    "policy": Policy.EVEN,
    "granularity": Granularity.COMPONENT,
    "grouping": Grouping.RANDOM,
    "selection": "sample",
    "temperature": 0.5,
    "floor": 0.5,
    "joint": False,
    "coverage": Coverage.HARD,
    "coverage_kappa": 0.5,
    "coverage_rounds": 3,
    "importance": Score.BI,
    "statistics": "device",
    "statistics_every": 3,
    "statistics_drift": 0.25,
    "rms_rows": False,
    "protect": (0,),
    "margin": 0.5,
    "bridge": BridgeKind.FULL,
    "bridge_rank": 5,
    "bridge_data": "local",
    "correction": True,
    "streaming": True,
    "stream_seconds": 2.0,
}
NOT_FOR_PLANS = {"importance", "statistics", "statistics_every", "statistics_drift", "rms_rows"}
BRIDGED_SPEC = toy_spec(3, toy_memory(3, hidden_size=64, layer_input_bytes=100))


def test_every_option_of_the_method_is_looked_at_here():
    assert CHANGED.keys() == PlanOptions.model_fields.keys()


@pytest.mark.parametrize("name", CHANGED)
def test_every_option_of_the_method_reaches_planning(name):
    before = with_plan(**BASE)
    after = with_plan(**{**BASE, name: CHANGED[name]})
    assert before.plan != after.plan
    same = plan_settings(before, BRIDGED_SPEC) == plan_settings(after, BRIDGED_SPEC)
    assert same is (name in NOT_FOR_PLANS)


def test_the_runs_seed_reaches_planning():
    assert plan_settings(settings_of(run={"seed": 5}), SPEC).seed == 5


def test_the_bridges_are_counted_as_soon_as_the_model_is_known():
    settings = with_plan(bridge="lowrank", bridge_rank=2, correction=True)
    assert plan_settings(settings, None).bridge_bytes_per_run == 0
    # 4 bytes of (2 * 64 * 2 + 64) numbers, two saved inputs of 100 and a correction of 100
    assert plan_settings(settings, BRIDGED_SPEC).bridge_bytes_per_run == 4 * 320 + 300


AGGREGATION = {
    "method": "anchor",
    "error_feedback": True,
    "min_holders": 2,
    "shrink": 0.5,
    "server_optimizer": "momentum",
    "server_learning_rate": 0.25,
    "server_momentum": 0.5,
}


def test_every_option_of_aggregation_reaches_it():
    assert AGGREGATION.keys() == AggregationOptions.model_fields.keys()
    found = aggregation_settings(settings_of(aggregation=AGGREGATION))
    assert found == AggregationSettings(**AGGREGATION)
    default = aggregation_settings(settings_of())
    for name in AGGREGATION:
        assert getattr(found, name) != getattr(default, name)
    assert default.fedadam_factor is Factor.B


def test_the_coordinator_fits_each_pruned_submodel_once_and_only_on_public_text():
    first, second = (Submodel.of(3, [component(c)]) for c in ("0.ffn", "2.attention"))
    submodels = [second, Submodel.full(3), first, second]
    public = with_plan(bridge="full", bridge_data="public")
    assert to_bridge(public, submodels) == [first, second]
    assert to_bridge(with_plan(bridge="full", bridge_data="local"), submodels) == []
    assert to_bridge(with_plan(bridge="off"), submodels) == []
