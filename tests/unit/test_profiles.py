"""Profiles fill in what is not said, and nothing else."""

import pytest

from fedpruner_common.statistics import Granularity, Score
from fedpruner_server.config import PlanOptions, ServerSettings
from fedpruner_server.core.aggregation import Aggregation
from fedpruner_server.core.coverage import Coverage
from fedpruner_server.core.grouping import Grouping
from fedpruner_server.core.planning import Policy
from fedpruner_server.profiles import PROFILES, apply_profile


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("PROFILE", "PLAN__POLICY", "PLAN"):
        monkeypatch.delenv(f"FEDPRUNER_SERVER_{name}", raising=False)


def settings_of(profile, **values):
    return ServerSettings(model="m", profile=profile, **values)


def test_the_default_profile_says_nothing():
    assert PROFILES["default"] == {}
    assert settings_of("default").plan == PlanOptions()


@pytest.mark.parametrize("name", PROFILES)
def test_every_key_of_a_profile_is_a_setting_that_takes_its_value(name):
    settings = settings_of(name)
    for table, options in PROFILES[name].items():
        found = getattr(settings, table)
        for key, value in options.items():
            assert key in type(found).model_fields
            expected = tuple(value) if isinstance(value, list) else value
            assert getattr(found, key) == expected


POLICIES = {
    "paper": Policy.FEDPRUNER,
    "paper-plus": Policy.FEDPRUNER,
    "fedra": Policy.RANDOM,
    "depth": Policy.DEPTH,
    "last": Policy.LAST,
    "bi": Policy.TOP,
    "even": Policy.EVEN,
    "random-groups": Policy.FEDPRUNER,
    "exclusive": Policy.EXCLUSIVE,
    "full": Policy.FULL,
    "hetlora": Policy.FULL,
    "flexlora": Policy.FULL,
}


def test_every_profile_is_listed_here():
    assert set(POLICIES) | {"default"} == set(PROFILES)


@pytest.mark.parametrize("name", POLICIES)
def test_a_profile_has_the_policy_it_names(name):
    assert settings_of(name).plan.policy is POLICIES[name]


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_of_this_projects_own_is_in_a_method_that_it_is_compared_with(name):
    plan = settings_of(name).plan
    assert plan.coverage is Coverage.OFF
    assert plan.protect == ()
    assert plan.bridge.value == "off"
    assert (plan.correction, plan.streaming, plan.joint) == (False, False, False)


def test_the_paper_draws_from_spectral_groups_by_the_rise_of_the_loss_on_the_devices():
    plan = settings_of("paper").plan
    assert (plan.grouping, plan.selection) == (Grouping.SPECTRAL, "sample")
    assert (plan.importance, plan.statistics, plan.statistics_every) == (Score.LOO, "device", 1)
    assert plan.granularity is Granularity.LAYER
    assert settings_of("paper").aggregation.method is Aggregation.FEDIT


def test_paper_plus_is_the_paper_with_halves():
    paper, plus = settings_of("paper").plan, settings_of("paper-plus").plan
    assert plus.granularity is Granularity.COMPONENT
    assert plus.model_copy(update={"granularity": Granularity.LAYER}) == paper


@pytest.mark.parametrize(
    ("name", "method"),
    [("hetlora", Aggregation.HETLORA), ("flexlora", Aggregation.FLEXLORA)],
)
def test_the_methods_of_mixed_ranks_bring_their_aggregation(name, method):
    assert settings_of(name).aggregation.method is method


def test_random_groups_and_bi_differ_from_the_method_in_what_they_name():
    assert settings_of("random-groups").plan.grouping is Grouping.RANDOM
    assert settings_of("bi").plan.importance is Score.BI


def test_a_setting_that_is_given_wins_over_the_profile_and_the_rest_stays_filled():
    plan = settings_of("bi", plan={"importance": "wnorm"}).plan
    assert (plan.policy, plan.importance) == (Policy.TOP, Score.WNORM)


def test_a_table_given_as_an_object_counts_with_what_was_set_in_it_only():
    # `importance` is set, to its default value; `policy` is not.
    plan = settings_of("bi", plan=PlanOptions(importance=Score.LOO)).plan
    assert (plan.policy, plan.importance) == (Policy.TOP, Score.LOO)


def test_the_values_that_were_given_are_not_changed():
    given = {"profile": "paper", "plan": {"margin": 0.1}}
    filled = apply_profile(given)
    assert given == {"profile": "paper", "plan": {"margin": 0.1}}
    assert filled["plan"]["margin"] == 0.1
    assert filled["plan"]["selection"] == "sample"
    assert "margin" not in PROFILES["paper"]["plan"]


@pytest.mark.parametrize("values", [{"profile": "nope"}, {"profile": ["paper"]}, {}])
def test_what_is_no_profile_fills_nothing(values):
    assert apply_profile(values) == values


def test_a_table_that_is_not_one_is_left_to_the_settings_to_refuse():
    assert apply_profile({"profile": "full", "plan": 3}) == {"profile": "full", "plan": 3}
