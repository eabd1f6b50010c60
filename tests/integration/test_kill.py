"""kill -9 at every moment of a round, of coordinator and agent: the same bits come out."""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from faults import Fault
from federation import assert_equal_bits
from invariants import check
from programs import Program, address_of, server_config
from safetensors.numpy import load_file

NUM_ROUNDS = 3
TESTS = Path(__file__).parents[1]
DATA = "nothing.jsonl"  # light agents read no text


@dataclass(frozen=True)
class Prepared:
    """A coordinator's state that knows its model already, and how its run ends undisturbed."""

    state_dir: Path
    config: Path
    adapter: dict[str, np.ndarray]


class Bed:
    """One run with faults; every program ends with it."""

    def __init__(self, folder: Path, config: Path, state_dir: Path | None) -> None:
        self._folder, self._config = folder, config
        self._programs: list[Program] = []
        self.state_dir = folder / "server"
        self.address = "127.0.0.1:0"
        if state_dir is not None:
            shutil.copytree(state_dir, self.state_dir)

    def _start(self, name: str, program: str, *arguments: str, fault: str = "") -> Program:
        environment = {"FAULT": fault, "CHUNK_BYTES": "4096", "PYTHONPATH": str(TESTS)}
        count = len(self._programs)
        started = Program(
            self._folder / "logs",
            f"{name}-{count}",
            "faults",
            program,
            "run",
            *arguments,
            env=environment,
        )
        self._programs.append(started)
        return started

    def server(self, fault: str = "", *, wait: bool = True) -> Program:
        """The coordinator, always at the same address."""
        server = self._start(
            "server",
            "server",
            *("--config", str(self._config)),
            *("--state-dir", str(self.state_dir)),
            *("--listen", self.address),
            fault=fault,
        )
        if wait:
            self.address = address_of(server)
        return server

    def agent(self, name: str, fault: str = "") -> Program:
        return self._start(
            name,
            "agent",
            *("--server", self.address),
            *("--name", name),
            *("--data", DATA),
            *("--state-dir", str(self._folder / name)),
            *("--memory-budget", "4GiB"),
            *("--max-wait-time", "0.5"),
            fault=fault,
        )

    def adapter(self) -> dict[str, np.ndarray]:
        return load_file(self.state_dir / "peft/final/adapter_model.safetensors")

    def close(self) -> None:
        for program in reversed(self._programs):
            program.end()


@pytest.fixture(scope="module")
def prepared(
    small_model: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    folder = tmp_path_factory.mktemp("kill")
    config = server_config(
        folder / "server.toml",
        small_model,
        texts,
        run={"num_rounds": NUM_ROUNDS, "lease_s": 20, "min_available_clients": 2},
        data={"eval": [], "calibration": [str(texts["counting-held_out"])]},
        # Light agents move the adapter far; no round needs torch.
        plan={"statistics_every": 0, "statistics_drift": 1e9},
    )
    bed = Bed(folder, config, None)
    try:
        first = bed.server()
        first.wait_for("waiting for 2 of 2 agents")
        assert first.terminate() == 0
        shutil.copytree(bed.state_dir, folder / "prepared")
        server = bed.server()
        agents = [bed.agent("one"), bed.agent("two")]
        assert [server.wait(), *(agent.wait() for agent in agents)] == [0, 0, 0]
        check(bed.state_dir, config, num_rounds=NUM_ROUNDS)
        return Prepared(folder / "prepared", config, bed.adapter())
    finally:
        bed.close()


@pytest.fixture
def bed(prepared: Prepared, tmp_path: Path) -> Iterator[Bed]:
    bed = Bed(tmp_path, prepared.config, prepared.state_dir)
    yield bed
    bed.close()


def killed(program: Program) -> bool:
    return program.wait() == -signal.SIGKILL


# The count says in which round, and with which device, the moment comes.
SERVER_FAULTS = [
    "gathering:1",
    "gathering:2",
    "tasks_out:1",
    "tasks_out:3",
    "mid_download:7",
    "mid_download:20",
    "mid_upload:2",
    "before_journal:1",
    "before_journal:4",
    "before_reply:3",
    "before_reply:4",  # the last update of round 2
    "mid_aggregation:1",  # the first call writes the initial adapter, before this process' life
    "before_aggregated:2",
    "before_publish:2",
    "mid_export:2",
    "before_closed:1",
    "before_closed:3",
    "after_closed:2",
]


def test_every_moment_of_the_coordinator_is_tried() -> None:
    assert {name.partition(":")[0] for name in SERVER_FAULTS} == {
        fault.value for fault in Fault if fault.of_server
    }


@pytest.mark.parametrize("fault", SERVER_FAULTS)
def test_a_coordinator_killed_at_any_moment_goes_on_and_ends_with_the_same_bits(
    bed: Bed, prepared: Prepared, fault: str
) -> None:
    doomed = bed.server(fault)
    agents = [bed.agent("one"), bed.agent("two")]
    assert killed(doomed), doomed.output()
    server = bed.server()
    assert [server.wait(), *(agent.wait() for agent in agents)] == [0, 0, 0], server.output()
    check(bed.state_dir, prepared.config, num_rounds=NUM_ROUNDS)
    assert_equal_bits(bed.adapter(), prepared.adapter)


AGENT_FAULTS = [
    "task_received:1",
    "agent_mid_download:9",
    "training:1",
    "after_training:2",
    "before_push:1",
    "agent_mid_upload:2",
    "after_push:1",
    "after_push:3",
]


def test_every_moment_of_an_agent_is_tried() -> None:
    assert {name.partition(":")[0] for name in AGENT_FAULTS} == {
        fault.value for fault in Fault if fault.kills and not fault.of_server
    }


@pytest.mark.parametrize("fault", AGENT_FAULTS)
def test_an_agent_killed_at_any_moment_returns_and_the_run_ends_with_the_same_bits(
    bed: Bed, prepared: Prepared, fault: str
) -> None:
    server = bed.server()
    doomed, other = bed.agent("one", fault), bed.agent("two")
    assert killed(doomed), doomed.output()
    again = bed.agent("one")
    assert [server.wait(), again.wait(), other.wait()] == [0, 0, 0], server.output()
    journal = check(bed.state_dir, prepared.config, num_rounds=NUM_ROUNDS)
    assert all(sorted(entry.stored) == ["one", "two"] for entry in journal.values())
    assert_equal_bits(bed.adapter(), prepared.adapter)


@pytest.mark.parametrize("fault", ["before_push:1", "agent_mid_upload:2"])
def test_what_was_trained_before_an_agent_was_killed_is_sent_and_not_trained_again(
    bed: Bed, fault: str
) -> None:
    bed.server()
    doomed, _ = bed.agent("one", fault), bed.agent("two")
    assert killed(doomed)
    again = bed.agent("one")
    again.wait_for("this task was trained before the agent ended")


@pytest.mark.parametrize("fault", ["push_twice", "corrupt_chunk:1", "wrong_hash:1", "truncated:1"])
def test_an_agent_that_misbehaves_once_changes_nothing_but_its_own_update(
    bed: Bed, prepared: Prepared, fault: str
) -> None:
    server = bed.server()
    bad, good = bed.agent("one", fault), bed.agent("two")
    assert [server.wait(), bad.wait(), good.wait()] == [0, 0, 0], server.output()
    journal = check(bed.state_dir, prepared.config, num_rounds=NUM_ROUNDS)
    if fault in ("push_twice", "corrupt_chunk:1"):  # mended on the way
        assert_equal_bits(bed.adapter(), prepared.adapter)
    else:
        assert [sorted(entry.stored) for entry in journal.values()] == [
            ["two"],
            ["one", "two"],
            ["one", "two"],
        ]


def test_a_second_coordinator_on_the_same_state_is_refused(bed: Bed) -> None:
    server = bed.server()
    second = bed.server(wait=False)
    assert second.wait() == 1
    assert "another fedpruner-server is using" in second.output()
    assert server.process.poll() is None


def test_a_second_agent_on_the_same_state_is_refused(bed: Bed) -> None:
    bed.server()
    first = bed.agent("one")
    first.wait_for("joined")
    second = bed.agent("one")
    assert second.wait() == 1
    assert "another fedpruner-agent is using" in second.output()
    assert os.path.exists(f"/proc/{first.pid}")
