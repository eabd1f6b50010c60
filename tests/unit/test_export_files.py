import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy_model import toy_spec

from fedpruner_common.errors import ConfigError
from fedpruner_server.config import LoraOptions
from fedpruner_server.core.aggregation import ServerState
from fedpruner_server.export import (
    AdapterFile,
    export_peft,
    export_run,
    read_adapter,
    read_state,
    write_adapter,
    write_state,
)

ADAPTER = {
    "0.attention.proj.lora_A": np.arange(8, dtype=np.float32).reshape(2, 4),
    "0.attention.proj.lora_B": np.ones((6, 2), dtype=np.float32),
}


def test_an_adapter_reads_back_as_it_was_written_and_is_spelled_as_peft_does(tmp_path):
    path = tmp_path / "deep" / "round-0001.safetensors"
    write_adapter(ADAPTER, path)
    again = read_adapter(path)
    assert again.keys() == ADAPTER.keys()
    for name, values in ADAPTER.items():
        np.testing.assert_array_equal(again[name], values, strict=True)
    assert "base_model.model.0.attention.proj.lora_A.weight" in load_file(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written


def export(tmp_path, name="final"):
    adapter = tmp_path / "round.safetensors"
    write_adapter(ADAPTER, adapter)
    output = tmp_path / "state" / "peft" / name
    lora = LoraOptions(r=2, lora_alpha=5)
    export_peft(adapter, output, spec=toy_spec(2), lora=lora, model=Path("base"))
    return output


def test_an_export_names_every_module_in_full(tmp_path):
    config = json.loads((export(tmp_path) / "adapter_config.json").read_text())
    expected = ["0.attention.proj", "0.ffn.proj", "1.attention.proj", "1.ffn.proj"]
    assert config["target_modules"] == expected
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 5, "base")


def test_an_export_replaces_the_one_before(tmp_path):
    output = export(tmp_path)
    (output / "stale").write_text("")
    export(tmp_path)
    assert {p.name for p in output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert [p.name for p in output.parent.iterdir()] == ["final"]


def test_the_final_adapter_of_a_run_is_preferred_to_the_latest(tmp_path):
    (export(tmp_path, "latest") / "mark").write_text("latest")
    (export(tmp_path, "final") / "mark").write_text("final")
    export_run(tmp_path / "state", tmp_path / "out", merged=False, model=None)
    assert (tmp_path / "out" / "mark").read_text() == "final"


def test_a_run_without_an_adapter_and_an_output_that_is_taken_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="no adapter"):
        export_run(tmp_path / "state", tmp_path / "out", merged=False, model=None)
    export(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        export_run(tmp_path / "state", tmp_path / "out", merged=False, model=None)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_adapter_file_is_the_adapter_by_canonical_name(tmp_path):
    path = tmp_path / "update.safetensors"
    write_adapter(ADAPTER, path)
    found = AdapterFile(path)
    assert len(found) == 2
    assert found.keys() == ADAPTER.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, ADAPTER[name], strict=True)
    assert "0.attention.proj.lora_C" not in found
    with pytest.raises(KeyError):
        found["base_model.model.0.attention.proj.lora_A.weight"]


def test_an_adapter_file_reads_a_tensor_when_it_is_asked_for(tmp_path):
    path = tmp_path / "update.safetensors"
    write_adapter(ADAPTER, path)
    found = AdapterFile(path)
    name = "0.attention.proj.lora_B"
    assert found[name].sum() == 12.0
    write_adapter({**ADAPTER, name: ADAPTER[name] * 3}, path)
    assert found[name].sum() == 36.0  # nothing of it was kept


def test_a_state_reads_back_as_it_was_written(tmp_path):
    state = ServerState(
        residuals={"0.q": (np.arange(6.0).reshape(3, 2), np.arange(8.0).reshape(2, 4) / 3)},
        first_moments={"0.q.lora_A": np.full((2, 4), 0.1)},
        second_moments={"0.q.lora_B": np.full((3, 2), 1e-9)},
    )
    path = tmp_path / "deep" / "state-0001.safetensors"
    write_state(state, path)
    again = read_state(path)
    assert again.residuals.keys() == {"0.q"}
    for found, expected in zip(again.residuals["0.q"], state.residuals["0.q"], strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
    for found, expected in (
        (again.first_moments, state.first_moments),
        (again.second_moments, state.second_moments),
    ):
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], strict=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written


def test_an_empty_state_reads_back_and_where_there_is_no_file_there_is_one(tmp_path):
    path = tmp_path / "state-0001.safetensors"
    assert read_state(path) == ServerState()
    assert not path.exists()
    write_state(ServerState(), path)
    assert path.exists()
    assert read_state(path) == ServerState()
