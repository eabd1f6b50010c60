"""Local training: the adapter learns, nothing else changes, and the order is reproducible."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from torch_support import (
    CPU,
    PAD,
    TRAINING_SETTINGS,
    R,
    TinyModel,
    components,
    difference,
    random_ids,
)

from fedpruner_client.model import add_adapter, save_update
from fedpruner_client.train import TrainingResult, _Proximal, batches, train
from fedpruner_common.errors import CorruptChunk, FedPrunerError
from fedpruner_common.modeling.data import IGNORED, TokenSequence
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import TrainingSettings
from fedpruner_server.core.aggregation import initial_adapter
from fedpruner_server.export import read_adapter, write_adapter

SETTINGS = TRAINING_SETTINGS
HALVES = Submodel.of(5, components("0.ffn 1.attention 1.ffn 2.attention 4.ffn"))
EQUAL = [TokenSequence.of(row, row) for row in random_ids(12, 16).tolist()]
# Of different lengths, and with loss on the last part only: 14, 12, ... tokens with loss.
UNEQUAL = [
    TokenSequence.of(row[: 16 - n], [IGNORED] * (n + 1) + row[n + 1 : 16 - n])
    for n, row in zip([0, 1, 2, 3, 4, 5] * 2, random_ids(12, 16, seed=2).tolist(), strict=True)
]


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[..., Any]:
    """A fresh submodel with the adapter of the first round."""

    def make(tiny: TinyModel, submodel: Submodel = HALVES) -> Any:
        path = tmp_path / "adapter.safetensors"
        write_adapter(
            initial_adapter(tiny.spec.adapter_shapes(R, submodel.components), seed=7), path
        )
        return add_adapter(tiny.build(submodel), tiny.lora_settings(submodel), path)

    return make


def run(
    model: Any,
    settings: TrainingSettings = SETTINGS,
    sequences: list[TokenSequence] = EQUAL,
    order: str = "device 1",
) -> TrainingResult:
    return train(
        model,
        sequences,
        settings,
        order=order,
        pad_token_id=PAD,
        device=CPU,
        on_step=lambda *_: None,
    )


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """Trainable parameters by name, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_training_lowers_the_loss_and_reports_every_step(
    llama: TinyModel, adapted: Callable[..., Any]
) -> None:
    steps: list[tuple[int, float]] = []
    same = EQUAL[:4]
    result = train(
        adapted(llama), same, replace(SETTINGS, max_steps=8), order="x", pad_token_id=PAD,
        device=CPU, on_step=lambda step, loss: steps.append((step, loss)),
    )  # fmt: skip
    losses = [loss for _, loss in steps]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (result.loss_first, result.loss_last) == (losses[0], losses[-1])
    assert losses[-1] < losses[0] - 0.1
    assert result.num_tokens == 8 * 4 * 15  # the first token of 16 is not predicted


def test_the_first_loss_is_that_of_the_untrained_submodel(
    llama: TinyModel, adapted: Callable[..., Any]
) -> None:
    # B is zero before round 1, so the adapter means nothing yet.
    ids = torch.stack([s.input_ids.long() for s in EQUAL[:4]])
    with torch.no_grad():
        output = llama.built(HALVES)(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(
        output[:, :-1].reshape(-1, output.shape[-1]), ids[:, 1:].reshape(-1)
    )
    result = run(adapted(llama), replace(SETTINGS, max_steps=1), EQUAL[:4])
    assert result.loss_first == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_only_the_adapter_changes(
    zoo: Callable[[str], TinyModel], adapted: Callable[..., Any], name: str
) -> None:
    tiny = zoo(name)
    model = adapted(tiny)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    files = {n: tiny.raw(n).read_bytes() for n in tiny.infos}
    run(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == {n for n in before if "lora_" in n}
    assert {n: tiny.raw(n).read_bytes() for n in tiny.infos} == files


@pytest.mark.parametrize("sequences", [EQUAL, UNEQUAL], ids=["equal lengths", "unequal lengths"])
def test_accumulating_two_batches_of_two_equals_one_batch_of_four(
    llama: TinyModel, adapted: Callable[..., Any], sequences: list[TokenSequence]
) -> None:
    four, two_twice, two = adapted(llama), adapted(llama), adapted(llama)
    # AdamW scales a gradient of rounding errors up to a step of the learning rate: keep it small.
    settings = replace(SETTINGS, learning_rate=1e-3)
    whole = run(four, settings, sequences)
    halves = replace(settings, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    accumulated = run(two_twice, halves, sequences)
    assert largest_difference(adapter_of(four), adapter_of(two_twice)) < 1e-5
    assert accumulated.num_tokens == whole.num_tokens
    assert accumulated.loss_last == pytest.approx(whole.loss_last, rel=1e-5)
    # Negative control: half the data is another update.
    run(two, replace(settings, per_device_train_batch_size=2), sequences)
    assert largest_difference(adapter_of(four), adapter_of(two)) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_gradient_checkpointing_gives_the_same_adapter(
    zoo: Callable[[str], TinyModel], adapted: Callable[..., Any], name: str
) -> None:
    tiny = zoo(name)
    plain, checkpointed = adapted(tiny), adapted(tiny)
    run(plain)
    run(checkpointed, replace(SETTINGS, gradient_checkpointing=True))
    assert largest_difference(adapter_of(plain), adapter_of(checkpointed)) < 1e-6


def test_gradient_checkpointing_saves_memory(llama: TinyModel, adapted: Callable[..., Any]) -> None:
    """Negative control of the test above: checkpointing really is on."""

    def saved_bytes(gradient_checkpointing: bool) -> int:
        model, total = adapted(llama, Submodel.full(5)), 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            settings = replace(SETTINGS, max_steps=1, gradient_checkpointing=gradient_checkpointing)
            run(model, settings)
        return total

    # What is recomputed in the backward pass is hidden from hooks set outside the layer.
    assert saved_bytes(True) < saved_bytes(False) / 2


def test_the_same_order_gives_the_same_update_bit_by_bit(
    llama: TinyModel, adapted: Callable[..., Any]
) -> None:
    first, second, other = adapted(llama), adapted(llama), adapted(llama)
    run(first, order="device 1 of round 3")
    torch.rand(17)  # the global generator is elsewhere now
    run(second, order="device 1 of round 3")
    run(other, order="device 2 of round 3")
    assert largest_difference(adapter_of(first), adapter_of(second)) == 0.0
    assert largest_difference(adapter_of(first), adapter_of(other)) > 1e-4


def test_every_sequence_is_used_once_before_any_is_used_again(
    llama: TinyModel, adapted: Callable[..., Any]
) -> None:
    model = adapted(llama)
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    run(model, replace(SETTINGS, max_steps=6))
    everything = sorted(s.input_ids.tolist() for s in EQUAL)
    assert sorted(seen[:12]) == everything
    assert sorted(seen[12:]) == everything
    assert seen[:12] != seen[12:]


def test_a_batch_larger_than_the_data_repeats_it(
    llama: TinyModel, adapted: Callable[..., Any]
) -> None:
    result = run(adapted(llama), replace(SETTINGS, max_steps=1), EQUAL[:1])
    assert result.num_tokens == 4 * 15


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(
    llama: TinyModel, adapted: Callable[..., Any]
) -> None:
    settings = replace(SETTINGS, learning_rate=1e30, max_steps=5)
    with pytest.raises(FedPrunerError, match=r"loss became (nan|inf).* in step [2-5]"):
        run(adapted(llama), settings)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_is_put_on_and_saved_without_warnings(
    zoo: Callable[[str], TinyModel], adapted: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_update(adapted(zoo(name)), tmp_path / "update.safetensors")
    messages = {str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)}
    assert messages == set()


# FedProx, and training one factor only


def trained_by_hand(model: Any, settings: TrainingSettings) -> dict[str, torch.Tensor]:
    """The same training in few words, FedProx as a term of the loss; one batch of all data."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
    )
    (batch,) = batches(
        EQUAL[:4], replace(settings, max_steps=1), order="device 1", pad_token_id=PAD
    )
    for _ in range(settings.max_steps):
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        if settings.proximal_mu:
            distance = sum((p - s).square().sum() for p, s in zip(parameters, start, strict=True))
            loss = loss + settings.proximal_mu / 2 * distance
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=False)
        optimizer.step()
    return adapter_of(model)


@pytest.mark.parametrize("mu", [0.0, 0.3, 30.0])
def test_proximal_training_adds_half_mu_times_the_squared_distance_to_the_loss(
    llama: TinyModel, adapted: Callable[..., Any], mu: float
) -> None:
    # Every batch is the same four sequences: their order within a batch makes rounding only.
    settings = replace(SETTINGS, proximal_mu=mu, max_steps=4, learning_rate=1e-3)
    model = adapted(llama)
    run(model, settings, EQUAL[:4])
    expected = trained_by_hand(adapted(llama), settings)
    assert largest_difference(adapter_of(model), expected) < 2e-5
    if mu:
        without = adapted(llama)
        run(without, replace(settings, proximal_mu=0.0), EQUAL[:4])
        assert largest_difference(adapter_of(without), expected) > 1e-4


def test_one_proximal_gradient_by_hand(llama: TinyModel, adapted: Callable[..., Any]) -> None:
    model = adapted(llama)
    parameters = [p for p in model.parameters() if p.requires_grad]
    proximal = _Proximal(parameters, 0.5)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
        parameter.data += 3.0
    parameters[0].grad = None  # it took no part
    proximal.add_gradients()
    assert parameters[0].grad is None
    # 2 + 0.5 * 3
    gradients = [p.grad for p in parameters[1:] if p.grad is not None]
    assert len(gradients) == len(parameters) - 1
    assert max(difference(g, torch.full_like(g, 3.5)) for g in gradients) < 1e-6


def test_no_proximal_term_is_training_as_it_was_bit_by_bit(
    llama: TinyModel, adapted: Callable[..., Any]
) -> None:
    model = adapted(llama)
    same = [EQUAL[0]] * 4  # so that batches are the same whatever their order
    settings = replace(SETTINGS, proximal_mu=0.0)
    start = adapter_of(model)
    run(model, settings, same)
    expected = adapted(llama)
    parameters = [p for p in expected.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=0.0, foreach=False
    )
    ids = torch.stack([s.input_ids.long() for s in same])
    for _ in range(settings.max_steps):
        expected(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(adapter_of(model), adapter_of(expected)) == 0.0
    assert largest_difference(adapter_of(model), start) > 1e-3


def test_a_large_mu_keeps_the_adapter_near_its_start(
    llama: TinyModel, adapted: Callable[..., Any]
) -> None:
    def distance(mu: float) -> float:
        model = adapted(llama)
        start = adapter_of(model)
        run(model, replace(SETTINGS, proximal_mu=mu, max_steps=20, learning_rate=1e-3))
        end = adapter_of(model)
        return sum((end[n] - start[n]).square().sum().item() for n in start)

    free = distance(0.0)
    assert distance(1.0) < 0.8 * free
    assert distance(1000.0) < 0.1 * free


@pytest.mark.parametrize(("trained", "frozen"), [("A", "lora_B"), ("B", "lora_A")])
def test_training_one_factor_leaves_the_other_bit_by_bit(
    llama: TinyModel, adapted: Callable[..., Any], tmp_path: Path, trained: str, frozen: str
) -> None:
    model = adapted(llama)
    with torch.no_grad():  # B is zero before round 1, and A would have no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, replace(SETTINGS, train_factor=trained, weight_decay=0.1, max_grad_norm=100.0))
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == {n for n in before if f"lora_{trained}" in n}
    # The update still has both.
    save_update(model, tmp_path / "update.safetensors")
    update = read_adapter(tmp_path / "update.safetensors")
    assert update.keys() == llama.spec.adapter_shapes(R, HALVES.components).keys()
    assert any(name.endswith(frozen) for name in update)


# The adapter on its way in and out


def test_the_adapters_values_arrive_in_the_submodel(llama: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    values = {
        name: torch.full(shape, float(index)).numpy()
        for index, (name, shape) in enumerate(
            llama.spec.adapter_shapes(R, HALVES.components).items()
        )
    }
    write_adapter(values, path)
    model = add_adapter(llama.build(HALVES), llama.lora_settings(HALVES), path)
    arrived = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p.unique().tolist()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert arrived == {name: [float(index)] for index, name in enumerate(values)}


def test_the_adapter_is_where_the_model_computes_even_if_its_layers_rest_elsewhere(
    llama: TinyModel, adapted: Callable[..., Any], tmp_path: Path
) -> None:
    adapted(llama)  # leaves its adapter in the folder
    base = llama.build(HALVES)
    base.get_input_embeddings().to("meta")  # stands for a GPU; streamed layers rest on the CPU
    model = add_adapter(base, llama.lora_settings(HALVES), tmp_path / "adapter.safetensors")
    devices = {n: p.device.type for n, p in model.named_parameters() if "layers" in n}
    assert {device for n, device in devices.items() if "lora_" in n} == {"meta"}
    assert {device for n, device in devices.items() if "lora_" not in n} == {"cpu"}


def test_an_update_is_the_trained_values_under_their_global_names(
    llama: TinyModel, adapted: Callable[..., Any], tmp_path: Path
) -> None:
    model = adapted(llama)
    run(model)
    save_update(model, tmp_path / "update.safetensors")
    update = read_adapter(tmp_path / "update.safetensors")
    assert {n: v.shape for n, v in update.items()} == llama.spec.adapter_shapes(
        R, HALVES.components
    )
    for name, parameter in adapter_of(model).items():
        canonical = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        assert torch.equal(torch.from_numpy(update[canonical]), parameter)


def test_an_update_of_a_bfloat16_submodel_is_float32(
    llama: TinyModel, tmp_path: Path, adapted: Callable[..., Any]
) -> None:
    adapted(llama)  # leaves its adapter in the folder
    model = add_adapter(
        llama.build(HALVES).to(torch.bfloat16),
        llama.lora_settings(HALVES),
        tmp_path / "adapter.safetensors",
    )
    run(model)
    save_update(model, tmp_path / "update.safetensors")
    arrays = load_arrays(tmp_path / "update.safetensors")
    assert {str(values.dtype) for values in arrays.values()} == {"float32"}


@pytest.mark.parametrize("what", ["missing", "superfluous", "renamed", "other rank", "transposed"])
def test_an_adapter_that_does_not_fit_is_a_corrupt_chunk(
    llama: TinyModel, adapted: Callable[..., Any], tmp_path: Path, what: str
) -> None:
    adapted(llama)  # leaves its adapter in the folder
    path = tmp_path / "adapter.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj.lora_A.weight"))
    value = tensors.pop(name)
    if what == "superfluous":
        tensors |= {name: value, name.replace("layers.1", "layers.3"): value.clone()}
        tensors |= {name.replace("layers.", "layers.3"): value.clone()}
    elif what == "renamed":
        tensors[name.replace("down_proj", "dawn_proj")] = value
    elif what == "other rank":
        tensors[name] = value[:2].clone()
    elif what == "transposed":
        tensors[name] = value.T.contiguous()
    save_file(tensors, path)
    with pytest.raises(CorruptChunk):
        add_adapter(llama.build(HALVES), llama.lora_settings(HALVES), path)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_an_adapter_that_cannot_be_read_is_a_corrupt_chunk(
    llama: TinyModel, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "adapter.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorruptChunk, match="cannot be read"):
        add_adapter(llama.build(HALVES), llama.lora_settings(HALVES), path)
