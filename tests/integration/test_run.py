"""A whole run with real processes: what it leaves, what it moves, and what it survives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from federation import ALL, Federation, Start, at_address
from programs import NUM_LAYERS, address_of, server_config, when_ready
from safetensors.numpy import load_file

from fedpruner_client.ctl.cli import app
from fedpruner_common.components import ComponentId
from fedpruner_server.blockstore import BlockStore

MIB = 1 << 20


def ask(question: str, address: str) -> dict[str, Any]:
    """What `fedpruner QUESTION --json` prints."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [question, "--server", address, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def small_budget(address: str, floor_bytes: int) -> int:
    """A budget that holds two whole layers and no more."""
    reply = when_ready(address).plan(memory_budget_bytes=0, floor_bytes=floor_bytes)
    two, three = reply.rows[0].predicted_peak_bytes, reply.rows[1].predicted_peak_bytes
    return int((two + three) / 2 / (1 - reply.margin))


def floor_of(address: str) -> int:
    return next(d["floor_bytes"] for d in ask("devices", address)["devices"])


@pytest.mark.parametrize("correction", [True, False])
def test_two_unequal_devices_train_one_model(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path], *, correction: bool
) -> None:
    # Batch and sequence large enough that a layer is more than the floor's own variation.
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        training={"per_device_train_batch_size": 16, "max_seq_length": 256},
        run={"lease_s": 60},
        plan={"correction": correction},
    )
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    address = address_of(server)
    impatient = tmp_path / "agent.toml"
    impatient.write_text('memory_budget = "4GiB"\nidle_s = 0.5\n')
    big = federation.agent(address, "big", texts["counting-train"], config=impatient)
    when_ready(address)
    server.wait_for("waiting for 1 of 2 agents")
    assert ask("status", address)["explanation"] == "waiting for 1 of 2 agents"
    # While the device waits, its training process is gone and the agent itself is small.
    big.wait_for("idle: the training process has ended")
    agent = psutil.Process(big.pid)
    assert not agent.children()
    agent_memory = agent.memory_info().rss
    budget = small_budget(address, floor_of(address))
    small = federation.agent(address, "small", texts["letters-train"], budget=budget)
    server.wait_for("round=1 train_loss")
    assert ask("status", address)["state"] == "running"
    assert {r["round"] for r in ask("rounds", address)["rounds"]} >= {1}
    assert [big.wait(), small.wait(), server.wait()] == [0, 0, 0]

    rows = federation.metrics
    of_big = [r for r in rows if r.get("client_id") == "big"]
    of_small = [r for r in rows if r.get("client_id") == "small"]
    run = rows[-1]
    assert run["type"] == "run"
    assert run["rounds"] == 3
    assert run["loss_final"] < run["loss_base"] - 0.1
    assert all(len(r["components"]) == 2 * NUM_LAYERS for r in of_big)
    # Two protected layers fit, the first and the last.
    assert of_small[0]["components"] == ["0.attention", "0.ffn", "3.attention", "3.ffn"]
    # The process of the agent itself holds neither torch nor numpy.
    assert agent_memory < 60 * MIB
    for row in (*of_big, *of_small):
        assert row["outcome"] == "stored"
        assert row["measured_peak_bytes"] == pytest.approx(row["predicted_peak_bytes"], rel=0.12)
    for row in of_small:
        assert row["measured_peak_bytes"] <= budget
        assert row["measured_peak_bytes"] < min(r["measured_peak_bytes"] for r in of_big)

    # From round 2 on only adapters move.
    assert [r["base_bytes_down"] > 0 for r in of_small] == [True, False, False]
    assert [r["base_bytes_down"] > 0 for r in of_big] == [True, False, False]
    for row in of_small[1:]:
        # r=4; a layer: q 32+32, k 32+16, v 32+16, o 32+32, gate 32+64, up 32+64, down 64+32
        # = 512 rows and columns, 4 bytes each: 8,192 B a layer. Up go the two layers that train;
        # down as well, or the adapter of all four if the device sweeps the full model.
        num_down = 4 if correction else 2
        assert num_down * 8_192 < row["adapter_bytes_down"] < num_down * (8_192 + 3_000)
        assert 16_384 < row["bytes_up"] < 16_384 + 6_000

    # The device never held what it was not sent: all layers only if it sweeps them.
    blocks = BlockStore(small_model, hash_cache=tmp_path / "hashes.json")
    kept = {str(layer) for layer in (range(NUM_LAYERS) if correction else (0, 3))}
    allowed = {
        info.hash
        for name, info in blocks.tensors.items()
        if ".layers." not in name or name.split(".layers.")[1].split(".")[0] in kept
    } | {file.hash for file in blocks.files}
    cached = {path.name for path in (tmp_path / "small/cache").glob("??/*")}
    assert cached == allowed
    assert not list((tmp_path / "small/cache/partial").iterdir())

    # The exported adapter names every layer; what only the big device trained moved there too.
    adapter = load_file(Path(run["adapter_dir"]) / "adapter_model.safetensors")
    assert len(adapter) == NUM_LAYERS * 7 * 2
    for name, values in adapter.items():
        if name.endswith("lora_B.weight"):
            assert np.abs(values).max() > 0, name


def test_a_run_killed_in_the_middle_goes_on_and_ends_with_the_same_adapter(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    def whole_run(folder: Path, *, kill_after: str | None) -> dict[str, np.ndarray]:
        config = server_config(
            tmp_path / "server.toml",
            small_model,
            texts,
            run={"min_available_clients": 1, "num_rounds": 3, "lease_s": 60},
        )
        federation = Federation(start, folder)
        server = federation.server(config)
        address = address_of(server)
        agent = federation.agent(address, "device", texts["counting-train"], budget=ALL)
        if kill_after:
            server.wait_for(kill_after)
            server.kill()
            server = federation.server(at_address(config, address))
        assert [server.wait(), agent.wait()] == [0, 0]
        rows = federation.metrics
        assert [r["round"] for r in rows if r["type"] == "round"] == [1, 2, 3]
        assert rows[-1]["rounds"] == 3
        return load_file(Path(rows[-1]["adapter_dir"]) / "adapter_model.safetensors")

    whole = whole_run(tmp_path / "whole", kill_after=None)
    federation = Federation(start, tmp_path / "whole")
    left = federation.metrics_text
    again = federation.server(tmp_path / "server.toml")
    assert again.wait() == 0
    assert "the run is complete: 3 of 3 rounds" in again.output()
    assert federation.metrics_text == left
    for moment in ("round=1 train_loss", "round 2 of 3: 1 devices train"):
        killed = whole_run(tmp_path / f"killed {moment[:7]}", kill_after=moment)
        assert whole.keys() == killed.keys()
        for name, values in whole.items():
            np.testing.assert_array_equal(values, killed[name])


def test_a_killed_agent_is_noticed_and_the_round_goes_on_without_it(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        training={"max_steps": 40},
        run={"num_rounds": 1, "lease_s": 3},
    )
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    address = address_of(server)
    doomed = federation.agent(address, "doomed", texts["counting-train"], budget=ALL)
    steady = federation.agent(address, "steady", texts["letters-train"], budget=ALL)
    doomed.wait_for("task")
    children = psutil.Process(doomed.pid).children()
    assert children, "the training process should be warm"
    doomed.kill()
    # The training process notices that its parent is gone.
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert [server.wait(), steady.wait()] == [0, 0]
    outcome = {r["client_id"]: r for r in federation.rows("client")}
    assert outcome["doomed"]["outcome"] == "lost"
    assert outcome["doomed"]["reason"] == "no heartbeat"
    assert outcome["steady"]["outcome"] == "stored"


def test_sigterm_ends_agent_and_server_in_order(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        training={"max_steps": 400},
        run={"min_available_clients": 1},
    )
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    address = address_of(server)
    agent = federation.agent(address, "device", texts["counting-train"], budget=ALL)
    agent.wait_for("task")
    children = [child for p in (agent, server) for child in psutil.Process(p.pid).children()]
    assert len(children) == 2
    assert agent.terminate() == 0
    server.wait_for("the agent was stopped")
    assert server.terminate() == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_device_that_is_too_small_is_told_how_much_is_missing(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    config = server_config(
        tmp_path / "server.toml", small_model, texts, run={"min_available_clients": 1}
    )
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    address = address_of(server)
    when_ready(address)
    tiny = federation.agent(address, "tiny", texts["counting-train"], budget="100MiB")
    assert tiny.wait() == 1
    assert "short of the smallest submodel (2 of 4 layers)" in tiny.output()
    server.wait_for("tiny: not enough memory")
    (device,) = ask("devices", address)["devices"]
    assert "short of the smallest submodel" in device["last_failure"]
    # A second coordinator on the same state is refused, the first is unharmed.
    second = federation.server(config)
    assert second.wait() == 1
    assert "another fedpruner-server is using" in second.output()
    assert ask("status", address)["state"] == "waiting"


def test_bad_private_data_fails_the_task_by_name_and_not_the_run(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        plan={"granularity": "component", "selection": "sample"},
        run={"num_rounds": 2},
    )
    federation = Federation(start, tmp_path)
    server = federation.server(config)
    address = address_of(server)
    bad = federation.agent(address, "bad", broken, budget=ALL)
    good = federation.agent(address, "good", texts["letters-train"], budget=ALL)
    assert [server.wait(), good.wait(), bad.wait()] == [0, 0, 0]
    for row in federation.rows("client"):
        if row["client_id"] == "bad":
            assert row["outcome"] == "failed"
            assert "broken.jsonl, line 2: not JSON" in row["reason"]
        else:
            assert row["outcome"] == "stored"
            assert [ComponentId.parse(c) for c in row["components"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "has no *.safetensors weights"),
        ({"run": {"num_round": 3}}, "run.num_round: extra inputs are not permitted"),
        ({"plan": {"protect": [9]}}, "the model has 4 layers"),
        ({"lora": {"target_modules": ["nonsense"]}}, "matches no linear module"),
        ({"data": {"eval": ["missing.jsonl"]}}, "cannot read missing.jsonl"),
    ],
)
def test_a_server_that_cannot_run_says_why_and_exits_with_one(
    start: Start,
    tmp_path: Path,
    small_model: Path,
    texts: dict[str, Path],
    change: dict[str, Any],
    message: str,
) -> None:
    model = Path(change.pop("model", small_model))
    config = server_config(tmp_path / "server.toml", model, texts, **change)
    server = Federation(start, tmp_path).server(config)
    assert server.wait() == 1
    assert message in server.output()
    assert "Traceback" not in server.output()
