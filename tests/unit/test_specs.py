import json

import numpy as np
from toy_model import component, toy_memory, toy_spec, toy_statistics

from fedpruner_common.statistics import (
    Granularity,
    statistics_from_json,
    statistics_to_json,
)
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind
from fedpruner_server import specs
from fedpruner_server.core.planning import PlanSettings, plan_client
from fedpruner_server.core.selection import Choice, replay
from fedpruner_server.method import TaskPlan


def through_json(value):
    return json.loads(json.dumps(value))


def test_a_spec_survives_json():
    spec = toy_spec(3)
    assert specs.spec_from_json(through_json(specs.spec_to_json(spec))) == spec


def test_statistics_survive_json_to_the_last_bit():
    statistics = toy_statistics((0.1, 1 / 3, 2e-9), granularity=Granularity.COMPONENT)
    again = statistics_from_json(through_json(statistics_to_json(statistics)))
    assert (again.source, again.score) == (statistics.source, statistics.score)
    assert again.families.keys() == statistics.families.keys()
    for family, item in statistics.families.items():
        assert again.families[family].importance == item.importance
        np.testing.assert_array_equal(again.families[family].similarity, item.similarity)


def test_a_submodel_needs_its_own_tensors_and_the_shared_ones():
    spec = toy_spec(3)
    components = spec.full().components[1:3]
    assert spec.tensor_names(Submodel.of(3, components)) == (
        "0.ffn.weight",
        "1.attention.weight",
        "embed",
    )


def test_every_number_of_the_byte_model_survives_json():
    memory = toy_memory(
        2,
        shared_weight_bytes=3,
        disk_ratio=1 / 3,
        shared_saved_bytes=5,
        layer_input_bytes=7,
        loss_bytes=11,
        gradient_checkpointing=True,
        hidden_size=13,
        num_batches=17,
    )
    spec = toy_spec(2, memory)
    assert specs.spec_from_json(through_json(specs.spec_to_json(spec))).memory == memory


def test_a_plan_is_written_in_words():
    assert specs.plan_to_json(TaskPlan((component("1.ffn"),), 7, streamed=(1,))) == {
        "components": ["1.ffn"],
        "predicted_peak_bytes": 7,
        "bridge": {"kind": BridgeKind.OFF, "rank": 0, "local": False, "corrected": False},
        "bridge_file": None,
        "streamed": [1],
        "model_peak_bytes": 0,
        "floor_bytes": 0,
    }
    assert through_json(specs.plan_to_json(TaskPlan((), 0)))["bridge"]["kind"] == "off"


def test_what_the_journal_says_of_a_choice_is_enough_to_draw_it_again():
    settings = PlanSettings(Granularity.LAYER, sample=True, protect=(0,), margin=0.0, seed=3)
    statistics = toy_statistics((0.1, 0.4, 0.3, 0.2, 0.5))
    plan = plan_client(
        toy_spec(5),
        statistics,
        settings,
        client_id="a",
        round_number=2,
        budget_bytes=21 << 20,  # text 12, three layers 9
        floor_bytes=0,
    )
    journaled = through_json(specs.choices_to_json(plan))["layer"]
    again = [
        Choice(**{k: tuple(v) if isinstance(v, list) else v for k, v in choice.items()})
        for choice in journaled
    ]
    assert tuple(again) == plan.choices[next(iter(plan.choices))]
    drawn = [choice for choice in again if choice.uniform is not None]
    assert len(drawn) == 2
    assert [replay(choice) for choice in drawn] == [choice.chosen for choice in drawn]
