"""Bridged submodels against the full model: exact when corrected, closer than pruned when not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from streaming_support import mapped, resident, with_adapter
from torch_support import (
    ARCHITECTURES,
    ATTENTION,
    BOTH,
    CPU,
    FFN,
    PAD,
    Architecture,
    TinyModel,
    difference,
    logits,
    module_at,
    random_ids,
    submodel_without,
)

from fedpruner_common.components import Kind
from fedpruner_common.modeling.bridges import Bridge, Moments
from fedpruner_common.modeling.fitting import Tensors, bridge_runs, install_bridges
from fedpruner_common.modeling.streaming import streaming
from fedpruner_common.modeling.stubs import skipping
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind

ONLY_ATTENTION, ONLY_FFN = frozenset({ATTENTION}), frozenset({FFN})
PLANS: dict[str, dict[int, frozenset[Kind]]] = {
    "whole layers": {1: BOTH, 3: BOTH},
    "mixed halves": {0: ONLY_FFN, 1: ONLY_ATTENTION, 2: BOTH, 3: ONLY_ATTENTION, 4: ONLY_FFN},
    "attention of layer 0": {0: ONLY_ATTENTION, 2: ONLY_FFN, 3: BOTH},
    "the first and the last": {0: BOTH, 1: BOTH, 4: BOTH},
}
KINDS = list(BridgeKind)
Fit = tuple[list[Tensors], list[torch.Tensor]]


@pytest.fixture(params=list(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, zoo: Callable[[str], TinyModel]) -> TinyModel:
    return zoo(request.param)


def adapted(tiny: TinyModel) -> Any:
    """A fresh full model with a random adapter in place."""
    return resident(tiny, adapter=True).get_base_model().eval()


def fit(
    model: Any,
    tiny: TinyModel,
    submodel: Submodel,
    ids: torch.Tensor,
    *,
    kind: BridgeKind = BridgeKind.FULL,
    corrected: bool = True,
    rows: int = 2,
    given: list[Tensors] | None = None,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> Fit:
    shape = (*ids.shape, model.get_input_embeddings().weight.shape[1])
    states = [torch.empty(shape, dtype=dtype) for _ in submodel.dropped_runs()]
    bridges = bridge_runs(
        model, tiny.skeleton.anatomy, submodel, ids, kind=kind, rank=4, given=given,
        states=states, corrected=corrected, rows=rows, **arguments,
    )  # fmt: skip
    return bridges, states


@contextmanager
def bridged(
    model: Any, tiny: TinyModel, submodel: Submodel, fitted: Fit, *, corrected: bool = True
) -> Iterator[list[Bridge]]:
    """The submodel with its bridges for the length of a `with` block, on the model's weights."""
    anatomy = tiny.skeleton.anatomy
    with skipping(model, anatomy, submodel.skipped()):
        installed = install_bridges(model, anatomy, submodel, fitted[0])
        for bridge, missed in zip(installed, fitted[1], strict=True):
            bridge.offset = missed if corrected else None
        yield installed


def pruned_logits(model: Any, tiny: TinyModel, submodel: Submodel, ids: torch.Tensor) -> Any:
    with skipping(model, tiny.skeleton.anatomy, submodel.skipped()):
        return logits(model, ids)


# Corrected bridges: the submodel's function is the full model's


@pytest.mark.parametrize("plan", PLANS)
def test_with_corrections_the_submodels_logits_are_the_full_models(
    tiny: TinyModel, plan: str
) -> None:
    model, submodel, ids = adapted(tiny), submodel_without(5, PLANS[plan]), random_ids(5, 12)
    expected = logits(model, ids)
    assert difference(logits(tiny.reference, ids), expected) > 1e-3  # the adapter does something
    for kind in KINDS if plan == "mixed halves" else (BridgeKind.LOWRANK,):
        fitted = fit(model, tiny, submodel, ids, kind=kind)
        with bridged(model, tiny, submodel, fitted):
            assert difference(logits(model, ids), expected) < 1e-5
    assert difference(pruned_logits(model, tiny, submodel, ids), expected) > 1e-2


def test_as_many_sequences_as_tokens_are_no_trap(tiny: TinyModel) -> None:
    """A mask of (tokens, tokens) must not be taken for one of (sequences, tokens)."""
    model, submodel = adapted(tiny), submodel_without(5, PLANS["mixed halves"])
    ids = random_ids(7, 7)
    fitted = fit(model, tiny, submodel, ids, rows=3)
    expected = logits(model, ids)
    with bridged(model, tiny, submodel, fitted):
        assert difference(logits(model, ids), expected) < 1e-5


def test_every_kind_of_bridge_is_where_the_model_computes(llama: TinyModel) -> None:
    submodel = submodel_without(5, PLANS["whole layers"])
    model = llama.build(submodel).to("meta")  # stands for a GPU
    given: list[Tensors] = [{"scale": torch.ones(1)}, {}]
    installed = install_bridges(model, llama.skeleton.anatomy, submodel, given)
    assert [b.device.type for bridge in installed for b in bridge.buffers()] == ["meta", "meta"]


def test_corrections_of_padded_sequences_hold_for_their_real_tokens(tiny: TinyModel) -> None:
    model, submodel = adapted(tiny), submodel_without(5, PLANS["mixed halves"])
    lengths = (12, 9, 7, 4)
    ids = random_ids(4, 12)
    for row, length in enumerate(lengths):
        ids[row, length:] = PAD
    bridges, states = fit(model, tiny, submodel, ids)
    alone = [logits(model, ids[row : row + 1, :n]) for row, n in enumerate(lengths)]
    # The last two as a batch of their own, no wider than its longest sequence.
    part = [missed[2:, :7] for missed in states]
    with bridged(model, tiny, submodel, (bridges, part)):
        batch = logits(model, ids[2:, :7])
    assert difference(batch[0], alone[2][0]) < 1e-5
    assert difference(batch[1, :4], alone[3][0]) < 1e-5
    # Negative control: each other's corrections are wrong.
    with bridged(model, tiny, submodel, (bridges, [missed.flip(0) for missed in part])):
        assert difference(logits(model, ids[2:, :7])[0], alone[2][0]) > 1e-2


def test_corrections_hold_where_a_layer_scales_what_its_blocks_add(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = transformers.GraniteConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        residual_multiplier=0.22,
    )  # fmt: skip
    tiny = TinyModel(
        tmp_path_factory.mktemp("granite"), Architecture(config, "model.layers", "self_attn", "mlp")
    )
    model, submodel, ids = (
        adapted(tiny),
        submodel_without(5, PLANS["mixed halves"]),
        random_ids(4, 9),
    )
    expected = logits(model, ids)
    fitted = fit(model, tiny, submodel, ids)
    with bridged(model, tiny, submodel, fitted) as installed:
        gains = [bridge.gain for bridge in installed]
        assert gains == pytest.approx([0.22, 0.22, 1.0, 0.22, 0.22])
        assert difference(logits(model, ids), expected) < 1e-5


def test_one_kept_component_is_enough_for_corrections(llama: TinyModel) -> None:
    model, ids = adapted(llama), random_ids(4, 9)
    expected = logits(model, ids)
    for kept in range(10):
        skipped = {
            layer: frozenset(kind for kind in Kind if kept != 2 * layer + (kind is FFN))
            for layer in range(5)
        }
        submodel = submodel_without(5, skipped)
        with bridged(model, llama, submodel, fit(model, llama, submodel, ids)):
            assert difference(logits(model, ids), expected) < 1e-5


# What the two sweeps leave behind


def test_states_without_correction_are_the_full_models_behind_each_run(llama: TinyModel) -> None:
    model, ids = adapted(llama), random_ids(4, 9)
    submodel = submodel_without(5, {1: BOTH, 2: BOTH, 4: BOTH})
    seen: dict[int, torch.Tensor] = {}
    for index in (2, 4):
        module_at(model, f"model.layers.{index}").register_forward_hook(
            lambda _m, _a, output, index=index: seen.__setitem__(index, output)
        )
    logits(model, ids)
    _, states = fit(model, llama, submodel, ids, corrected=False, rows=4)
    assert max(difference(states[i], seen[layer]) for i, layer in enumerate((2, 4))) < 1e-6


def test_a_correction_is_what_the_bridge_misses(llama: TinyModel) -> None:
    """By hand for one run: behind - in front - what the bridge adds."""
    model, ids = adapted(llama), random_ids(4, 9)
    submodel = submodel_without(5, {2: BOTH, 3: BOTH})
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    (bridge,), (missed,) = fit(model, llama, submodel, ids)
    moments = Moments(32)
    moments.add(hidden[2], hidden[4] - hidden[2])
    expected = moments.solve(BridgeKind.FULL, rank=0)
    assert difference(bridge["weight"], expected["weight"]) < 1e-5
    added = Bridge(expected)(hidden[2])
    assert difference(missed, hidden[4] - hidden[2] - added) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_rows_that_go_together_changes_nothing(
    llama: TinyModel, kind: BridgeKind
) -> None:
    model, submodel, ids = (
        adapted(llama),
        submodel_without(5, PLANS["mixed halves"]),
        random_ids(9, 8),
    )
    whole = fit(model, llama, submodel, ids, kind=kind, rows=9)
    for rows in (1, 2, 4, 100):
        parts = fit(model, llama, submodel, ids, kind=kind, rows=rows)
        assert max(map(difference, whole[1], parts[1])) < 1e-5
        for a, b in zip(whole[0], parts[0], strict=True):
            assert a.keys() == b.keys()
            if kind is not BridgeKind.LOWRANK:  # whose directions may flip
                assert all(difference(a[name], b[name]) < 1e-5 for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_given_bridges_are_used_as_they_are(llama: TinyModel, kind: BridgeKind) -> None:
    model, submodel, ids = (
        adapted(llama),
        submodel_without(5, PLANS["whole layers"]),
        random_ids(4, 9),
    )
    generator = torch.Generator().manual_seed(3)
    given = [
        {"weight": torch.randn(32, 32, generator=generator) / 50, "bias": torch.full((32,), 0.1)},
        {"scale": torch.tensor([0.7])},
    ]
    bridges, states = fit(model, llama, submodel, ids, kind=kind, given=given)
    assert [sorted(bridge) for bridge in bridges] == [["bias", "weight"], ["scale"]]
    assert torch.equal(bridges[0]["weight"], given[0]["weight"])
    assert bridges[1]["scale"].tolist() == given[1]["scale"].tolist()
    expected = logits(model, ids)
    with bridged(model, llama, submodel, (bridges, states)):
        assert difference(logits(model, ids), expected) < 1e-5


def leftovers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_the_model_is_afterwards_as_it_was(tiny: TinyModel) -> None:
    model, submodel, ids = (
        adapted(tiny),
        submodel_without(5, PLANS["mixed halves"]),
        random_ids(3, 9),
    )
    before, modules = logits(model, ids), dict(model.named_modules())
    fit(model, tiny, submodel, ids)
    after = dict(model.named_modules())
    assert modules.keys() == after.keys()
    assert all(modules[name] is after[name] for name in modules)
    assert leftovers(model) == []
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("fails", ["in the first sweep", "in the second sweep", "in a fit"])
def test_the_model_is_as_it_was_after_an_exception(llama: TinyModel, fails: str) -> None:
    model, submodel, ids = (
        adapted(llama),
        submodel_without(5, PLANS["mixed halves"]),
        random_ids(3, 9),
    )
    before, modules = logits(model, ids), dict(model.named_modules())
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        # The first sweep calls a block three times: three sequences, one at a time.
        if fails == "in the first sweep" or calls > 3:
            raise RuntimeError("on purpose")

    given: list[Tensors] | None = None
    if fails == "in a fit":
        given = [{"weight": torch.ones(3, 3), "bias": torch.ones(3)}] * 5
    else:
        handle = module_at(model, "model.layers.4.self_attn").register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        fit(model, llama, submodel, ids, rows=1, given=given)
    if not given:
        handle.remove()
    assert all(modules[name] is module for name, module in model.named_modules())
    assert leftovers(model) == []
    assert torch.equal(logits(model, ids), before)


def test_a_streamed_model_gives_the_same_bridges_bit_by_bit(llama: TinyModel) -> None:
    submodel, ids = submodel_without(5, PLANS["mixed halves"]), random_ids(4, 9)
    expected = fit(adapted(llama), llama, submodel, ids)
    model, tensors = mapped(llama)
    base = with_adapter(model).get_base_model().eval()

    def streamed() -> Any:
        return streaming(base, range(5), tensors, dtype=torch.float32, device=CPU)

    found = fit(base, llama, submodel, ids, streamed=streamed)
    assert max(map(difference, expected[1], found[1])) == 0.0
    for a, b in zip(expected[0], found[0], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert leftovers(base) == []


def test_bfloat16_models_are_bridged_within_their_precision(llama: TinyModel) -> None:
    model = adapted(llama).to(torch.bfloat16)
    submodel, ids = submodel_without(5, PLANS["mixed halves"]), random_ids(4, 9)
    expected = logits(model, ids)
    fitted = fit(model, llama, submodel, ids, dtype=torch.bfloat16)
    with bridged(model, llama, submodel, fitted):
        error = difference(logits(model, ids), expected)
    assert all(missed.dtype == torch.bfloat16 for missed in fitted[1])
    assert error < 0.02 * expected.abs().max().item()
    assert difference(pruned_logits(model, llama, submodel, ids), expected) > 10 * error


# Bridges without correction


def end_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states behind the last layer, in front of the final norm."""
    found: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    logits(model, ids)
    handle.remove()
    return found[0]


def end_error(model: Any, tiny: TinyModel, submodel: Submodel, fitted: Fit, ids: Any) -> float:
    expected = end_states(model, ids)
    with bridged(model, tiny, submodel, fitted, corrected=False):
        return (end_states(model, ids) - expected).square().mean().item()


@pytest.mark.parametrize("plan", [{2: BOTH}, {1: BOTH, 2: BOTH}, {3: ONLY_FFN, 4: BOTH}])
def test_a_richer_bridge_leaves_a_smaller_error_on_what_it_was_fitted_to(
    llama: TinyModel, plan: dict[int, frozenset[Kind]]
) -> None:
    model, ids = adapted(llama), random_ids(24, 16)
    submodel = submodel_without(5, plan)
    errors = []
    for kind in (BridgeKind.OFF, BridgeKind.SCALE, BridgeKind.LOWRANK, BridgeKind.FULL):
        _, states = fit(model, llama, submodel, ids, kind=kind)
        errors.append(states[-1].square().mean().item())  # right behind the run
        if 4 in plan:  # which is also the end of the model
            fitted = fit(model, llama, submodel, ids, kind=kind, corrected=False)
            error = end_error(model, llama, submodel, fitted, ids)
            assert error == pytest.approx(errors[-1], rel=1e-3)
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.9 * errors[0]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_fitting_in_sequence_beats_fitting_each_run_on_the_full_models_states(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    tiny = zoo(name)
    model, ids = adapted(tiny), random_ids(32, 24)
    submodel = submodel_without(5, {1: BOTH, 3: BOTH, 4: ONLY_FFN})
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    apart: list[Tensors] = []
    for layer in (1, 3):
        moments = Moments(32)
        moments.add(hidden[layer], hidden[layer + 1] - hidden[layer])
        apart.append(moments.solve(BridgeKind.FULL, rank=0))
    # The ffn of layer 4 alone: its input is behind the layer's attention.
    with skipping(model, tiny.skeleton.anatomy, {4: ONLY_FFN}):
        middle = end_states(model, ids)
    moments = Moments(32)
    moments.add(middle, end_states(model, ids) - middle)
    apart.append(moments.solve(BridgeKind.FULL, rank=0))

    in_sequence = fit(model, tiny, submodel, ids, corrected=False)
    _, states = in_sequence
    sequential = end_error(model, tiny, submodel, in_sequence, ids)
    separate = end_error(model, tiny, submodel, (apart, states), ids)
    assert sequential < 0.98 * separate


# What corrections are for: gradients of the full model's function


def lora_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    loss = model(input_ids=ids, labels=ids).loss
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def layer_of(name: str) -> int:
    return int(next(part for part in name.split(".") if part.isdecimal()))


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], layer: int) -> float:
    names = [name for name in a if layer_of(name) == layer]
    x, y = (torch.cat([g[name].flatten() for name in names]) for g in (a, b))
    return torch.cosine_similarity(x, y, dim=0).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_behind_the_last_dropped_run_gradients_are_the_full_models(
    zoo: Callable[[str], TinyModel], name: str, kind: BridgeKind
) -> None:
    tiny = zoo(name)
    model, ids = adapted(tiny), random_ids(6, 12)
    submodel = submodel_without(5, {1: BOTH, 2: BOTH})
    full = lora_gradients(model, ids)
    fitted = fit(model, tiny, submodel, ids, kind=kind)
    with bridged(model, tiny, submodel, fitted):
        corrected = lora_gradients(model, ids)
    with skipping(model, tiny.skeleton.anatomy, submodel.skipped()):
        pruned = lora_gradients(model, ids)
    assert {layer_of(n) for n in corrected} == {0, 3, 4}
    for n in corrected:
        if layer_of(n) > 2:
            scale = full[n].abs().max().item()
            assert difference(corrected[n], full[n]) < 1e-5 * max(1.0, scale)
            assert difference(pruned[n], full[n]) > 1e-3 * scale
    # In front of the run the gradient passes the bridge, which answers only about as the run does.
    assert cosine(corrected, full, 0) < 0.9999
    assert cosine(corrected, full, 0) > cosine(pruned, full, 0)
