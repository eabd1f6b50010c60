import json

import numpy as np
from toy_model import toy_spec, toy_statistics

from fedpruner_common.statistics import (
    Granularity,
    statistics_from_json,
    statistics_to_json,
)
from fedpruner_common.submodel import Submodel
from fedpruner_server import specs


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
