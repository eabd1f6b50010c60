"""AdamW in 8 bit against torch's AdamW, and its code against what the paper says of it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from streaming_support import with_adapter
from torch import nn
from torch_support import random_ids
from transformers import LlamaConfig, LlamaForCausalLM

from fedpruner_client.optimizer import (
    AdamW8bit,
    dequantize,
    dynamic_code,
    make_optimizer,
    quantize,
)
from fedpruner_common.errors import ConfigError
from fedpruner_common.task import TrainingSettings

SETTINGS = TrainingSettings(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    max_steps=3,
    max_seq_length=16,
    learning_rate=1e-2,
    weight_decay=0.1,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    dtype="auto",
    seed=1,
)
IN_8_BIT = replace(SETTINGS, optim="adamw_8bit")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_256_ascending_fractions_with_0_and_1(signed: bool) -> None:
    code = dynamic_code(signed=signed)
    assert code.shape == (256,)
    assert code.dtype is torch.float32
    assert (code.diff() > 0).all()
    assert {0.0, 1.0} <= set(code.tolist())
    assert bool((code < 0).any()) == signed


def test_the_code_by_hand() -> None:
    # Two decades from the top: 0.1 to 1 in 64 parts of 0.0140625, 0.01 to 0.1 in 32 of 0.0028125;
    # and at the bottom one whole part from 1e-7 to 1e-6, of which 5.5e-7 is the middle.
    signed = dynamic_code(signed=True)
    positive = signed[signed > 0].tolist()
    assert len(positive) == 64 + 32 + 16 + 8 + 4 + 2 + 1 + 1
    assert positive[0] == pytest.approx(5.5e-7)
    assert positive[-2:] == pytest.approx([1 - 0.0140625 / 2, 1.0])
    assert positive[-65] == pytest.approx(0.1 + 0.0140625 / 2)
    assert positive[-66] == pytest.approx(0.1 - 0.0028125 / 2)
    assert signed[signed < 0].tolist() == [-fraction for fraction in reversed(positive[:-1])]
    # Without a sign there are twice as many parts: the lowest two are 1e-7 to 5.5e-7 to 1e-6.
    unsigned = dynamic_code(signed=False).tolist()
    assert unsigned[:3] == pytest.approx([0, 3.25e-7, 7.75e-7])
    assert unsigned[-2:] == pytest.approx([1 - 0.00703125 / 2, 1.0])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [256, 1024, 1000, 1, 257])
def test_every_value_becomes_the_nearest_one_of_its_block(signed: bool, count: int) -> None:
    values = random(count) ** 3
    values = values if signed else values.abs()
    codes, scales = quantize(values, signed=signed)
    assert (codes.dtype, codes.shape) == (torch.uint8, (count,))
    blocks = values.split(256)
    assert scales.tolist() == [block.abs().max().item() for block in blocks]
    found = dequantize(codes, scales, signed=signed).split(256)
    code = dynamic_code(signed=signed)
    for block, back, scale in zip(blocks, found, scales, strict=True):
        nearest = (block[:, None] / scale - code).abs().min(dim=1).values
        assert ((back - block).abs() / scale - nearest).abs().max() < 1e-6


def test_the_error_is_at_most_half_a_part_of_its_decade() -> None:
    values = 10 ** (-5 * torch.rand(4096, generator=torch.Generator().manual_seed(1)))
    values[::256] = 1.0  # so that all blocks are of the same scale
    for signed, parts in ((True, 64), (False, 128)):
        back = dequantize(*quantize(values, signed=signed), signed=signed)
        top = values > 0.1
        assert (back - values)[top].abs().max() <= 0.9 / parts / 2 + 1e-6
        # A decade is ten times smaller and has half the parts: relatively twice as coarse.
        decade = torch.floor(torch.log10(values)).clamp(max=-1)
        bound = 0.9 / parts / 2 * 5.0 ** (decade + 1)
        inside = (values < 1) & (back > 0)
        edge = (10 ** (decade + 1) - values).abs() < bound  # nearest is in the coarser decade
        assert ((back - values).abs() <= bound + 1e-7)[inside & ~edge].all()
        assert (back - values).abs().max() > 0.9 / parts / 4  # it is lossy, after all


def test_zeros_stay_zeros() -> None:
    for signed in (True, False):
        values = torch.zeros(512)
        values[300] = 1e-3
        codes, scales = quantize(values, signed=signed)
        assert torch.equal(dequantize(codes, scales, signed=signed), values)


def test_a_second_moment_is_never_rounded_to_zero() -> None:
    values = torch.zeros(256)
    values[0], values[1] = 1.0, 1e-12
    back = dequantize(*quantize(values, signed=False), signed=False)
    assert back[1] == pytest.approx(3.25e-7)
    assert (back[2:] == 0).all()


def test_a_value_whose_gradient_is_small_beside_its_blocks_moves_by_a_few_learning_rates() -> None:
    # The second moment, 1e-8 of its block's largest, is below all fractions; the first, 1e-4 of
    # its, is not. Rounded to zero, the former would turn the next step into one of 1000 and more.
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([parameter], lr=1.0, weight_decay=0.0)
    for scale in (1.0, 0.0, 0.0, 0.0):
        before = parameter.detach().clone()
        gradient = torch.full((4096,), 1e-1)
        gradient[5] = 1e-5 * scale
        parameter.grad = gradient
        optimizer.step()
        assert (parameter.detach() - before).abs().max() < 4
    assert parameter[5] != 0


def test_moments_take_two_bytes_a_value_and_their_scales() -> None:
    shapes = [(4096,), (4097,), (16, 1024), (300_000,)]
    parameters = [nn.Parameter(random(*shape)) for shape in shapes]
    optimizer = make_optimizer(parameters, IN_8_BIT)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in parameters:
        state = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
        assert 2 < sum(t.nbytes for t in state) / parameter.numel() <= 2.1
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
        assert sum(storages.values()) == sum(t.nbytes for t in state)


def steps(
    settings: TrainingSettings, start: torch.Tensor, gradients: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A parameter after some steps, and the optimizer that made them."""
    parameter = nn.Parameter(start.clone())
    optimizer = make_optimizer([parameter], settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer


def test_adamw_is_torchs() -> None:
    optimizer = make_optimizer([nn.Parameter(random(3))], SETTINGS)
    assert type(optimizer) is torch.optim.AdamW
    expected = {"lr": 1e-2, "weight_decay": 0.1, "foreach": False, "amsgrad": False}
    assert expected.items() <= optimizer.defaults.items()
    assert type(make_optimizer([nn.Parameter(random(3))], IN_8_BIT)) is AdamW8bit
    with pytest.raises(ConfigError, match="got 'sgd'"):
        make_optimizer([nn.Parameter(random(3))], replace(SETTINGS, optim="sgd"))


def test_small_tensors_are_updated_exactly_as_torch_does() -> None:
    start, gradients = random(63, 65), [random(63, 65, seed=s) for s in range(1, 8)]
    assert start.numel() == 4095
    expected, _ = steps(SETTINGS, start, gradients)
    found, optimizer = steps(IN_8_BIT, start, gradients)
    assert torch.equal(found, expected)
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype is torch.float32


def test_the_first_step_of_large_tensors_is_torchs_too() -> None:
    # Nothing has been rounded yet. More than one slice, the last of them with half a block.
    start, gradient = random(2 * 256 * 1024 + 128), random(2 * 256 * 1024 + 128, seed=1)
    expected, _ = steps(SETTINGS, start, [gradient])
    found, optimizer = steps(IN_8_BIT, start, [gradient])
    assert torch.equal(found, expected)
    (state,) = optimizer.state.values()
    first = dequantize(state["exp_avg"], state["exp_avg_absmax"], signed=True)
    assert (first - 0.1 * gradient).abs().max() < 0.1 * gradient.abs().max() * 0.9 / 64
    # And every slice goes on from moments of its own.
    second, _ = steps(IN_8_BIT, start, [gradient, gradient])
    exact, _ = steps(SETTINGS, start, [gradient, gradient])
    for part in (slice(0, 1 << 18), slice(1 << 18, 1 << 19), slice(1 << 19, None)):
        off = (second - exact)[part].abs().mean() / (exact - expected)[part].abs().mean()
        assert 0 < off < 0.03


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    # With no gradient nothing but decay is left: three times 1 - lr * weight_decay = 0.999.
    start = random(5000)
    found, _ = steps(IN_8_BIT, start, [torch.zeros(5000)] * 3)
    assert torch.allclose(found, start * 0.999**3, rtol=1e-6, atol=0)
    # And a decay added to the gradient would be divided by the second moment's root.
    undecayed, _ = steps(replace(IN_8_BIT, weight_decay=0.0), start, [random(5000, seed=1)])
    decayed, _ = steps(IN_8_BIT, start, [random(5000, seed=1)])
    assert torch.allclose(decayed - undecayed, -1e-3 * start, rtol=0, atol=1e-6)


def test_values_in_bfloat16_are_updated_in_float32() -> None:
    start, gradient = random(5000).bfloat16(), random(5000, seed=1).bfloat16()
    found, _ = steps(IN_8_BIT, start, [gradient])
    exact, _ = steps(SETTINGS, start.float(), [gradient.float()])
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_the_same_gradients_give_the_same_values() -> None:
    start, gradients = random(5000), [random(5000, seed=s) for s in range(1, 6)]
    a, _ = steps(IN_8_BIT, start, gradients)
    b, _ = steps(IN_8_BIT, start, gradients)
    assert torch.equal(a, b)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    parameters = [nn.Parameter(random(5000)), nn.Parameter(random(5000))]
    optimizer = make_optimizer(parameters, IN_8_BIT)
    parameters[1].grad = torch.ones(5000)
    optimizer.step()
    assert torch.equal(parameters[0].detach(), random(5000))
    assert list(optimizer.state) == [parameters[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(dtype: torch.dtype) -> None:
    start = random(5000).to(dtype)
    gradients = [random(5000, seed=s).to(dtype) for s in range(1, 7)]
    expected, _ = steps(IN_8_BIT, start, gradients)

    half, optimizer = steps(IN_8_BIT, start, gradients[:3])
    saved = optimizer.state_dict()
    parameter = nn.Parameter(half.clone())
    loaded = make_optimizer([parameter], IN_8_BIT)
    loaded.load_state_dict(saved)
    before = {k: v.clone() for k, v in saved["state"][0].items() if isinstance(v, torch.Tensor)}
    for gradient in gradients[3:]:
        parameter.grad = gradient.clone()
        loaded.step()
    assert torch.equal(parameter.detach(), expected)
    assert all(torch.equal(saved["state"][0][k], v) for k, v in before.items())
    # Without its state it would have gone elsewhere.
    fresh, _ = steps(IN_8_BIT, half, gradients[3:])
    assert not torch.equal(fresh, expected)


def curve(
    parameters: list[nn.Parameter],
    settings: TrainingSettings,
    loss_of: Callable[[], torch.Tensor],
    num_steps: int,
) -> list[float]:
    optimizer = make_optimizer(parameters, settings)
    losses = []
    for _ in range(num_steps):
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_least_squares_go_down_as_with_adamw() -> None:
    inputs, weights = random(256, 64, seed=1), random(64, 128, seed=2)
    targets = inputs @ weights + 0.5 * random(256, 128, seed=3)
    curves = {}
    for settings in (SETTINGS, IN_8_BIT):
        settings = replace(settings, weight_decay=0.0, learning_rate=3e-2)
        solution = nn.Parameter(torch.zeros(64, 128))

        def loss_of(solution: nn.Parameter = solution) -> torch.Tensor:
            return (inputs @ solution - targets).square().mean()

        curves[settings.optim] = torch.tensor(curve([solution], settings, loss_of, 300))
    exact, found = curves["adamw"], curves["adamw_8bit"]
    assert exact[-1] < exact[0] / 100
    # 6 % behind where the loss halves every few steps, and level in the end.
    assert (found / exact - 1).abs().max() < 0.08
    assert abs(found[-1] / exact[-1] - 1) < 0.01


@pytest.fixture(scope="module")
def toy() -> LlamaForCausalLM:
    """A Llama whose LoRA tensors are large enough for 8 bit."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=1024, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=8, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def test_the_adapter_of_a_language_model_learns_as_with_adamw(toy: LlamaForCausalLM) -> None:
    ids = random_ids(4, 16)
    model = with_adapter(toy)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert min(p.numel() for p in parameters) >= 4096
    starts = [p.detach().clone() for p in parameters]

    def loss_of() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    curves = {}
    for optim in ("adamw", "adamw_8bit"):
        with torch.no_grad():
            for parameter, start in zip(parameters, starts, strict=True):
                parameter.copy_(start)
        settings = replace(SETTINGS, optim=optim, learning_rate=1e-3, weight_decay=0.01)
        curves[optim] = torch.tensor(curve(parameters, settings, loss_of, 30))
    exact, found = curves["adamw"], curves["adamw_8bit"]
    assert exact[-1] < exact[0] / 2
    assert (found / exact - 1).abs().max() < 0.02
