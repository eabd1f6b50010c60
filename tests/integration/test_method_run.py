"""The method's options in runs with real processes: what they move, and what they survive."""

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from federation import (
    ALL,
    MARGIN,
    WAIT_S,
    Federation,
    Row,
    Start,
    assert_equal_bits,
    at_address,
    budgets,
    wait_for_all,
)
from programs import NUM_LAYERS, address_of, server_config

# Batch and sequence large enough that half a layer is more than the floor's own variation.
_TRAINING = {"per_device_train_batch_size": 16, "max_seq_length": 256}
# Two whole layers and one bridge, not three.
_NUM_LAYERS_SMALL = 2.6


def _until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_survey_begins_anew_after_a_restart_and_goes_on_without_a_device_that_died(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        plan={"statistics": "cohort", "statistics_every": 1},
        run={"num_rounds": 2, "lease_s": 8},
        data={"num_calibration_sequences": 40},
    )
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    address = address_of(server)
    doomed = federation.agent(address, "doomed", texts["counting-train"], budget=ALL)
    steady = federation.agent(address, "steady", texts["letters-train"], budget=ALL)
    server.wait_for("round 1: measuring the layers (cohort)", WAIT_S)
    server.kill()
    assert "task" not in server.output()
    server = federation.server(at_address(config, address))
    server.wait_for("round 1: measuring the layers (cohort)", WAIT_S)
    server.wait_for("layers measured client=doomed", WAIT_S)
    server.wait_for("layers measured client=steady", WAIT_S)

    # Counted before round 1 ends: the next survey may begin as soon as the last update is in.
    num_asked = doomed.output().count("measuring the layers")
    doomed.wait_for("update sent", WAIT_S)
    _until(lambda: doomed.output().count("measuring the layers") > num_asked, "no second survey")
    doomed.kill()
    wait_for_all(server, steady)
    # Killed while it measured, or just after it answered.
    assert server.output().count("layers measured client=doomed") in (1, 2)
    assert server.output().count("layers measured client=steady") == 2
    outcomes = {(r["round"], r["client_id"]): r["outcome"] for r in federation.rows("client")}
    assert outcomes == {
        (1, "doomed"): "stored",
        (1, "steady"): "stored",
        (2, "doomed"): "lost",
        (2, "steady"): "stored",
    }


def test_bridges_travel_once_a_round_and_outlive_a_killed_server(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        training=_TRAINING,
        plan={"bridge": "lowrank", "bridge_rank": 4, "correction": False},
        run={"lease_s": 60},
    )
    small = budgets(config, tmp_path, small=_NUM_LAYERS_SMALL)["small"]
    data = {"one": texts["counting-train"], "two": texts["letters-train"]}

    def bridges(federation: Federation) -> dict[str, bytes]:
        """Content of every bridge file that the journal names, by hash, as a device has it."""
        with closing(sqlite3.connect(federation.state_dir / "journal.sqlite")) as database:
            rows = database.execute("SELECT data FROM events WHERE type = 'CohortChosen'")
            plans = [p for (d,) in rows for p in json.loads(d)["extra"]["plans"].values()]
        # The coordinator keeps none when the round is over.
        assert not (federation.state_dir / "bridges").exists()
        hashes = {plan["bridge_file"]["hash"] for plan in plans}
        cache = federation.folder / "one" / "cache"
        return {name: (cache / name[:2] / name).read_bytes() for name in hashes}

    def cached(federation: Federation, state: str) -> set[str]:
        return {path.name for path in (federation.folder / state / "cache").glob("??/*")}

    whole = Federation(start, tmp_path / "whole")
    server = whole.server(config)
    address = address_of(server)
    wait_for_all(server, *(whole.agent(address, n, data[n], budget=small) for n in data))
    made = bridges(whole)
    # Both devices hold the first and the last layer: one file a round, and both of them have it.
    assert len(made) == 3
    assert all(blake3(content).hexdigest() == name for name, content in made.items())
    assert made.keys() <= cached(whole, "one")
    assert made.keys() <= cached(whole, "two")
    (size,) = {len(content) for content in made.values()}
    rows = whole.rows("client")
    assert {tuple(r["components"]) for r in rows} == {
        ("0.attention", "0.ffn", "3.attention", "3.ffn")
    }
    assert [r["base_bytes_down"] for r in rows if r["round"] > 1] == [size] * 4

    killed = Federation(start, tmp_path / "killed")
    server = killed.server(config)
    address = address_of(server)
    agents = {n: killed.agent(address, n, data[n], budget=small) for n in data}
    server.wait_for("round 2 of 3", WAIT_S)
    agents["two"].kill()
    server.kill()
    server = killed.server(at_address(config, address))
    # With an empty cache it needs the file of a round that another process opened.
    agents["two"] = killed.agent(address, "two", data["two"], budget=small, state="empty")
    wait_for_all(server, *agents.values())
    assert "round=2" in agents["two"].output()
    assert bridges(killed) == made
    assert len(cached(killed, "empty") & made.keys()) == 2
    assert [r["outcome"] for r in killed.rows("client")] == ["stored"] * 6
    assert_equal_bits(whole.adapter(), killed.adapter())


def test_a_device_too_small_for_the_model_trains_all_layers_when_it_may_stream_them(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        training=_TRAINING,
        plan={"streaming": True},
        run={"num_rounds": 2, "min_available_clients": 1},
    )
    budget_of = budgets(config, tmp_path, small=_NUM_LAYERS_SMALL, full=NUM_LAYERS)
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    agent = federation.agent(
        address_of(server), "device", texts["counting-train"], budget=budget_of["small"]
    )
    wait_for_all(server, agent)
    for row in federation.rows("client"):
        assert len(row["components"]) == 2 * NUM_LAYERS
        assert row["streamed"]
        assert row["measured_peak_bytes"] <= budget_of["small"]
        assert row["measured_peak_bytes"] < budget_of["full"] * (1 - MARGIN)
    _assert_all_changed(federation.adapter_after(0), federation.adapter_after(2))


def test_rolora_moves_one_factor_a_round_and_leaves_the_other_bit_for_bit(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    federation, _ = _run_alone(
        start, tmp_path, small_model, texts, aggregation={"method": "rolora"}
    )
    adapters = [federation.adapter_after(number) for number in range(4)]
    # B first, since A gets no gradient from a B of zero; then odd rounds are A's.
    for number, moved, still in ((1, "B", "A"), (2, "B", "A"), (3, "A", "B")):
        before, after = adapters[number - 1], adapters[number]
        assert_equal_bits(_factor(before, still), _factor(after, still))
        _assert_all_changed(_factor(before, moved), _factor(after, moved))


def test_a_method_with_unequal_ranks_is_refused_by_a_real_run(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    config = server_config(
        tmp_path / "server.toml", small_model, texts, aggregation={"method": "hetlora"}
    )
    server = Federation(start, tmp_path).server(config)
    assert server.wait() == 1
    message = "aggregation.method = 'hetlora' gives every device another LoRA rank, which only"
    assert message in server.output()
    assert "Traceback" not in server.output()


def test_layers_are_measured_again_after_a_round_that_brought_nothing(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    own = tmp_path / "own.jsonl"
    good = texts["counting-train"].read_text()
    own.write_text(good)
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        plan={"statistics_every": 1},
        run={"num_rounds": 4, "min_available_clients": 1},
    )
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    agent = federation.agent(address_of(server), "device", own, budget=ALL)
    agent.wait_for("update sent", WAIT_S)
    own.write_text("not JSON\n")
    agent.wait_for("task failed", WAIT_S)
    own.write_text(good)
    wait_for_all(server, agent)
    assert [r["phase"] for r in federation.rows("round")] == ["done", "abandoned", "done", "done"]


def _run_alone(
    start: Start, tmp_path: Path, model: Path, texts: dict[str, Path], **tables: Any
) -> tuple[Federation, list[Row]]:
    """A run of three rounds with one device that holds everything."""
    config = server_config(
        tmp_path / "server.toml", model, texts, run={"min_available_clients": 1}, **tables
    )
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    agent = federation.agent(address_of(server), "device", texts["counting-train"], budget=ALL)
    wait_for_all(server, agent)
    return federation, federation.rows("client")


def _factor(adapter: dict[str, np.ndarray], factor: str) -> dict[str, np.ndarray]:
    found = {k: v for k, v in adapter.items() if f"lora_{factor}" in k}
    assert len(found) == NUM_LAYERS * 7
    return found


def _assert_all_changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert np.abs(values - after[name]).max() > 0, name
