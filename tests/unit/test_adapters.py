import pytest

from fedpruner_common.adapters import LoraTarget, adapter_shapes, from_peft, to_peft

Q = LoraTarget("model.layers.7.self_attn.q_proj", in_features=64, out_features=48)


def test_a_is_rank_by_inputs_and_b_is_outputs_by_rank():
    assert Q.shapes(4) == {
        "model.layers.7.self_attn.q_proj.lora_A": (4, 64),
        "model.layers.7.self_attn.q_proj.lora_B": (48, 4),
    }


def test_the_parameters_of_a_target_are_those_of_its_two_factors():
    assert Q.num_parameters(4) == 448  # 4 * 64 + 48 * 4


def test_adapter_shapes_are_sorted_by_name():
    other = LoraTarget("model.layers.10.mlp.up_proj", in_features=2, out_features=3)
    assert list(adapter_shapes([Q, other], 1)) == [
        "model.layers.10.mlp.up_proj.lora_A",
        "model.layers.10.mlp.up_proj.lora_B",
        "model.layers.7.self_attn.q_proj.lora_A",
        "model.layers.7.self_attn.q_proj.lora_B",
    ]


def test_names_translate_to_pefts_spelling_and_back():
    name = "model.layers.7.self_attn.q_proj.lora_A"
    assert to_peft(name) == "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    assert from_peft(to_peft(name)) == name


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.7.self_attn.q_proj.lora_A.weight",
        "base_model.model.x.lora_A",
        "base_model.model.x.lora_A.default.weight",
        "base_model.model.x.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "",
    ],
)
def test_a_key_that_is_no_lora_weight_in_pefts_spelling_is_refused(key):
    with pytest.raises(ValueError, match="PEFT's spelling"):
        from_peft(key)
