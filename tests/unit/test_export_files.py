import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy_model import toy_spec

from fedpruner_common.errors import ConfigError
from fedpruner_server.config import LoraOptions
from fedpruner_server.export import export_peft, export_run, read_adapter, write_adapter

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
