"""The halves of a layer are found by tracing, and a layout that cannot be proved is refused."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from torch_support import ARCHITECTURES, ATTENTION, FFN

from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.check import check, find_anatomy
from fedpruner_common.modeling.load import read_config
from fedpruner_common.modeling.meta import meta_model


def test_llamas_halves_are_its_blocks_each_with_the_norm_in_front() -> None:
    anatomy = find_anatomy(ARCHITECTURES["llama"].config)
    assert len(anatomy) == 5
    for layer in anatomy:
        attention, ffn = layer.halves[ATTENTION], layer.halves[FFN]
        assert list(attention.core) == ["self_attn"]
        assert (attention.pre, attention.post) == (("input_layernorm",), ())
        assert list(ffn.core) == ["mlp"]
        assert (ffn.pre, ffn.post) == (("post_attention_layernorm",), ())
        assert layer.shared == frozenset()


def test_gemma2s_norms_behind_a_block_belong_to_that_block() -> None:
    layer = find_anatomy(ARCHITECTURES["gemma2"].config)[0]
    attention, ffn = layer.halves[ATTENTION], layer.halves[FFN]
    assert (attention.pre, attention.post) == (("input_layernorm",), ("post_attention_layernorm",))
    assert ffn.pre == ("pre_feedforward_layernorm",)
    assert ffn.post == ("post_feedforward_layernorm",)


def test_the_one_norm_of_phis_parallel_halves_is_shared() -> None:
    layer = find_anatomy(ARCHITECTURES["phi"].config)[0]
    assert layer.shared == {"input_layernorm"}


def test_of_opts_chained_ffn_only_the_last_module_feeds_the_residual_stream() -> None:
    ffn = find_anatomy(ARCHITECTURES["opt"].config)[0].halves[FFN]
    assert list(ffn.core) == ["fc1", "fc2"]
    assert ffn.links == {"fc1"}


def test_tracing_leaves_the_configuration_as_it_was() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    before = copy.deepcopy(config.to_dict())
    find_anatomy(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
            "BloomBlock 0 adds the residual inside a block",
        ),
        (
            transformers.MptConfig(
                vocab_size=64, d_model=16, n_layers=2, n_heads=2, max_seq_len=32
            ),
            # its feed-forward network adds the residual out of the tracer's sight
            "MptBlock 0 without its blocks is not the identity",
        ),
    ],
)
def test_a_residual_added_inside_a_block_is_refused_with_the_reason(
    config: transformers.PreTrainedConfig, why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        find_anatomy(config)


def test_a_model_without_attention_and_ffn_is_refused_with_what_is_missing() -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, intermediate_size=32
    )
    with pytest.raises(ModelError, match="layer 0 has no separate ffn module"):
        find_anatomy(config)


def test_an_anatomy_that_forgets_a_norm_fails_its_proof() -> None:
    config = ARCHITECTURES["gemma2"].config
    anatomy = find_anatomy(config)
    model = meta_model(config)
    check(model, anatomy)  # the right one passes

    right = anatomy[3]
    halves = {**right.halves, FFN: replace(right.halves[FFN], post=())}
    wrong = [*anatomy[:3], replace(right, halves=halves), *anatomy[4:]]
    with pytest.raises(ModelError, match=r"Layer 3 .*post_feedforward_layernorm"):
        check(model, wrong)


@pytest.mark.parametrize(
    "config",
    [
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        transformers.T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2),
    ],
)
def test_what_is_not_a_causal_language_model_is_refused(
    config: transformers.PreTrainedConfig,
) -> None:
    with pytest.raises(ModelError, match=f"'{config.model_type}' is not a causal language model"):
        find_anatomy(config)


def test_a_folder_without_config_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-architecture"}', "[]", "{}"])
def test_a_config_that_cannot_be_used_is_a_model_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)
