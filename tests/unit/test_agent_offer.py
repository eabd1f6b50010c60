"""What an agent offers, renews and refuses; the training process and the coordinator stand in."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpruner_client import agent as agent_module
from fedpruner_client.agent import Agent
from fedpruner_client.config import AgentSettings
from fedpruner_client.connection import Finished, Offer
from fedpruner_client.trainer import Baseline
from fedpruner_common.errors import BudgetTooSmall, OutOfMemory
from fedpruner_common.manifest import TensorInfo

MIB = 1 << 20
FLOOR = 300 * MIB


class StandIn:
    """A training process that is not there, and what it would say and hold."""

    def __init__(self, *, available, kind="rss", limit="host", resident=0):
        self.baseline = Baseline(kind, FLOOR, available, limit)
        self.resident, self.shared = resident, 0
        self.pid = None
        self.closed = 0

    def measure(self):
        return self.baseline

    def resident_bytes(self):
        return self.resident

    def shared_bytes(self):
        return self.shared

    def close(self):
        self.closed += 1


def agent_with(tmp_path: Path, monkeypatch, trainer, *, free=None, **settings):
    values = {"memory_reserve": 100 * MIB, "state_dir": tmp_path, "name": "one", **settings}
    found = Agent(AgentSettings(data=[tmp_path / "x.txt"], **values))
    found._trainer = trainer
    monkeypatch.setattr(agent_module, "remembered_bandwidth", lambda _: 5)
    monkeypatch.setattr(agent_module, "available_bytes", lambda: free or 0)
    return found


def connected(agent):
    return SimpleNamespace(offer=agent._offer())


def test_an_offer_is_what_the_process_could_use_less_the_reserve(tmp_path, monkeypatch):
    agent = agent_with(tmp_path, monkeypatch, StandIn(available=1000 * MIB))
    assert agent._offer() == Offer(900 * MIB, FLOOR, "rss", 5)


def test_a_gpus_memory_needs_no_reserve_for_the_host(tmp_path, monkeypatch):
    gpu = StandIn(available=1000 * MIB, kind="cuda", limit="GPU")
    assert agent_with(tmp_path, monkeypatch, gpu)._offer().memory_budget_bytes == 1000 * MIB
    board = StandIn(available=1000 * MIB, kind="unified", limit="host")
    assert agent_with(tmp_path, monkeypatch, board)._offer().memory_budget_bytes == 900 * MIB


def test_a_configured_budget_caps_the_offer_and_is_not_promised_where_it_is_not_there(
    tmp_path, monkeypatch, capsys
):
    rich = StandIn(available=1000 * MIB)
    agent = agent_with(tmp_path, monkeypatch, rich, memory_budget=600 * MIB)
    assert agent._offer().memory_budget_bytes == 600 * MIB
    poor = StandIn(available=500 * MIB, limit="cgroup /a memory.max")
    agent = agent_with(tmp_path, monkeypatch, poor, memory_budget=600 * MIB)
    assert agent._offer().memory_budget_bytes == 400 * MIB
    assert "cgroup /a memory.max" in capsys.readouterr().out  # which limit it is


@pytest.mark.parametrize(
    ("free", "resident", "offered"),
    [
        (1000, 0, 900),
        (974, 0, 900),  # 3 % less is noise
        (970, 0, 870),
        (400, 0, 300),
        (0, 0, 0),
        (1089, 0, 900),  # and so is 10 % more
        (1092, 0, 992),
        (700, 300, 900),  # what the warm process holds would be its own
    ],
)
def test_free_memory_that_changed_is_another_offer(tmp_path, monkeypatch, free, resident, offered):
    trainer = StandIn(available=1000 * MIB, resident=resident * MIB)
    agent = agent_with(tmp_path, monkeypatch, trainer, free=free * MIB)
    connection = connected(agent)
    agent._renew(connection)
    assert connection.offer == Offer(offered * MIB, FLOOR, "rss", 5)


def test_libraries_that_another_group_pays_for_are_free_also_when_the_process_is_gone(
    tmp_path, monkeypatch
):
    trainer = StandIn(available=1000 * MIB, resident=0)
    trainer.shared = 90 * MIB
    # Its floor is 300 MiB, and starting it took only 210 of what was available.
    free = iter([910 * MIB, 700 * MIB, 910 * MIB, 610 * MIB])
    agent = agent_with(tmp_path, monkeypatch, trainer)
    monkeypatch.setattr(agent_module, "available_bytes", lambda: next(free))
    connection = connected(agent)
    assert connection.offer.memory_budget_bytes == 900 * MIB
    agent._renew(connection)
    assert connection.offer.memory_budget_bytes == 900 * MIB
    agent._renew(connection)
    assert connection.offer.memory_budget_bytes == 600 * MIB


@pytest.mark.parametrize(("kind", "limit"), [("cuda", "GPU"), ("rss", "RLIMIT_DATA")])
def test_a_limit_that_only_the_process_sees_is_not_looked_at_from_outside(
    tmp_path, monkeypatch, kind, limit
):
    trainer = StandIn(available=1000 * MIB, kind=kind, limit=limit)
    agent = agent_with(tmp_path, monkeypatch, trainer, free=0)
    connection = connected(agent)
    before = connection.offer
    agent._renew(connection)
    assert connection.offer == before


def test_a_task_that_does_not_fit_is_refused_with_the_missing_bytes():
    offer = Offer(900 * MIB, FLOOR, "rss")
    tensors = (TensorInfo("w", "U8", (500 * MIB,), 500 * MIB, "0" * 64),)

    def task(peak, *, streamed=(), tensors=tensors):
        return SimpleNamespace(predicted_peak_bytes=peak, streamed=streamed, tensors=tensors)

    Agent._check_affordable(task(900 * MIB), offer)
    with pytest.raises(
        OutOfMemory, match=r"needs 0\.977 GiB, 100 MiB more than this device has free"
    ):
        Agent._check_affordable(task(1000 * MIB), offer)
    # A plan that is smaller than its own weights is not believed, but for streamed ones.
    large = (TensorInfo("w", "U8", (700 * MIB,), 700 * MIB, "0" * 64),)
    with pytest.raises(OutOfMemory, match="100 MiB more"):
        Agent._check_affordable(task(400 * MIB, tensors=large), offer)
    Agent._check_affordable(task(400 * MIB, streamed=(1,), tensors=large), offer)


class Answers:
    """A coordinator's answers to `pull`, in order."""

    def __init__(self, offer, *answers):
        self.offer = offer
        self._answers = iter(answers)

    def pull(self, **_):
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_device_that_will_never_have_the_memory_ends(tmp_path, monkeypatch):
    agent = agent_with(tmp_path, monkeypatch, StandIn(available=400 * MIB), free=400 * MIB)
    answers = Answers(agent._offer(), BudgetTooSmall("7 MiB short"))
    with pytest.raises(BudgetTooSmall, match="7 MiB short"):
        agent._loop(answers, SimpleNamespace(working_on=lambda *_: None))


def test_a_device_whose_memory_is_taken_for_a_while_waits_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agent_module, "_SHORT_PAUSE_S", 0.0)
    agent = agent_with(tmp_path, monkeypatch, StandIn(available=1000 * MIB), free=400 * MIB)
    answers = Answers(agent._offer(), BudgetTooSmall("7 MiB short"), Finished("done"))
    assert agent._loop(answers, SimpleNamespace(working_on=lambda *_: None)) == 0
    assert "7 MiB short" in capsys.readouterr().out
    assert agent._trainer.closed == 1  # it gives up its own first
