"""Importance scores that need gradients or weights rather than the residual stream.

Gradients run through the model's own forward and backward, so a streamed model stays streamed: its
weights are read once for each forward and once for each backward.

Source: METHOD.md 2.2 of the project's notes.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from fedpruner_common.components import Kind
from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.data import Batch
from fedpruner_common.modeling.forwards import hidden_of, split_call
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.streaming import holding
from fedpruner_common.modeling.sweep import device_of, outlets
from fedpruner_common.statistics import Family

Importance = dict[Family, tuple[float, ...]]


def gate_taylor(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    batches: Sequence[Batch],
    families: Collection[Family],
) -> Importance:
    """|dLoss/dalpha| of every item as x + alpha f(x), at alpha = 1: first-order cost of losing it.

    The derivative is the sum over tokens of <dLoss/d(x + f(x)), f(x)>; its mean over batches is
    taken before the absolute value, the loss being the mean over all their tokens.
    """
    sums = {family: [0.0] * len(anatomy) for family in families}
    total = sum(batch.num_tokens for batch in batches)
    for batch in batches:
        share = batch.num_tokens / total

        def note(family: Family, layer: int, derivative: float, share: float = share) -> None:
            sums[family][layer] += share * derivative

        with _first_input(model) as starts, _gates(model, anatomy, families, note):
            loss = _loss(model, batch)
            torch.autograd.grad(loss, starts)
    return {family: tuple(abs(value) for value in values) for family, values in sums.items()}


def fisher(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    batches: Sequence[Batch],
    families: Collection[Family],
) -> Importance:
    """Sum over an item's LoRA tensors of the norm of their mean squared gradients.

    One gradient per batch: the mean over its tokens.

    Raises:
        ModelError: an item has no LoRA that can be trained.
    """
    tensors = {
        (family, index): _trained_lora(layer, anatomy[index], family)
        for family in families
        for index, layer in enumerate(decoder_layers(model))
    }
    for (family, index), parameters in tensors.items():
        if not parameters:
            raise ModelError(
                f"the score `fisher` needs an adapter that can be trained in every layer, and the "
                f"{family.value} item of layer {index} has none"
            )
    distinct = list(dict.fromkeys(chain.from_iterable(tensors.values())))
    squares = {p: torch.zeros_like(p, dtype=torch.float32) for p in distinct}
    for batch in batches:
        with torch.enable_grad():
            gradients = torch.autograd.grad(_loss(model, batch), distinct)
        for parameter, gradient in zip(distinct, gradients, strict=True):
            squares[parameter] += gradient.float() ** 2 / len(batches)

    def score(parameters: list[nn.Parameter]) -> float:
        return float(sum(squares[p].norm().item() for p in parameters))

    return {
        family: tuple(score(tensors[family, index]) for index in range(len(anatomy)))
        for family in families
    }


def wnorm(
    model: nn.Module, anatomy: list[LayerAnatomy], families: Collection[Family]
) -> Importance:
    """Frobenius norm of an item's base weight matrices; of one layer after the other."""
    squares: dict[Kind, list[float]] = {kind: [] for kind in Kind}
    for layer, parts in zip(decoder_layers(model), anatomy, strict=True):
        with holding(layer):
            for kind in Kind:
                matrices = _matrices(layer, parts, kind, lora=False)
                norms = [torch.linalg.vector_norm(m.detach().float()) for m in matrices]
                squares[kind].append(sum(norm.item() ** 2 for norm in norms))
    return {
        family: tuple(
            sum(squares[kind][index] for kind in family.kinds) ** 0.5
            for index in range(len(anatomy))
        )
        for family in families
    }


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch.arguments(device_of(model)), use_cache=False).loss
    return loss


def _matrices(
    layer: nn.Module, parts: LayerAnatomy, kind: Kind, *, lora: bool
) -> list[nn.Parameter]:
    """Weight matrices of a half's cores: the adapter's or the base model's."""
    return [
        parameter
        for child in parts.halves[kind].core
        for name, parameter in getattr(layer, child).named_parameters()
        if parameter.dim() >= 2 and ("lora_" in name) == lora
    ]


def _trained_lora(layer: nn.Module, parts: LayerAnatomy, family: Family) -> list[nn.Parameter]:
    return [
        parameter
        for kind in Kind
        if kind in family.kinds
        for parameter in _matrices(layer, parts, kind, lora=True)
        if parameter.requires_grad
    ]


@contextmanager
def _first_input(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Cut the graph in front of the first layer; filled with its input, which then has gradients.

    Nothing before it needs one, and asking for this one alone computes none for the weights.
    """
    starts: list[torch.Tensor] = []

    def cut(_: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden, args, kwargs = split_call(args, kwargs)
        starts.append(hidden.detach().requires_grad_())
        return (starts[0], *args), kwargs

    handle = decoder_layers(model)[0].register_forward_pre_hook(cut, with_kwargs=True)
    try:
        with torch.enable_grad():
            yield starts
    finally:
        handle.remove()


@contextmanager
def _gates(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    families: Collection[Family],
    note: Callable[[Family, int, float], None],
) -> Iterator[None]:
    """During backward, hand `note` the derivative by every item's gate.

    A half's gate is inside its layer: in a streamed layer its hook sees gradients only while
    backward computes the layer again, and is silent in the first forward.
    """
    handles = []
    for index, (layer, parts) in enumerate(zip(decoder_layers(model), anatomy, strict=True)):

        def watch(family: Family, index: int, output: Any, added: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(
                    lambda g: note(family, index, (g.double() * added.double()).sum().item())
                )

        def after_layer(_: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            before, after = split_call(args, kwargs)[0], hidden_of(output)
            watch(Family.LAYER, index, after, (after - before).detach())

        if Family.LAYER in families:
            handles.append(layer.register_forward_hook(after_layer, with_kwargs=True))
        for family in {Family.ATTENTION, Family.FFN} & set(families):

            def after_half(
                _m: Any, _a: Any, output: Any, family: Family = family, index: int = index
            ) -> None:
                hidden = hidden_of(output)
                # A copy: the layer may add to its halves' outputs in place.
                watch(family, index, hidden, hidden.detach().clone())

            names = outlets(parts.halves[Kind(family.value)])
            handles += [getattr(layer, n).register_forward_hook(after_half) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
