"""A submodel computes what the full model computes with the same halves switched off by hand."""

from collections.abc import Callable

import psutil
import pytest
import torch
from torch_support import (
    ARCHITECTURES,
    ATTENTION,
    BOTH,
    CPU,
    FFN,
    TinyModel,
    difference,
    hooked_off,
    logits,
    random_ids,
    submodel_without,
)

from fedpruner_client.model import build_submodel
from fedpruner_common.components import Kind
from fedpruner_common.errors import ModelError
from fedpruner_common.submodel import Submodel

Skipped = dict[int, frozenset[Kind]]
ONLY_ATTENTION, ONLY_FFN = frozenset({ATTENTION}), frozenset({FFN})
PLANS: dict[str, Skipped] = {
    "whole layers": {1: BOTH, 3: BOTH},
    "halves": {1: ONLY_FFN, 2: BOTH, 4: ONLY_ATTENTION},
    "halves of layer 0": {0: ONLY_ATTENTION, 1: ONLY_ATTENTION, 3: ONLY_FFN, 4: BOTH},
}
TOLERANCE = 1e-5


@pytest.fixture(params=list(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, zoo: Callable[[str], TinyModel]) -> TinyModel:
    return zoo(request.param)


@pytest.mark.parametrize("plan", PLANS)
def test_submodel_equals_the_full_model_with_its_halves_hooked_off(
    tiny: TinyModel, plan: str
) -> None:
    ids = random_ids(2, 12)
    skipped = PLANS[plan]
    model = tiny.built(submodel_without(5, skipped))
    with hooked_off(tiny.reference, tiny.architecture, skipped):
        expected = logits(tiny.reference, ids)
    assert difference(logits(model, ids), expected) < TOLERANCE

    # Left padding: one row has five padded positions; their own logits mean nothing.
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with hooked_off(tiny.reference, tiny.architecture, skipped):
        padded = logits(tiny.reference, ids, attention_mask=mask)
    actual = logits(model, ids, attention_mask=mask)
    assert difference(actual[mask.bool()], padded[mask.bool()]) < TOLERANCE

    # The comparison can fail: the mask, and each other plan, change the logits visibly.
    assert difference(padded[0, 5:], expected[0, 5:]) > 1e-3
    for other in (*(p for name, p in PLANS.items() if name != plan), {}):
        with hooked_off(tiny.reference, tiny.architecture, other):
            assert difference(logits(tiny.reference, ids), expected) > 1e-3


def test_the_submodel_of_everything_is_the_full_model(tiny: TinyModel) -> None:
    ids = random_ids(2, 12)
    model = tiny.built(Submodel.full(5))
    assert difference(logits(model, ids), logits(tiny.reference, ids)) < TOLERANCE


def test_a_submodel_without_any_component_is_embedding_norm_and_head(llama: TinyModel) -> None:
    ids = random_ids(2, 12)
    full = llama.reference
    with torch.no_grad():
        expected = full.lm_head(full.model.norm(full.model.embed_tokens(ids)))
    assert difference(logits(llama.built(Submodel.of(5, [])), ids), expected) < TOLERANCE


def test_cached_decoding_is_right_when_layer_0_has_lost_its_attention(tiny: TinyModel) -> None:
    skipped = PLANS["halves of layer 0"]
    model = tiny.built(submodel_without(5, skipped))
    ids = random_ids(1, 12)
    with hooked_off(tiny.reference, tiny.architecture, skipped):
        expected = logits(tiny.reference, ids)
    with torch.no_grad():
        first = model(input_ids=ids[:, :7], use_cache=True)
        rest = model(input_ids=ids[:, 7:], use_cache=True, past_key_values=first.past_key_values)
    actual = torch.cat([first.logits, rest.logits], dim=1)
    assert difference(actual, expected) < 1e-4


def test_generate_with_a_cache_gives_the_tokens_of_greedy_decoding_without_one(
    tiny: TinyModel,
) -> None:
    skipped = PLANS["halves of layer 0"]
    model = tiny.built(submodel_without(5, skipped))
    prompt = random_ids(1, 5)
    model.generation_config.eos_token_id = None
    generated = model.generate(
        prompt, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0
    )

    expected = prompt
    with hooked_off(tiny.reference, tiny.architecture, skipped):
        for _ in range(8):
            token = logits(tiny.reference, expected)[:, -1].argmax(dim=-1, keepdim=True)
            expected = torch.cat([expected, token], dim=1)
    assert generated.tolist() == expected.tolist()


def _files_behind(model: torch.nn.Module) -> dict[str, str]:
    """Parameter -> path of the file its memory maps, empty where it maps none."""
    maps = []
    for region in psutil.Process().memory_maps(grouped=False):
        start, end = (int(number, 16) for number in region.addr.split("-"))
        maps.append((start, end, region.path))
    return {
        name: next(path for start, end, path in maps if start <= parameter.data_ptr() < end)
        for name, parameter in model.named_parameters()
    }


def test_weights_are_the_mapped_files_and_not_copies(llama: TinyModel) -> None:
    submodel = submodel_without(5, PLANS["halves"])
    tensors = llama.local_tensors(llama.spec.tensor_names(submodel))
    model = build_submodel(llama.skeleton, submodel, tensors, dtype="auto", device=CPU).model
    expected = {tensor.info.name: str(tensor.path.resolve()) for tensor in tensors}
    assert _files_behind(model) == expected

    # Negative control: weights of another dtype cannot be mappings.
    model = build_submodel(llama.skeleton, submodel, tensors, dtype="bfloat16", device=CPU).model
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert not set(_files_behind(model).values()) & set(expected.values())


def test_a_submodel_holds_exactly_the_tensors_of_its_components(tiny: TinyModel) -> None:
    submodel = submodel_without(5, PLANS["halves"])
    model = tiny.built(submodel)
    assert [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta] == []
    held = sum(parameter.numel() for parameter in model.parameters())
    names = tiny.spec.tensor_names(submodel)
    in_files = sum(tiny.infos[name].num_bytes // 4 for name in names)
    assert held == in_files  # all float32; a tied head is one parameter
    assert held < sum(parameter.numel() for parameter in tiny.reference.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_missing_tensor_is_a_model_error(zoo: Callable[[str], TinyModel], name: str) -> None:
    tiny = zoo(name)
    submodel = submodel_without(5, PLANS["halves"])
    names = tiny.spec.tensor_names(submodel)
    for missing in (names[0], names[-1], tiny.spec.component_tensors[submodel.last][0]):
        tensors = tiny.local_tensors(tuple(n for n in names if n != missing))
        with pytest.raises(ModelError, match="missing keys"):
            build_submodel(tiny.skeleton, submodel, tensors, dtype="auto", device=CPU)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_superfluous_tensor_is_a_model_error(zoo: Callable[[str], TinyModel], name: str) -> None:
    tiny = zoo(name)
    submodel = submodel_without(5, PLANS["halves"])
    names = set(tiny.spec.tensor_names(submodel))
    dropped = sorted(set(tiny.infos) - names)
    assert dropped
    for superfluous in (dropped[0], dropped[-1]):
        tensors = tiny.local_tensors((*names, superfluous))
        with pytest.raises(ModelError, match="unexpected keys"):
            build_submodel(tiny.skeleton, submodel, tensors, dtype="auto", device=CPU)


def test_a_file_of_the_wrong_length_is_a_model_error(llama: TinyModel) -> None:
    submodel = Submodel.full(5)
    tensors = llama.local_tensors(llama.spec.tensor_names(submodel))
    short = llama.path / "short"
    short.write_bytes(tensors[0].path.read_bytes()[:-1])
    broken = [type(tensors[0])(tensors[0].info, short), *tensors[1:]]
    with pytest.raises(ModelError, match=tensors[0].info.name):
        build_submodel(llama.skeleton, submodel, broken, dtype="auto", device=CPU)


def test_a_task_for_another_number_of_layers_is_a_model_error(llama: TinyModel) -> None:
    tensors = llama.local_tensors(llama.spec.tensor_names(Submodel.full(5)))
    with pytest.raises(ModelError, match="6 layers, the config 5"):
        build_submodel(llama.skeleton, Submodel.full(6), tensors, dtype="auto", device=CPU)
