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
