"""AdamW, also with its two moments in 8 bit: 2.03 bytes a trained value instead of 8.

A moment is kept in blocks of 256 values, each with its largest absolute value and, for every value,
the nearest of 256 fractions of that. The fractions are dense near zero, where most of them are.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
"""

from functools import cache
from typing import Any

import torch

from fedpruner_common.errors import ConfigError
from fedpruner_common.task import TrainingSettings

_BLOCK = 256
_SLICE = _BLOCK << 10  # values in float32 at a time: 1 MiB a buffer
_SMALLEST = 4096  # values; what is smaller is not worth it, and stays float32 as in the paper
_DECADES = 7
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments, by torch's names for them


def make_optimizer(
    parameters: list[torch.nn.Parameter], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """The optimizer that the task asks for, fresh.

    Raises:
        ConfigError: there is none of this name.
    """
    if settings.optim == "adamw":
        # foreach would hold a second copy of all gradients for a moment.
        return torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
        )
    if settings.optim == "adamw_8bit":
        return AdamW8bit(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    raise ConfigError(f"optim: expected adamw or adamw_8bit, got {settings.optim!r}")


def dynamic_code(*, signed: bool) -> torch.Tensor:
    """The 256 fractions that 8 bit stand for, ascending, float32: 0, 1, and seven decades.

    The decade below 10^-e is divided into 2^(6-e) parts for either sign, or into twice as many
    where there is none; their middles are the fractions.

    Source: Dettmers et al. 2022, section 1.3, dynamic tree quantization.
    """
    fractions = [0.0, 1.0]
    for decade in range(_DECADES):
        parts = (1 if signed else 2) << decade
        for part in range(parts):
            middle = 0.1 + 0.9 * (part + 0.5) / parts
            fraction = middle * 10.0 ** (decade + 1 - _DECADES)
            fractions += [fraction, -fraction] if signed else [fraction]
    return torch.tensor(sorted(fractions))


@cache
def _table(device: torch.device, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The code, and the boundaries between what is nearest to each of its fractions."""
    code = dynamic_code(signed=signed).to(device)
    boundaries = (code[:-1] + code[1:]) / 2
    if not signed:
        # A second moment of a value that has had a gradient is never rounded to zero: the update
        # divides by its root, and would be huge where the first moment was not rounded to zero.
        boundaries[0] = 0.0
    return code, boundaries


def quantize(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8, of float32 values, and the largest absolute value of each block, float32."""
    _, boundaries = _table(values.device, signed=signed)
    blocks = _blocks(values)
    scales = blocks.abs().amax(dim=1)
    fractions = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = torch.bucketize(fractions, boundaries, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(values)], scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """The float32 values that codes and scales stand for."""
    code, _ = _table(codes.device, signed=signed)
    blocks = _blocks(code.index_select(0, codes.int()))
    return blocks.mul_(scales.unsqueeze(1)).view(-1)[: len(codes)]


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """(blocks, values of a block), filled up with zeros; a copy where that is needed."""
    missing = -len(values) % _BLOCK
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, _BLOCK)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with both moments in 8 bit. Float32 copies are held of one slice at a time."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Start with moments of zero, which take no memory before the first step.

        Args:
            parameters: contiguous.
            lr, weight_decay, betas, eps: as torch's AdamW has them.
        """
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(_fresh_state(parameter))
                    state["step"] += 1
                    _step(parameter.view(-1), parameter.grad.reshape(-1), state, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the moments stay as they are stored, which torch would convert."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, own, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][key] = value.to(parameter.device, copy=True)


def _fresh_state(parameter: torch.Tensor) -> dict[str, Any]:
    count, device = parameter.numel(), parameter.device
    state: dict[str, Any] = {"step": 0}
    for moment in _SIGNED:
        if count < _SMALLEST:
            state[moment] = torch.zeros(count, device=device)
        else:
            state[moment] = torch.zeros(count, dtype=torch.uint8, device=device)
            state[_scales_of(moment)] = torch.zeros(-(-count // _BLOCK), device=device)
    return state


def _scales_of(moment: str) -> str:
    return f"{moment}_absmax"


def _step(
    values: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """One step of one flat parameter, in place."""
    if len(values) < _SMALLEST:
        _adamw(values, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
        return
    for start in range(0, len(values), _SLICE):
        part = slice(start, min(start + _SLICE, len(values)))
        blocks = slice(start // _BLOCK, -(-part.stop // _BLOCK))
        stored = {m: (state[m][part], state[_scales_of(m)][blocks]) for m in _SIGNED}
        moments = {m: dequantize(*stored[m], signed=signed) for m, signed in _SIGNED.items()}
        _adamw(
            values[part],
            gradient[part],
            moments["exp_avg"],
            moments["exp_avg_sq"],
            state["step"],
            group,
        )
        for moment, signed in _SIGNED.items():
            for kept, new in zip(
                stored[moment], quantize(moments[moment], signed=signed), strict=True
            ):
                kept.copy_(new)


def _adamw(
    values: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: int,
    group: dict[str, Any],
) -> None:
    """Update values and both moments in place, as torch's AdamW does, to the bit."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    work, gradient = values.float(), gradient.float()
    work.mul_(1 - lr * group["weight_decay"])
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    work.addcdiv_(first, root, value=-lr / (1 - beta1**step))
    if work is not values:
        values.copy_(work)
