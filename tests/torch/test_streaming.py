"""Streaming against the resident model, and what it does to memory."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streaming_support import mapped, resident, streamed, with_adapter
from torch import nn
from torch_support import ARCHITECTURES, CPU, TinyModel, logits, random_ids

from fedpruner_common.errors import ModelError
from fedpruner_common.modeling import streaming as module
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.streaming import bytes_read, drop_pages, holding, streaming

MIB = 1 << 20


def step(model: Any) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and the random state after one forward and backward from a fixed seed."""
    ids = random_ids(2, 16)
    model.train()
    torch.manual_seed(11)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, torch.get_rng_state()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_loss_gradients_and_random_state_are_exactly_the_resident_models(
    zoo: Callable[[str], TinyModel], name: str, dropout: float
) -> None:
    tiny = zoo(name)
    expected = step(resident(tiny, adapter=True, dropout=dropout))
    with streamed(tiny, adapter=True, dropout=dropout) as model:
        found = step(model)
    assert found[0] == expected[0]
    assert len(expected[1]) >= 5 * 4 * 2  # layers, linear modules, A and B
    assert_equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def test_some_layers_streamed_and_some_resident_is_the_same_model(llama: TinyModel) -> None:
    expected = step(resident(llama, adapter=True))
    model, tensors = mapped(llama)
    model = with_adapter(model)
    with streaming(model, [1, 3], tensors, dtype=torch.float32, device=CPU):
        found = step(model)
    assert_equal(found[1], expected[1])


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_forward_without_gradients_is_exactly_the_resident_models(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    tiny = zoo(name)
    ids = random_ids(2, 12)
    with streamed(tiny, adapter=False) as model:
        assert torch.equal(logits(model.eval(), ids), logits(tiny.reference, ids))


class TupleLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.trained = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor, *, scale: float) -> tuple[Any, ...]:
        hidden = torch.tanh(self.frozen(hidden_states)) + self.trained(hidden_states)
        return scale * hidden, None, "beside"


class TupleModel(nn.Module):
    """Two layers that return tuples and are called by keyword, as some architectures do."""

    def __init__(self) -> None:
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=2)
        self.config = SimpleNamespace(get_text_config=lambda decoder: text)  # noqa: ARG005
        self.layers = nn.ModuleList([TupleLayer(), TupleLayer()])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden, nothing, word = layer(hidden_states=hidden, scale=0.5)
            assert nothing is None
            assert word == "beside"
        return hidden


@pytest.mark.parametrize("into_input", [False, True])
def test_layers_that_return_tuples_keep_what_they_return(into_input: bool) -> None:
    model, x = TupleModel(), torch.randn(3, 4, requires_grad=into_input)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    wanted = [p for p in model.parameters() if p.requires_grad] + [x] * into_input
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    # In memory and not in a file: nothing may be dropped here, and that is not what is tested.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "drop_pages", lambda _: None)
        with streaming(model, [0, 1], frozen, dtype=None, device=CPU):
            found = torch.autograd.grad(model(x).square().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A llama stored in bfloat16."""
    tiny = TinyModel(tmp_path_factory.mktemp("halved"), ARCHITECTURES["llama"])
    tiny.save(tiny.full().bfloat16())
    return tiny


def test_converting_layer_by_layer_equals_converting_the_whole_model(halved: TinyModel) -> None:
    whole: Any = halved.full().float().requires_grad_(False)
    whole = with_adapter(whole)
    expected = step(whole)
    model, tensors = mapped(halved, torch.bfloat16)
    layers = decoder_layers(model)
    within = {id(parameter) for parameter in layers.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in within:
            parameter.data = parameter.data.float()
    model = with_adapter(model)
    adapter = {n: p.detach() for n, p in whole.named_parameters() if "lora_" in n}
    model.load_state_dict(adapter, strict=False)  # drawn in bfloat16, which rounds it
    at_rest = {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters()}
    assert any(dtype is torch.bfloat16 for _, dtype in at_rest.values())
    with streaming(model, range(5), tensors, dtype=torch.float32, device=CPU):
        found = step(model)
    assert found[0] == expected[0]
    assert_equal(found[1], expected[1])
    assert {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters()} == at_rest


def test_weights_that_were_converted_on_loading_are_refused(halved: TinyModel) -> None:
    model, tensors = mapped(halved, torch.float32)
    with (
        pytest.raises(ModelError, match=r"self_attn\.q_proj.*can't be streamed"),
        streaming(model, [2], tensors, dtype=torch.float32, device=CPU),
    ):
        pass
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))


def test_forwards_are_restored_after_the_block_and_after_an_exception_in_it(
    llama: TinyModel,
) -> None:
    model, tensors = mapped(llama)
    for fails in (False, True):
        try:
            with streaming(model, range(5), tensors, dtype=None, device=CPU):
                assert all("forward" in layer.__dict__ for layer in decoder_layers(model))
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))


def test_a_layer_that_fails_while_its_weights_come_in_is_at_rest_again(
    halved: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tensors = mapped(halved, torch.bfloat16)
    calls = 0

    def fail_once(tensor: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        drop_pages(tensor)

    monkeypatch.setattr(module, "drop_pages", fail_once)
    at_rest = {n: p.data_ptr() for n, p in model.named_parameters()}
    with streaming(model, range(5), tensors, dtype=torch.float32, device=CPU):
        with pytest.raises(MemoryError), holding(decoder_layers(model)[0]):
            pass
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == at_rest
        assert all(p.dtype is torch.bfloat16 for p in model.parameters())
        with holding(layer := decoder_layers(model)[0]):  # and it can be tried again
            assert all(p.dtype is torch.float32 for p in layer.parameters())


def test_a_held_layer_is_read_once_however_often_it_runs(llama: TinyModel) -> None:
    ids = random_ids(1, 8)
    with streamed(llama, adapter=False) as model:
        layers = decoder_layers(model)
        layer_bytes = sum(p.nbytes for p in layers[2].parameters())
        assert bytes_read(model) == 0
        logits(model, ids)
        assert bytes_read(model) == 5 * layer_bytes
        with holding(layers[2]), holding(layers[2]):
            logits(model, ids)
            logits(model, ids)
        assert bytes_read(model) == 5 * layer_bytes + layer_bytes + 2 * 4 * layer_bytes
    assert bytes_read(model) == 0  # nothing is streamed any more
    with holding(layers[2]):
        pass


def test_without_a_dtype_every_parameter_keeps_its_own(llama: TinyModel) -> None:
    model, tensors = mapped(llama)
    layer = decoder_layers(model)[0]
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.double()
    with (
        streaming(model, [0], [*tensors, layer.input_layernorm.weight], dtype=None, device=CPU),
        holding(layer),
    ):
        assert layer.input_layernorm.weight.dtype is torch.float64
        assert layer.self_attn.q_proj.weight.dtype is torch.float32


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_dropped_pages_leave_memory_and_come_back_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(256)) * (64 * MIB // 256))
    tensor = torch.from_file(str(tmp_path / "data"), shared=False, size=64 * MIB, dtype=torch.uint8)
    middle = tensor[5 : 32 * MIB]  # not at page boundaries
    total = tensor.long().sum().item()
    before = resident_bytes()
    drop_pages(middle)
    assert before - resident_bytes() >= 31 * MIB
    drop_pages(tensor)
    assert before - resident_bytes() >= 63 * MIB
    assert tensor.long().sum().item() == total
