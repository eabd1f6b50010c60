"""What planning learns of a model: names, LoRA targets and bytes."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch_support import (
    CPU,
    Architecture,
    TinyModel,
    components,
    random_ids,
)

from fedpruner_common.components import all_components
from fedpruner_common.errors import ConfigError, ModelError
from fedpruner_common.modeling.load import read_config
from fedpruner_common.submodel import Submodel
from fedpruner_server.config import LoraOptions, TrainingOptions
from fedpruner_server.describe import describe
from fedpruner_server.specs import spec_from_json, spec_to_json


def _named(prefix: str, names: str) -> set[str]:
    return {f"{prefix}.{name}" for name in names.split()}


def test_llamas_checkpoint_is_divided_among_the_components(llama: TinyModel) -> None:
    spec = llama.spec
    assert set(spec.shared_tensors) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    for layer in range(5):
        prefix = f"model.layers.{layer}"
        attention, ffn = components(f"{layer}.attention {layer}.ffn")
        assert set(spec.component_tensors[attention]) == _named(
            prefix,
            "input_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight "
            "self_attn.v_proj.weight self_attn.o_proj.weight",
        )
        assert set(spec.component_tensors[ffn]) == _named(
            prefix,
            "post_attention_layernorm.weight mlp.gate_proj.weight mlp.up_proj.weight "
            "mlp.down_proj.weight",
        )


def test_gpt2s_checkpoint_is_divided_among_the_components(zoo: Callable[[str], TinyModel]) -> None:
    spec = zoo("gpt2").spec
    assert set(spec.shared_tensors) == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }
    for layer in range(5):
        prefix = f"transformer.h.{layer}"
        attention, ffn = components(f"{layer}.attention {layer}.ffn")
        assert set(spec.component_tensors[attention]) == _named(
            prefix,
            "ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight "
            "attn.c_proj.bias",
        )
        assert set(spec.component_tensors[ffn]) == _named(
            prefix,
            "ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias",
        )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_tensor_of_the_checkpoint_belongs_to_exactly_one_part(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    tiny = zoo(name)
    parts = [tiny.spec.shared_tensors, *tiny.spec.component_tensors.values()]
    assert sorted(n for part in parts for n in part) == sorted(tiny.infos)


def test_a_norm_in_front_of_both_halves_is_named_by_both(zoo: Callable[[str], TinyModel]) -> None:
    spec = zoo("phi").spec
    shared_norm = {"model.layers.2.input_layernorm.weight", "model.layers.2.input_layernorm.bias"}
    for component in components("2.attention 2.ffn"):
        assert shared_norm <= set(spec.component_tensors[component])
    assert not shared_norm & set(spec.shared_tensors)


def _features(spec: Any, layer: int) -> dict[str, tuple[int, int]]:
    targets = spec.targets(components(f"{layer}.attention {layer}.ffn"))
    return {target.module: (target.in_features, target.out_features) for target in targets}


def test_lora_targets_of_llama_have_their_in_and_out_features(llama: TinyModel) -> None:
    # hidden 32; 4 heads of 8, 2 key-value heads; ffn 64
    prefix = "model.layers.3"
    assert _features(llama.spec, 3) == {
        f"{prefix}.self_attn.q_proj": (32, 32),
        f"{prefix}.self_attn.k_proj": (32, 16),
        f"{prefix}.self_attn.v_proj": (32, 16),
        f"{prefix}.self_attn.o_proj": (32, 32),
        f"{prefix}.mlp.gate_proj": (32, 64),
        f"{prefix}.mlp.up_proj": (32, 64),
        f"{prefix}.mlp.down_proj": (64, 32),
    }
    assert llama.spec.fan_in_fan_out is False


def test_lora_targets_of_gpt2s_transposed_modules_have_their_in_and_out_features(
    zoo: Callable[[str], TinyModel],
) -> None:
    prefix = "transformer.h.3"
    spec = zoo("gpt2").spec
    assert _features(spec, 3) == {
        f"{prefix}.attn.c_attn": (32, 96),
        f"{prefix}.attn.c_proj": (32, 32),
        f"{prefix}.mlp.c_fc": (32, 128),
        f"{prefix}.mlp.c_proj": (128, 32),
    }
    assert spec.fan_in_fan_out is True
    # r 4: (32 + 96) 4 + (32 + 32) 4 = 768 and (32 + 128) 4 twice = 1280
    attention, ffn = components("3.attention 3.ffn")
    assert (spec.memory.lora_parameters[attention], spec.memory.lora_parameters[ffn]) == (768, 1280)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_adapter_shapes_are_those_peft_makes_on_the_full_model(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    tiny = zoo(name)
    model = peft.get_peft_model(
        tiny.full(),
        peft.LoraConfig(
            r=4,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            fan_in_fan_out=name == "gpt2",
        ),
    )
    expected = {
        key.removeprefix("base_model.model.").removesuffix(".weight"): tuple(value.shape)
        for key, value in peft.get_peft_model_state_dict(model).items()
    }
    assert tiny.spec.adapter_shapes(4) == expected


def test_target_modules_choose_by_the_last_part_of_the_name(llama: TinyModel) -> None:
    spec = llama.describe(LoraOptions(r=4, target_modules=["q_proj", "down_proj"]))
    modules = {t.module for t in spec.targets(all_components(5))}
    assert modules == {f"model.layers.{i}.self_attn.q_proj" for i in range(5)} | {
        f"model.layers.{i}.mlp.down_proj" for i in range(5)
    }


@pytest.mark.parametrize("names", [["c_attn"], ["proj"], ["lm_head"], []])
def test_target_modules_that_match_nothing_are_a_config_error(
    llama: TinyModel, names: list[str]
) -> None:
    with pytest.raises(ConfigError, match="matches no linear module"):
        llama.describe(LoraOptions(target_modules=names))


@pytest.mark.parametrize(
    "lacking",
    [
        "model.layers.4.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_a_model_error(llama: TinyModel, lacking: str) -> None:
    infos = {name: info for name, info in llama.infos.items() if name != lacking}
    with pytest.raises(ModelError, match=f"lacks tensors.*{lacking}"):
        describe(llama.path, infos, lora=LoraOptions(), training=TrainingOptions())


def test_describing_gpt2_warns_of_nothing(zoo: Callable[[str], TinyModel]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zoo("gpt2").describe()
    messages = {str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)}
    assert messages == set()


def test_a_spec_survives_the_way_through_json(llama: TinyModel) -> None:
    spec = spec_from_json(json.loads(json.dumps(spec_to_json(llama.spec))))
    assert spec == llama.spec


@pytest.mark.parametrize(
    ("dtype", "item_bytes", "disk_ratio"), [("auto", 4, 0), ("float32", 4, 0), ("bfloat16", 2, 2)]
)
def test_weight_bytes_are_elements_times_the_size_of_the_training_dtype(
    llama: TinyModel, dtype: str, item_bytes: int, disk_ratio: float
) -> None:
    training = TrainingOptions(per_device_train_batch_size=2, max_seq_length=16, dtype=dtype)
    memory = llama.describe(training=training).memory
    attention, ffn = components("0.attention 0.ffn")
    # norm 32, q and o 32x32, k and v 16x32; norm 32, three of 64x32
    assert memory.weight_bytes[attention] == (32 + 2 * 32 * 32 + 2 * 16 * 32) * item_bytes
    assert memory.weight_bytes[ffn] == (32 + 3 * 64 * 32) * item_bytes
    assert memory.shared_weight_bytes == (2 * 128 * 32 + 32) * item_bytes
    assert memory.disk_ratio == disk_ratio
    assert memory.layer_input_bytes == 2 * 16 * 32 * item_bytes


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=176, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    architecture = Architecture(config, "model.layers", "self_attn", "mlp")
    return TinyModel(tmp_path_factory.mktemp("wide"), architecture)


@contextmanager
def _count_saved(model: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes of all storages saved for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    result: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    result.append(sum(storage.nbytes() for storage in saved.values()))


def _really_saved(tiny: TinyModel, submodel: Submodel, lora: LoraOptions) -> int:
    """Bytes that a forward pass with real weights on the CPU saves in the decoder."""
    model: Any = tiny.build(submodel)
    modules = [target.module for target in tiny.spec.targets(submodel.components)]
    adapted: Any = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r, lora_dropout=lora.lora_dropout, target_modules=modules, task_type="CAUSAL_LM"
        ),
    )
    adapted.enable_input_require_grads()
    adapted.train()
    ids = random_ids(4, 64).to(CPU)
    with _count_saved(adapted) as saved:
        adapted.base_model.model.model(input_ids=ids, use_cache=False)
    return saved[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kept", ["full", "halves"])
def test_predicted_saved_bytes_are_those_of_a_real_forward_pass(
    wide_llama: TinyModel, dropout: float, kept: str
) -> None:
    lora = LoraOptions(r=4, lora_dropout=dropout)
    training = TrainingOptions(per_device_train_batch_size=4, max_seq_length=64)
    memory = wide_llama.describe(lora, training).memory
    submodel = Submodel.full(4)
    if kept == "halves":
        submodel = Submodel.of(4, components("0.ffn 1.attention 1.ffn 3.attention"))
    predicted = memory.shared_saved_bytes + sum(memory.saved_bytes[c] for c in submodel.components)
    assert predicted == pytest.approx(_really_saved(wide_llama, submodel, lora), rel=0.03)


def test_saved_bytes_grow_with_the_tokens(wide_llama: TinyModel) -> None:
    def saved(batch: int, seq_len: int) -> int:
        training = TrainingOptions(per_device_train_batch_size=batch, max_seq_length=seq_len)
        return sum(wide_llama.describe(training=training).memory.saved_bytes.values())

    assert saved(8, 32) == pytest.approx(2 * saved(4, 32), rel=0.02)
    assert saved(4, 64) == pytest.approx(2 * saved(4, 32), rel=0.02)


def test_a_model_folder_without_config_is_a_model_error(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        describe(tmp_path, llama.infos, lora=LoraOptions(), training=TrainingOptions())


def test_submodels_without_a_common_component_share_only_the_shared_tensors(
    llama: TinyModel,
) -> None:
    lower = Submodel.of(5, components("0.attention 1.ffn"))
    upper = Submodel.of(5, components("0.ffn 1.attention"))
    common = set(llama.spec.tensor_names(lower)) & set(llama.spec.tensor_names(upper))
    assert common == set(llama.spec.shared_tensors)


def test_the_base_models_own_dropout_is_off(tmp_path: Path) -> None:
    transformers.GPT2Config(attn_pdrop=0.1, resid_pdrop=0.2, embd_pdrop=0.3).save_pretrained(
        tmp_path
    )
    config = read_config(tmp_path)
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.0, 0.0, 0.0)
    transformers.LlamaConfig(attention_dropout=0.1).save_pretrained(tmp_path)
    assert read_config(tmp_path).attention_dropout == 0.0
