"""What must be true of a state directory after a run of light agents, whatever happened in it.

Read from the journal and the adapters alone: every accepted update is in the adapter of its round
once, and nothing else is.
"""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from light_agent import EXAMPLES, moved
from safetensors.numpy import load_file

from fedpruner_common.adapters import from_peft, to_peft
from fedpruner_common.config import load
from fedpruner_common.spec import ModelSpec
from fedpruner_server import method, specs
from fedpruner_server.config import ServerSettings
from fedpruner_server.core import round as rounds
from fedpruner_server.core.aggregation import ClientUpdate, combine
from fedpruner_server.core.round import Outcome, Phase, Round
from fedpruner_server.core.staleness import Rebased, discount

Tensors = dict[str, np.ndarray]


@dataclass
class JournaledRound:
    """One round as the journal has it.

    Attributes:
        round: after its last event.
        plans: client -> components it trains.
        task_rounds, base_rounds: client -> where its task began.
        closed: how often its end is journaled.
        stored: clients whose updates were accepted, in that order.
    """

    round: Round
    plans: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    task_rounds: dict[str, int] = field(default_factory=dict)
    base_rounds: dict[str, int] = field(default_factory=dict)
    closed: int = 0
    stored: list[str] = field(default_factory=list)


def read_journal(state_dir: Path) -> dict[int, JournaledRound]:
    """Every round, by replaying the events."""
    with closing(sqlite3.connect(state_dir / "journal.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = database.execute("SELECT round, type, data FROM events ORDER BY id").fetchall()
    found: dict[int, JournaledRound] = {}
    newest = 0
    for number, kind, text in rows:
        data = json.loads(text)
        assert number in (newest, newest + 1), f"round {number} after round {newest}"
        if kind == "Closed":
            found[number].closed += 1
            continue
        event = getattr(rounds, kind)(**data["event"])
        if kind == "CohortChosen":
            assert number == newest + 1, f"round {number} was opened twice"
            found[number] = _opened(number, event, data["extra"], found)
            newest = number
            continue
        entry = found[number]
        entry.round, _ = rounds.step(entry.round, event)
        if kind == "UpdateStored":
            entry.stored.append(event.client_id)
    return found


def _opened(
    number: int, event: Any, extra: Mapping[str, Any], before: Mapping[int, JournaledRound]
) -> JournaledRound:
    current, _ = rounds.step(Round(number), event)
    done = [n for n, entry in before.items() if entry.round.phase is Phase.DONE]
    new = [number, max(done, default=0)]
    carried = extra.get("carried", {})
    entry = JournaledRound(current)
    for client_id, plan in extra["plans"].items():
        entry.plans[client_id] = specs.plan_from_json(plan).components
        entry.task_rounds[client_id], entry.base_rounds[client_id] = carried.get(client_id, new)
    return entry


def check(state_dir: Path, config: Path, *, num_rounds: int) -> dict[int, JournaledRound]:
    """Every invariant of a run that is over; returns its journal.

    Args:
        state_dir: of the coordinator.
        config: its settings.
        num_rounds: that it had to go through.
    """
    settings, spec = load(ServerSettings, config, {}), _spec(state_dir)
    journal = read_journal(state_dir)
    assert sorted(journal) == list(range(1, num_rounds + 1))
    adapter = _adapter(state_dir, 0)
    bases = {0: adapter}
    for number, entry in journal.items():
        assert entry.closed == 1, f"round {number} was closed {entry.closed} times"
        assert entry.round.phase in (Phase.DONE, Phase.ABANDONED)
        assert len(set(entry.stored)) == len(entry.stored), f"round {number}: an update twice"
        assert set(entry.stored) == set(entry.round.clients(Outcome.STORED))
        if entry.round.phase is Phase.DONE:
            adapter = _expected(entry, bases, settings, spec)
            _assert_same(_adapter(state_dir, number), adapter, f"the adapter of round {number}")
            bases[number] = adapter
    final = load_file(state_dir / "peft/final/adapter_model.safetensors")
    _assert_same(
        {from_peft(key): values for key, values in final.items()}, adapter, "the exported adapter"
    )
    _check_metrics(state_dir, journal)
    assert not list((state_dir / "updates").glob("incoming/*/*")), "a part of an update is left"
    assert not list((state_dir / "updates").glob("round-*")), "an update is left"
    return journal


def _spec(state_dir: Path) -> ModelSpec:
    """What the coordinator found out about its model, which it remembers."""
    with closing(sqlite3.connect(state_dir / "journal.sqlite")) as database:
        query = "SELECT value FROM facts WHERE key LIKE 'describe %'"
        return specs.spec_from_json(json.loads(database.execute(query).fetchone()[0]))


def _expected(
    entry: JournaledRound, bases: Mapping[int, Tensors], settings: ServerSettings, spec: ModelSpec
) -> Tensors:
    """The adapter of a round: exactly the stored updates, each once."""
    current = bases[max(bases)]
    updates = []
    for client_id in entry.stored:
        base = bases[entry.base_rounds[client_id]]
        seed = settings.run.seed * 1_000_003 + entry.task_rounds[client_id]  # as in the task
        names = spec.adapter_shapes(settings.lora.r, entry.plans[client_id])
        values = {
            name: moved(to_peft(name), base[name], client_id=client_id, seed=seed) for name in names
        }
        staleness = sum(number > entry.base_rounds[client_id] for number in bases)
        if staleness:
            weight = discount(staleness, settings.run.staleness_exponent)
            values = dict(Rebased(values, base=base, current=current, weight=weight))
        updates.append(ClientUpdate(client_id, EXAMPLES, values))
    combined = combine(
        current,
        updates,
        settings=method.aggregation_settings(settings),
        round_number=entry.round.number,
    )
    return combined.adapter


def _adapter(state_dir: Path, number: int) -> Tensors:
    tensors = load_file(state_dir / "adapters" / f"round-{number:04d}.safetensors")
    return {from_peft(key): values for key, values in tensors.items()}


def _assert_same(found: Tensors, expected: Tensors, what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, values in expected.items():
        assert found[name].tobytes() == values.tobytes(), f"{what}: {name}"


def _check_metrics(state_dir: Path, journal: Mapping[int, JournaledRound]) -> None:
    """Every round once, in order, with the clients that the journal has."""
    rows = [json.loads(line) for line in (state_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rows if r["type"] == "round"] == sorted(journal)
    clients = [(r["round"], r["client_id"]) for r in rows if r["type"] == "client"]
    assert clients == [(n, c) for n, entry in journal.items() for c in sorted(entry.round.tasks)]
    assert rows[-1]["type"] == "run"
