"""The loss in chunks against transformers' own loss of all tokens at once."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from streaming_support import resident, streamed, with_adapter
from torch_support import ARCHITECTURES, CPU, PAD, VOCAB_SIZE, TinyModel, random_ids
from transformers import AutoModelForCausalLM

from fedpruner_client.loss import causal_lm_loss
from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.data import IGNORED, TokenSequence, collate

MIB = 1 << 20
Gradients = dict[str, torch.Tensor]


def arguments(*lengths: int, ignored: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch of random sequences, their first labels ignored."""
    sequences = []
    for seed, length in enumerate(lengths):
        ids = random_ids(length, seed=seed).tolist()
        sequences.append(TokenSequence.of(ids, [IGNORED] * ignored + ids[ignored:]))
    return collate(sequences, pad_token_id=PAD).arguments(CPU)


# 15 + 10 + 4 labelled tokens of 3 x 16; and 5 + 2 of 2 x 16, with nine and more ignored before.
PADDED = arguments(16, 11, 5)
ANSWERS = arguments(16, 13, ignored=11)


def step(
    model: Any, batch: dict[str, torch.Tensor], chunk_tokens: int
) -> tuple[float, Gradients, torch.Tensor]:
    """Loss, gradients of a part of it, and the random state after it, from a fixed seed."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    loss = causal_lm_loss(model, batch, chunk_tokens=chunk_tokens)
    (loss * 0.37).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, torch.get_rng_state()


def assert_same(
    found: tuple[float, Gradients, torch.Tensor],
    expected: tuple[float, Gradients, torch.Tensor],
    *,
    exactly: bool = False,
) -> None:
    """Differences are relative to the loss, and to the largest gradient of each parameter."""
    assert found[0] == pytest.approx(expected[0], rel=0 if exactly else 1e-6, abs=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        largest = gradient.abs().max().item()
        assert largest > 0
        difference = (found[1][name] - gradient).abs().max().item()
        assert difference <= (0 if exactly else 5e-6 * largest)  # 2e-6 were measured
    assert torch.equal(found[2], expected[2])


@pytest.fixture
def adapted(llama: TinyModel) -> Any:
    return resident(llama, adapter=True)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_loss_and_gradients_equal_the_models_own_for_every_chunk_size(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    model = resident(zoo(name), adapter=True)
    for batch in (PADDED, ANSWERS):
        model.zero_grad()
        torch.manual_seed(11)
        model.train()
        loss = model(**batch).loss
        (loss * 0.37).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) >= 5 * 4 * 2  # layers, linear modules, A and B
        expected = loss.item(), gradients, torch.get_rng_state()
        for chunk_tokens in (0, 1, 7, 10_000):
            assert_same(step(model, batch, chunk_tokens), expected)
    # The comparison can fail: another batch has another loss and other gradients.
    other = step(model, PADDED, 7)
    assert other[0] != pytest.approx(expected[0], rel=1e-3)
    with pytest.raises(AssertionError):
        assert_same((expected[0], *other[1:]), expected)


def test_only_labelled_tokens_go_through_the_head_and_no_more_than_a_chunk_of_them(
    adapted: Any,
) -> None:
    rows: list[int] = []
    head = adapted.get_base_model().lm_head
    head.register_forward_hook(lambda _m, _a, output: rows.append(output.numel() // VOCAB_SIZE))
    step(adapted, PADDED, 7)
    assert rows == [7, 7, 7, 7, 1]
    rows.clear()
    step(adapted, ANSWERS, 3)
    assert rows == [3, 3, 1]
    rows.clear()
    step(adapted, PADDED, 0)
    assert rows == [3 * 16]


@pytest.mark.parametrize("chunk_tokens", [0, 4])
def test_the_loss_of_nothing_is_not_a_number(adapted: Any, chunk_tokens: int) -> None:
    nothing = {**PADDED, "labels": torch.full_like(PADDED["labels"], IGNORED)}
    assert torch.isnan(causal_lm_loss(adapted, nothing, chunk_tokens=chunk_tokens))


def test_without_gradients_it_is_the_same_loss(llama: TinyModel) -> None:
    model = llama.reference  # has no adapter
    with torch.no_grad():
        expected = model(**PADDED).loss
        found = causal_lm_loss(model, PADDED, chunk_tokens=7)
    assert not found.requires_grad
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_callers_batch_stays_as_it_is(adapted: Any) -> None:
    before = {name: tensor.clone() for name, tensor in PADDED.items()}
    step(adapted, PADDED, 7)
    assert PADDED.keys() == before.keys() == {"input_ids", "labels"}
    assert all(torch.equal(PADDED[name], before[name]) for name in before)


def test_gemma2s_soft_capping_counts(zoo: Callable[[str], TinyModel]) -> None:
    model = resident(zoo("gemma2"), adapter=True)
    config = model.get_base_model().config
    losses = {}
    for cap in (None, 0.5):
        config.final_logit_softcapping = cap
        expected, found = step(model, PADDED, 0), step(model, PADDED, 7)
        assert_same(found, expected)
        losses[cap] = found[0]
    assert abs(losses[None] - losses[0.5]) > 1e-2


@pytest.mark.parametrize(
    "config",
    [
        transformers.CohereConfig(logit_scale=0.25, num_key_value_heads=2),
        transformers.GraniteConfig(logits_scaling=8.0, num_key_value_heads=2),
        transformers.FalconConfig(attention_dropout=0.0),
    ],
    ids=lambda config: config.model_type,
)
def test_other_heads_are_honoured_too(config: Any) -> None:
    config.update({
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": PAD,
    })  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.get_output_embeddings().weight.mul_(20)  # so that the scale of the logits matters
    model = with_adapter(model)
    expected = step(model, PADDED, 0)
    assert_same(step(model, PADDED, 7), expected)


def test_dropout_draws_the_same(llama: TinyModel) -> None:
    model = resident(llama, adapter=True, dropout=0.3)
    expected = step(model, PADDED, 0)
    assert_same(step(model, PADDED, 7), expected)
    without = step(resident(llama, adapter=True), PADDED, 0)
    assert without[0] != pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_checkpointed_layers_give_the_same(zoo: Callable[[str], TinyModel], name: str) -> None:
    model = resident(zoo(name), adapter=True)
    expected = step(model, PADDED, 0)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(step(model, PADDED, 7), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_streamed_layers_give_the_same(zoo: Callable[[str], TinyModel], name: str) -> None:
    expected = step(resident(zoo(name), adapter=True), PADDED, 0)
    with streamed(zoo(name), adapter=True) as model:
        assert_same(step(model, PADDED, 7), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_in_bfloat16_it_is_as_close_to_float32_as_the_models_own(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    model = resident(zoo(name), adapter=True)
    exact = step(model, PADDED, 0)
    model = model.to(torch.bfloat16)

    def distance(chunk_tokens: int) -> tuple[float, float]:
        loss, gradients, _ = step(model, PADDED, chunk_tokens)
        squares = {n: (gradients[n].float() - g).square().sum() for n, g in exact[1].items()}
        norm = sum(g.square().sum() for g in exact[1].values())
        assert all(gradient.dtype is torch.bfloat16 for gradient in gradients.values())
        return abs(loss / exact[0] - 1), float((sum(squares.values()) / norm) ** 0.5)

    own, chunked = distance(0), distance(7)
    assert chunked[0] < own[0] + 1e-4
    assert chunked[1] < own[1] * 1.1
    assert own[1] < 0.1


def test_an_exception_in_the_head_leaves_the_model_as_it_was(
    adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal_lm = adapted.get_base_model()
    expected = step(adapted, PADDED, 7)
    calls = 0
    head_forward = causal_lm.lm_head.forward

    def fail_later(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return head_forward(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(causal_lm.lm_head, "forward", fail_later)
        with pytest.raises(MemoryError):
            step(adapted, PADDED, 7)
    assert "forward" not in causal_lm.model.__dict__
    assert_same(step(adapted, PADDED, 7), expected, exactly=True)
    assert_same(step(adapted, PADDED, 0), expected)


def test_a_decoder_that_has_a_forward_of_its_own_keeps_it(adapted: Any) -> None:
    decoder = adapted.get_base_model().model
    expected = step(adapted, PADDED, 7)
    calls: list[Any] = []
    usual = decoder.forward

    def own(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return usual(**kwargs)

    decoder.forward = own
    assert_same(step(adapted, PADDED, 7), expected, exactly=True)
    assert decoder.forward is own
    assert len(calls) == 1  # the chunks did not go through the layers


def test_a_head_that_is_to_be_trained_is_refused(zoo: Callable[[str], TinyModel]) -> None:
    model = resident(zoo("llama"), adapter=True)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"frozen head, and lm_head\.weight"):
        causal_lm_loss(model, PADDED, chunk_tokens=7)
    causal_lm_loss(model, PADDED, chunk_tokens=0)

    tied = resident(zoo("gemma2"), adapter=True)
    tied.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="frozen head"):
        causal_lm_loss(tied, PADDED, chunk_tokens=7)


def test_a_loss_that_is_not_only_the_tokens_is_refused() -> None:
    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        output_router_logits=True,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    with pytest.raises(ModelError, match="output_router_logits"):
        causal_lm_loss(model, PADDED, chunk_tokens=7)
    config.output_router_logits = False
    with torch.no_grad():
        expected = model(**PADDED).loss.item()
    assert causal_lm_loss(model, PADDED, chunk_tokens=7).item() == pytest.approx(expected)


def test_a_head_that_does_not_follow_its_decoder_is_refused(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama.full()
    model.requires_grad_(False)
    other = copy.deepcopy(model.model)
    monkeypatch.setattr(model, "get_decoder", lambda: other)
    with pytest.raises(ModelError, match="LlamaForCausalLM: its head does not follow LlamaModel"):
        causal_lm_loss(model, PADDED, chunk_tokens=7)


MEASURE = """
from fedpruner_common import malloc
malloc.set_for_training()

import os
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path

import torch, transformers
from peft import LoraConfig, get_peft_model
from fedpruner_client.loss import causal_lm_loss

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
config = transformers.LlamaConfig(
    vocab_size=50_000, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=2,
)
model = transformers.LlamaForCausalLM(config).requires_grad_(False)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

def grow(tokens, chunk_tokens):
    ids = torch.arange(tokens)[None]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    causal_lm_loss(model, {"input_ids": ids, "labels": ids}, chunk_tokens=chunk_tokens).backward()
    return status("VmHWM") - before

for chunk_tokens in (64, 0):  # so that libraries have loaded what they need
    grow(16, chunk_tokens)
print(grow(1024, 64), grow(1024, 0))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_the_peak_of_memory_is_that_of_a_chunk() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE],
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    chunked, whole = (int(number) for number in done.stdout.split())
    logits = 4 * 50_000
    assert whole > 2.5 * 1024 * logits
    assert chunked < whole / 4
    # Twice a chunk's logits, and room for a layer's activations.
    assert chunked < 2 * 64 * logits + 16 * MIB
