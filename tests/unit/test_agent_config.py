import os

import pytest

from fedpruner_client.config import AgentSettings
from fedpruner_common.config import load
from fedpruner_common.errors import ConfigError

FLAGS = {"data": ["notes.jsonl"]}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FEDPRUNER_AGENT_")]:
        monkeypatch.delenv(name)


def settings(**flags):
    return load(AgentSettings, None, {**FLAGS, **flags})


def test_sizes_are_written_as_people_write_them():
    assert settings(memory_budget="6GiB").memory_budget == 6_442_450_944  # 6 * 1024**3
    assert settings(cache_limit="512 MB").cache_limit == 536_870_912
    assert settings(memory_budget=None).memory_budget is None


def test_sizes_in_the_environment_and_the_file_are_read_the_same_way(tmp_path, monkeypatch):
    path = tmp_path / "agent.toml"
    path.write_text('memory_reserve = "1MiB"\ncache_limit = 4096\n')
    monkeypatch.setenv("FEDPRUNER_AGENT_MEMORY_BUDGET", "2K")
    read = load(AgentSettings, path, FLAGS)
    assert (read.memory_budget, read.memory_reserve, read.cache_limit) == (2048, 1_048_576, 4096)


@pytest.mark.parametrize("value", ["lots", "-1GiB", ""])
def test_a_size_that_is_none_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"setting memory_budget: .*6GiB"):
        settings(memory_budget=value)


@pytest.mark.parametrize("key", ["memory_budget", "memory_reserve", "cache_limit"])
def test_a_negative_size_in_a_file_is_refused(tmp_path, key):
    path = tmp_path / "agent.toml"
    path.write_text(f"{key} = -1\n")
    with pytest.raises(ConfigError, match=key):
        load(AgentSettings, path, FLAGS)


def test_an_agent_without_data_is_refused():
    with pytest.raises(ConfigError, match="setting data"):
        load(AgentSettings, None, {})
    with pytest.raises(ConfigError, match="setting data"):
        load(AgentSettings, None, {"data": []})


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "x" * 65, "-v"])
def test_a_name_that_is_no_plain_file_name_is_refused(name):
    with pytest.raises(ConfigError, match="setting name"):
        settings(name=name)


def test_an_agent_without_a_name_takes_the_hosts():
    assert settings().client_id
    assert "." not in settings().client_id
    assert settings(name="jetson-7").client_id == "jetson-7"


def test_threads_are_those_asked_for_or_the_cores_this_process_may_use():
    assert settings(num_threads=3).threads() == 3
    assert settings().threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("key", "value"), [("device", "tpu"), ("max_wait_time", 0), ("num_threads", -1), ("idle_s", -1)]
)
def test_a_wrong_value_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"setting {key}: "):
        settings(**{key: value})
