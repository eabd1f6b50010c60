"""What a user takes away works in plain PEFT and means what the server's adapter means."""

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from torch_support import (
    CPU,
    PAD,
    TRAINING_SETTINGS,
    TinyModel,
    components,
    difference,
    logits,
    module_at,
    random_ids,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedpruner_client.model import add_adapter, save_update
from fedpruner_client.train import train
from fedpruner_common.components import all_components
from fedpruner_common.errors import ConfigError
from fedpruner_common.modeling.data import TokenSequence
from fedpruner_common.spec import ModelSpec
from fedpruner_common.submodel import Submodel
from fedpruner_server.config import LoraOptions
from fedpruner_server.core.aggregation import Array, ClientUpdate, aggregate, initial_adapter
from fedpruner_server.export import export_peft, export_run, read_adapter, write_adapter

LORA = LoraOptions(r=4, lora_alpha=8)
SUBMODELS = {
    "lower": Submodel.of(5, components("0.attention 0.ffn 1.attention 1.ffn 2.ffn")),
    "upper": Submodel.of(5, components("0.attention 0.ffn 2.ffn 3.attention 4.ffn")),
}
SETTINGS = replace(TRAINING_SETTINGS, max_steps=4, learning_rate=2e-2)


def client_round(
    tiny: TinyModel, submodel: Submodel, current: Mapping[str, Array], work_dir: Path
) -> dict[str, Array]:
    """What one client sends back: trained for real, through its files."""
    names = tiny.spec.adapter_shapes(LORA.r, submodel.components)
    write_adapter({name: current[name] for name in names}, work_dir / "down.safetensors")
    model = add_adapter(
        tiny.build(submodel), tiny.lora_settings(submodel), work_dir / "down.safetensors"
    )
    data = [TokenSequence.of(row, row) for row in random_ids(8, 16).tolist()]
    train(
        model, data, SETTINGS, order=str(submodel), pad_token_id=PAD, device=CPU,
        on_step=lambda *_: None,
    )  # fmt: skip
    save_update(model, work_dir / "up.safetensors")
    return read_adapter(work_dir / "up.safetensors")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, zoo: Callable[[str], TinyModel]) -> TinyModel:
    return zoo(request.param)


@pytest.fixture(scope="module")
def adapter(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    """The global adapter after a round of two clients with different submodels."""
    current = initial_adapter(tiny.spec.adapter_shapes(LORA.r), seed=3)
    updates = [
        ClientUpdate(name, 10, client_round(tiny, submodel, current, tmp_path_factory.mktemp(name)))
        for name, submodel in SUBMODELS.items()
    ]
    return aggregate(current, updates)


@pytest.fixture
def exported(tiny: TinyModel, adapter: dict[str, Array], tmp_path: Path) -> Path:
    write_adapter(adapter, tmp_path / "adapter.safetensors")
    export(tiny, tiny.spec, tmp_path)
    return tmp_path / "peft"


def export(tiny: TinyModel, spec: ModelSpec, folder: Path) -> None:
    export_peft(
        folder / "adapter.safetensors", folder / "peft", spec=spec, lora=LORA, model=tiny.path
    )


def meant_by(tiny: TinyModel, adapter: Mapping[str, Array]) -> Any:
    """The full model with every pair added to its weight by hand: W + alpha / r B A."""
    model = tiny.full()
    for name in adapter:
        module, _, factor = name.rpartition(".")
        if factor == "lora_A":
            delta = LORA.lora_alpha / LORA.r * (adapter[f"{module}.lora_B"] @ adapter[name])
            weight = module_at(model, module).weight.data
            if tiny.architecture.config.model_type == "gpt2":
                delta = delta.T  # Conv1D stores (in, out)
            weight += torch.from_numpy(delta.copy())
    return model


def lora_modules(model: Any) -> set[str]:
    return {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n}


def test_a_round_of_two_submodels_loads_in_plain_peft_without_a_warning(
    tiny: TinyModel, exported: Path, adapter: dict[str, Array], caplog: pytest.LogCaptureFixture
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.path)
    transformers.logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, str(exported))
    finally:
        transformers.logging.set_verbosity_error()
    ours = [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)]
    assert ours == []
    assert caplog.records == []

    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(loaded) == {f"base_model.model.{name}.weight" for name in adapter}
    for name, values in adapter.items():
        assert np.array_equal(loaded[f"base_model.model.{name}.weight"].numpy(), values)


def test_the_exported_adapter_means_what_the_servers_adapter_means(
    tiny: TinyModel, exported: Path, adapter: dict[str, Array]
) -> None:
    ids = random_ids(2, 12)
    model = PeftModel.from_pretrained(tiny.full(), str(exported)).eval()
    expected = logits(meant_by(tiny, adapter), ids)
    assert difference(logits(model, ids), expected) < 1e-5
    assert difference(logits(tiny.reference, ids), expected) > 1e-2  # it does mean something


def test_components_of_one_client_have_its_values_and_of_both_the_mean(
    tiny: TinyModel, tmp_path: Path
) -> None:
    current = initial_adapter(tiny.spec.adapter_shapes(LORA.r), seed=3)
    lower = client_round(tiny, SUBMODELS["lower"], current, tmp_path)
    upper = client_round(tiny, SUBMODELS["upper"], current, tmp_path)
    merged = aggregate(current, [ClientUpdate("a", 10, lower), ClientUpdate("b", 30, upper)])
    for name in merged:
        if name in lower and name in upper:
            expected = lower[name] * 0.25 + upper[name] * 0.75
            assert np.allclose(merged[name], expected, atol=1e-7)
        else:
            alone = lower.get(name, upper.get(name, current[name]))
            assert np.array_equal(merged[name], alone)
    assert 0 < len(lower.keys() & upper.keys()) < len(lower.keys() | upper.keys()) < len(merged)


def test_more_than_twenty_target_modules_do_not_spread_to_others(
    llama: TinyModel, tmp_path: Path
) -> None:
    # Adapt 24 of the 35 linear modules; every short pattern that catches them catches others.
    chosen = set(components("0.attention 0.ffn 1.attention 2.ffn 3.attention 3.ffn"))
    spec = replace(
        llama.spec,
        lora_targets={c: t if c in chosen else () for c, t in llama.spec.lora_targets.items()},
    )
    modules = {t.module for t in spec.targets(all_components(5))}
    assert len(modules) == 7 + 4 + 3 + 7
    write_adapter(
        initial_adapter(spec.adapter_shapes(LORA.r), seed=0), tmp_path / "adapter.safetensors"
    )
    export(llama, spec, tmp_path)
    model = PeftModel.from_pretrained(llama.full(), str(tmp_path / "peft"))
    assert lora_modules(model) == {f"base_model.model.{m}" for m in modules}


def test_twenty_target_modules_of_an_agent_stay_those(llama: TinyModel, tmp_path: Path) -> None:
    submodel = Submodel.of(5, [c for c in all_components(5) if c.layer != 2])
    lora = llama.lora_settings(submodel)
    modules = lora.target_modules
    assert len(modules) == 28
    shapes = llama.spec.adapter_shapes(LORA.r, submodel.components)
    write_adapter(initial_adapter(shapes, seed=0), tmp_path / "a.safetensors")
    model = add_adapter(llama.build(submodel), lora, tmp_path / "a.safetensors")
    assert lora_modules(model) == {f"base_model.model.{m}" for m in modules}

    # Negative control, and why the server writes names of its own: PEFT's own saving shortens
    # the names to what is unambiguous on the submodel.
    model.save_pretrained(tmp_path / "by peft", save_embedding_layers=False)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        spread = PeftModel.from_pretrained(llama.full(), str(tmp_path / "by peft"))
    assert lora_modules(spread) > lora_modules(model)


def test_exporting_again_replaces_the_folder(tiny: TinyModel, exported: Path) -> None:
    (exported / "stale").write_text("")
    export(tiny, tiny.spec, exported.parent)
    assert sorted(p.name for p in exported.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not exported.with_name("peft.partial").exists()


# export_run


@pytest.fixture
def state_dir(exported: Path, tmp_path: Path) -> Path:
    """A state directory after some rounds."""
    state_dir = tmp_path / "state"
    (state_dir / "peft").mkdir(parents=True)
    exported.rename(state_dir / "peft" / "latest")
    return state_dir


def test_a_merged_export_is_a_plain_model_equal_to_base_plus_adapter(
    tiny: TinyModel, state_dir: Path, adapter: dict[str, Array], tmp_path: Path
) -> None:
    output_dir = tmp_path / "merged"
    export_run(state_dir, output_dir, merged=True, model=None)
    ids = random_ids(2, 12)
    model = AutoModelForCausalLM.from_pretrained(output_dir).eval()
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert difference(logits(model, ids), logits(meant_by(tiny, adapter), ids)) < 1e-5
    assert difference(logits(model, ids), logits(tiny.reference, ids)) > 1e-2
    text = "it works"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (output_dir, tiny.path)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_an_export_that_is_not_merged_is_the_adapters_folder(
    state_dir: Path, tmp_path: Path
) -> None:
    export_run(state_dir, tmp_path / "out", merged=False, model=None)
    source = state_dir / "peft" / "latest"
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir()
    }


def test_the_final_adapter_goes_before_the_latest(state_dir: Path, tmp_path: Path) -> None:
    final = state_dir / "peft" / "final"
    final.mkdir()
    (final / "adapter_config.json").write_text(json.dumps({"final": True}))
    export_run(state_dir, tmp_path / "out", merged=False, model=None)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("merged", [False, True])
def test_an_output_that_is_not_empty_is_refused_and_left_alone(
    state_dir: Path, tmp_path: Path, merged: bool
) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="out is not empty"):
        export_run(state_dir, output_dir, merged=merged, model=None)
    assert [p.name for p in output_dir.iterdir()] == ["thesis.tex"]


def test_an_output_that_is_a_file_is_refused_and_left_alone(
    state_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.write_text("mine")
    with pytest.raises(ConfigError, match="out"):
        export_run(state_dir, output, merged=False, model=None)
    assert output.read_text() == "mine"


def test_a_state_directory_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        export_run(tmp_path, tmp_path / "out", merged=False, model=None)
