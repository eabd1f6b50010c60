import os

import pytest
from pydantic import ValidationError

from fedpruner_common.config import load
from fedpruner_common.errors import ConfigError
from fedpruner_common.statistics import Granularity
from fedpruner_server.config import ServerSettings

FLAGS = {"model": "some-model"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FEDPRUNER_SERVER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "server.toml"
        path.write_text(text)
        return path

    return write


def test_without_anything_else_the_defaults_hold():
    settings = load(ServerSettings, None, FLAGS)
    assert settings.run.num_rounds == 20
    assert settings.plan.protect == (0, -1)


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_file(
    config_file, monkeypatch
):
    path = config_file("[run]\nnum_rounds = 1\nmin_updates = 1\nsave_every = 1\n")
    monkeypatch.setenv("FEDPRUNER_SERVER_RUN__NUM_ROUNDS", "2")
    monkeypatch.setenv("FEDPRUNER_SERVER_RUN__MIN_UPDATES", "2")
    run = load(ServerSettings, path, {**FLAGS, "run.num_rounds": 3}).run
    assert (run.num_rounds, run.min_updates, run.save_every) == (3, 2, 1)


def test_a_flag_that_was_not_given_hides_nothing(config_file):
    path = config_file("[run]\nnum_rounds = 7\n")
    assert load(ServerSettings, path, {**FLAGS, "run.num_rounds": None}).run.num_rounds == 7


def test_a_file_alone_is_enough(config_file):
    path = config_file('model = "m"\n[plan]\ngranularity = "component"\nprotect = [0]\n')
    plan = load(ServerSettings, path, {}).plan
    assert plan.granularity is Granularity.COMPONENT
    assert plan.protect == (0,)


def test_two_files_in_a_row_do_not_mix(config_file):
    load(ServerSettings, config_file("[run]\nnum_rounds = 7\n"), FLAGS)
    assert load(ServerSettings, None, FLAGS).run.num_rounds == 20


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("bogus = 1\n", "bogus"),
        ("[run]\nnum_round = 1\n", "run.num_round"),
        ("[training]\nlearning_rte = 1\n", "training.learning_rte"),
    ],
)
def test_an_unknown_key_is_refused_by_name(config_file, text, key):
    with pytest.raises(ConfigError, match=f"setting {key}: "):
        load(ServerSettings, config_file(text), FLAGS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.num_rounds", 0),
        ("run.seed", -1),
        ("training.learning_rate", "fast"),
        ("training.max_seq_length", 1),
        ("plan.granularity", "head"),
        ("plan.margin", 1.0),
        ("lora.lora_dropout", 1.5),
        ("log_level", "loud"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_it_was(key, value):
    with pytest.raises(ConfigError) as caught:
        load(ServerSettings, None, {**FLAGS, key: value})
    assert f"setting {key}: " in str(caught.value)
    assert str(caught.value).endswith(f"got {value!r}")


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match="setting model: field required"):
        load(ServerSettings, None, {})


def test_every_wrong_value_is_reported_at_once():
    with pytest.raises(ConfigError, match=r"num_rounds.*; .*max_steps|max_steps.*; .*num_rounds"):
        load(ServerSettings, None, {**FLAGS, "run.num_rounds": 0, "training.max_steps": 0})


def test_a_wrong_variable_is_refused_with_its_name(monkeypatch):
    monkeypatch.setenv("FEDPRUNER_SERVER_RUN__NUM_ROUNDS", "many")
    with pytest.raises(ConfigError, match="environment variable FEDPRUNER_SERVER_RUN__NUM_ROUNDS"):
        load(ServerSettings, None, FLAGS)


def test_a_config_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file"):
        load(ServerSettings, tmp_path / "none.toml", FLAGS)


def test_a_config_file_that_is_not_toml_is_an_error(config_file):
    with pytest.raises(ConfigError, match="cannot read the settings"):
        load(ServerSettings, config_file("[run\n"), FLAGS)


def test_settings_cannot_change_once_read():
    settings = load(ServerSettings, None, FLAGS)
    with pytest.raises(ValidationError, match="frozen"):
        settings.run.num_rounds = 3


def test_a_profile_fills_what_is_not_given(config_file):
    plan = load(ServerSettings, config_file('profile = "bi"\n'), FLAGS).plan
    assert (plan.policy.value, plan.importance.value, plan.correction) == ("top", "bi", False)


def test_a_profile_may_come_from_a_flag_or_a_variable(monkeypatch):
    assert load(ServerSettings, None, {**FLAGS, "profile": "depth"}).plan.policy.value == "depth"
    monkeypatch.setenv("FEDPRUNER_SERVER_PROFILE", "even")
    assert load(ServerSettings, None, FLAGS).plan.policy.value == "even"
    assert load(ServerSettings, None, {**FLAGS, "profile": "depth"}).plan.policy.value == "depth"


def test_what_is_given_wins_over_the_profile_wherever_it_is_given(config_file, monkeypatch):
    path = config_file('profile = "paper"\n[plan]\nfloor = 0.25\n')
    monkeypatch.setenv("FEDPRUNER_SERVER_PLAN__STATISTICS", "cohort")
    plan = load(ServerSettings, path, {**FLAGS, "plan.importance": "bi"}).plan
    # TOML, environment, flag
    assert (plan.floor, plan.statistics, plan.importance.value) == (0.25, "cohort", "bi")
    # and two that only the profile says
    assert (plan.selection, plan.statistics_every) == ("sample", 1)


def test_a_value_wins_over_the_profile_even_if_it_is_the_default(config_file):
    path = config_file('profile = "paper"\n[plan]\nselection = "argmax"\njoint = true\n')
    plan = load(ServerSettings, path, FLAGS).plan
    assert (plan.selection, plan.joint, plan.statistics) == ("argmax", True, "device")


@pytest.mark.parametrize("text", ['profile = "papper"\n', 'profile = ["paper"]\n'])
def test_an_unknown_profile_is_refused_with_those_there_are(config_file, text):
    with pytest.raises(ConfigError) as caught:
        load(ServerSettings, config_file(text), FLAGS)
    message = str(caught.value)
    assert message.startswith("setting profile: input should be 'default', 'paper', ")
    assert "some-model" not in message


def test_with_a_profile_too_a_table_that_is_not_one_is_refused_by_name(config_file):
    with pytest.raises(ConfigError, match="setting plan: "):
        load(ServerSettings, config_file('profile = "paper"\nplan = 3\n'), FLAGS)


def test_with_a_profile_too_an_unknown_key_is_refused_by_name(config_file):
    path = config_file('profile = "paper"\n[plan]\ntemperture = 2\n')
    with pytest.raises(ConfigError, match=r"setting plan\.temperture: "):
        load(ServerSettings, path, FLAGS)
