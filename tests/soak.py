"""A long run in which everything that can go wrong does, at random moments from a seed.

`python -m soak --rounds 200 --seed 1` (with PYTHONPATH=tests) prints what happened; the test suite
runs the same. Real coordinator, real agents (without torch), each behind a proxy of its own. What
must be true at the end is in `invariants`.
"""

import argparse
import collections
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults import Fault
from invariants import check
from programs import Program, address_of
from proxy import Proxy

from fedpruner_server.core.round import Outcome, Phase

NAMES = ("ann", "bob", "cat", "dan")
TESTS = Path(__file__).parent
_LOOK_S = 0.05
# So that most rounds have no fault, and those that have one have it anywhere.
_ROUNDS_APART = (1, 4)
_PAUSE_S = 0.5
_IMPATIENT_S = 8.0
_CRASHES = ("Traceback", "bug in")


@dataclass
class Soak:
    """One run.

    Attributes:
        folder: of everything.
        config: the coordinator's settings.
        state_dir: the coordinator's, prepared.
        num_rounds: of the run.
        seed: of what goes wrong and when.
        limit_s: after so long the run has failed.
        happened: what went wrong, how often.
    """

    folder: Path
    config: Path
    state_dir: Path
    num_rounds: int
    seed: int
    limit_s: float
    happened: collections.Counter[str] = field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._programs: list[Program] = []
        self._agents: dict[str, Program] = {}
        self._proxies: dict[str, Proxy] = {}
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._address = "127.0.0.1:0"
        self._next_round, self._fault_at = 0, time.monotonic()
        self._server = self._start_server("")
        self._faults: list[tuple[int, Callable[[], None]]] = [
            (3, self._kill_server),
            (4, self._server_dies_at_a_moment),
            (1, self._server_hangs),
            (3, self._kill_agent),
            (4, self._agent_fails_at_a_moment),
            (2, self._agent_hangs),
            (2, self._cut),
            (2, self._partition),
            (1, self._stall),
        ]

    def run(self) -> None:
        """Until the run is over; then everything must be as if nothing had happened."""
        try:
            for name in NAMES:
                self._proxies[name] = Proxy(self._address)
                self._start_agent(name)
            ends = time.monotonic() + self.limit_s
            next_fault = time.monotonic() + 1
            while "the run is complete" not in self._server.output():
                assert time.monotonic() < ends, self._story("not over in time")
                self._do_what_is_due()
                self._mind_the_dead()
                if time.monotonic() > next_fault and self._got_on():
                    next_fault = time.monotonic() + self._random.uniform(0, _PAUSE_S)
                    self._something_happens()
                time.sleep(_LOOK_S)
            self._end_in_peace()
            assert self._server.terminate() == 0, self._server.output()
        finally:
            for program in reversed(self._programs):
                program.process.send_signal(signal.SIGCONT)
                program.end()
            for proxy in self._proxies.values():
                proxy.close()
        for program in self._programs:
            output = program.output()
            assert not any(text in output for text in _CRASHES), output
        journal = check(self.state_dir, self.config, num_rounds=self.num_rounds)
        self.happened["rounds done"] = sum(e.round.phase is Phase.DONE for e in journal.values())
        for entry in journal.values():
            for outcome in Outcome:
                self.happened[f"tasks {outcome.value}"] += len(entry.round.clients(outcome))
            late = sum(entry.task_rounds[c] < entry.round.number for c in entry.stored)
            self.happened["late updates counted"] += late

    def _got_on(self) -> bool:
        """Whether some rounds have ended since the last fault, or that has been long ago.

        Faults keep pace with the run: on a slow machine programs take longer to start, and with
        nothing but faults there would be nothing to disturb.
        """
        metrics, now = self.state_dir / "metrics.jsonl", time.monotonic()
        closed = metrics.read_text().count('"type": "round"') if metrics.exists() else 0
        if closed < self._next_round and now < self._fault_at + _IMPATIENT_S:
            return False
        self._next_round, self._fault_at = closed + self._random.randint(*_ROUNDS_APART), now
        return True

    # Programs

    def _start(self, name: str, program: str, *arguments: str, fault: str) -> Program:
        environment = {"FAULT": fault, "CHUNK_BYTES": "4096", "PYTHONPATH": str(TESTS)}
        started = Program(
            self.folder / "logs",
            f"{len(self._programs):04d}-{name}",
            "faults",
            program,
            "run",
            *arguments,
            env=environment,
        )
        self._programs.append(started)
        return started

    def _start_server(self, fault: str) -> Program:
        server = self._start(
            "server",
            "server",
            *("--config", str(self.config)),
            *("--state-dir", str(self.state_dir)),
            *("--listen", self._address),
            fault=fault,
        )
        self._address = address_of(server)
        return server

    def _start_agent(self, name: str, fault: str = "") -> None:
        config = self.folder / "agent.toml"
        config.write_text("keepalive_s = 1.0\ntransfer_idle_s = 3.0\n")
        self._agents[name] = self._start(
            name,
            "agent",
            *("--config", str(config)),
            *("--server", self._proxies[name].address),
            *("--name", name),
            *("--data", "nothing.jsonl"),
            *("--state-dir", str(self.folder / name)),
            *("--memory-budget", "4GiB"),
            *("--max-wait-time", "0.5"),
            fault=fault,
        )

    def _mind_the_dead(self) -> None:
        """Start again what was killed; nothing may have ended in another way."""
        code = self._server.process.poll()
        if code is not None:
            assert code == -signal.SIGKILL, self._story(self._server.output())
            self._server = self._start_server("")
        for name, agent in self._agents.items():
            code = agent.process.poll()
            if code == -signal.SIGKILL:
                self._start_agent(name)
            assert code in (None, 0, -signal.SIGKILL), self._story(agent.output())

    def _end_in_peace(self) -> None:
        """Every device hears that the run is over."""
        for _, undo in self._later:
            undo()
        deadline = time.monotonic() + 60
        while running := [n for n, a in self._agents.items() if a.process.poll() != 0]:
            self._mind_the_dead()
            if time.monotonic() > deadline:
                name = running[0]
                self._agents[name].process.send_signal(signal.SIGUSR1)
                time.sleep(1)
                raise AssertionError(self._story(f"{name} goes on:\n{self._agents[name].output()}"))
            time.sleep(_LOOK_S)

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        due = [undo for when, undo in self._later if when <= now]
        self._later = [(when, undo) for when, undo in self._later if when > now]
        for undo in due:
            undo()

    def _undo(self, after_s: float, undo: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + after_s, undo))

    def _story(self, text: str) -> str:
        return f"{text}\nseed {self.seed}, so far: {dict(self.happened)}\n{self._server.output()}"

    # What goes wrong

    def _something_happens(self) -> None:
        weights = [weight for weight, _ in self._faults]
        (_, fault), *_ = self._random.choices(self._faults, weights)
        self.happened[fault.__name__.strip("_").replace("_", " ")] += 1
        fault()

    def _kill_server(self) -> None:
        self._server.kill()

    def _server_dies_at_a_moment(self) -> None:
        moments = [fault for fault in Fault if fault.of_server]
        moment, count = self._random.choice(moments), self._random.randint(1, 3)
        self.happened[f"moment: {moment.value}"] += 1
        self._server.kill()
        self._server = self._start_server(f"{moment.value}:{count}")

    def _server_hangs(self) -> None:
        server = self._server
        server.process.send_signal(signal.SIGSTOP)
        self._undo(self._random.uniform(0.5, 4), lambda: server.process.send_signal(signal.SIGCONT))

    def _any_agent(self) -> str:
        return self._random.choice(NAMES)

    def _kill_agent(self) -> None:
        self._agents[self._any_agent()].kill()

    def _agent_fails_at_a_moment(self) -> None:
        moments = [fault for fault in Fault if not fault.of_server]
        moment, count = self._random.choice(moments), self._random.randint(1, 2)
        self.happened[f"moment: {moment.value}"] += 1
        name = self._any_agent()
        self._agents[name].kill()
        self._start_agent(name, f"{moment.value}:{count}")

    def _agent_hangs(self) -> None:
        agent = self._agents[self._any_agent()]
        agent.process.send_signal(signal.SIGSTOP)
        self._undo(self._random.uniform(0.5, 5), lambda: agent.process.send_signal(signal.SIGCONT))

    def _cut(self) -> None:
        self._disturb(lambda proxy: proxy.cut())

    def _partition(self) -> None:
        up, down = self._random.choice([(True, False), (False, True), (True, True)])
        self._disturb(lambda proxy: proxy.swallow(up=up, down=down))

    def _stall(self) -> None:
        self._disturb(lambda proxy: proxy.freeze())

    def _disturb(self, how: Callable[[Proxy], None]) -> None:
        proxy = self._proxies[self._any_agent()]
        how(proxy)
        self._undo(self._random.uniform(0.2, 5), proxy.mend)


def prepare(folder: Path, model: Path, text: Path, *, num_rounds: int, late: bool) -> Path:
    """Settings of a run in which faults are felt soon.

    Args:
        folder: to write to.
        model: the base model.
        text: public text.
        num_rounds: of the run.
        late: rounds end with the third update, and late ones count in the next.
    """
    config = folder / "server.toml"
    carrying = 'buffer_size = 3\nlate_updates = "next_round"' if late else ""
    config.write_text(
        f"""
model = "{model}"
listen = "127.0.0.1:0"
stay = true
num_threads = 1
keepalive_s = 1.0
log_level = "info"
[training]
per_device_train_batch_size = 4
max_seq_length = 64
max_steps = 2
[lora]
r = 4
[plan]
statistics_every = 0
statistics_drift = 1e9
[data]
calibration = ["{text}"]
[transfer]
idle_s = 3.0
[run]
num_rounds = {num_rounds}
min_available_clients = 2
lease_s = 3.0
round_deadline_s = 15.0
progress_timeout_s = 10.0
max_abandoned_rounds = 1000
{carrying}
"""
    )
    return config


def main() -> None:
    from fedpruner_client.ctl.demo.run import BASE_MODEL_DIR

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--late", action="store_true", help="late updates count in the next round")
    parser.add_argument("--minutes", type=float, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedpruner-soak-") as name:
        folder = Path(name)
        text = folder / "public.txt"
        text.write_text("What everyone may read, for the layers to be measured on. " * 200)
        config = prepare(
            folder, BASE_MODEL_DIR, text, num_rounds=arguments.rounds, late=arguments.late
        )
        began = time.monotonic()
        soak = Soak(
            folder,
            config,
            folder / "server",
            arguments.rounds,
            arguments.seed,
            60 * arguments.minutes,
        )
        soak.run()
        print(f"{arguments.rounds} rounds in {time.monotonic() - began:.0f} s")
        for what, count in sorted(soak.happened.items()):
            print(f"{count:6d} {what}")


if __name__ == "__main__":
    main()
