"""Every layer visited once: the intact residual stream, and the model without each of some items.

The layers are called one after another for everything that has to pass them, with the arguments the
model itself hands them (masks, positions), so that a streamed layer's weights are read once however
many batches and variants there are. What the model does before and after its layers stays its own:
embedding, final norm, head, logit scaling and loss run through its own `forward`.

Source: METHOD.md 2.2 of the project's notes, "single-sweep leave-one-out".
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fedpruner_common.components import Kind
from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.anatomy import Half, LayerAnatomy
from fedpruner_common.modeling.data import Batch
from fedpruner_common.modeling.forwards import (
    Forward,
    hidden_of,
    padded,
    replaced_forwards,
    split_call,
)
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.streaming import holding
from fedpruner_common.modeling.stubs import stub_halves
from fedpruner_common.statistics import Family

Item = tuple[Family, int]  # a family's item of a layer
Contributions = dict[Kind, torch.Tensor]
_ALL = frozenset(Kind)
_NOTHING: Mapping[int, frozenset[Kind]] = {}


class Observer(Protocol):
    """Whoever looks at the intact residual stream."""

    def see(
        self,
        batch: int,
        layer: int,
        before: torch.Tensor,
        added: Contributions,
        after: torch.Tensor,
    ) -> None:
        """Take note of one layer; tensors are (batch, seq_len, hidden_size)."""


def sweep(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    batches: Sequence[Batch],
    *,
    items: Collection[Item] = (),
    removed: Mapping[int, frozenset[Kind]] = _NOTHING,
    observer: Observer | None = None,
    stream_bytes: int,
) -> dict[Item | None, float]:
    """Loss of the model (key None) and of the model without each item, nats per token.

    Holds the hidden states of all variants of the batches that share a sweep, and one variant's
    logits of one batch.

    Args:
        model: in evaluation mode; streamed or resident.
        anatomy: of the model.
        batches: to run on.
        items: to leave out, one at a time.
        removed: halves that every variant goes without, the intact one too.
        observer: is shown the intact stream of every batch, layer by layer.
        stream_bytes: batches share a sweep as long as their hidden states take no more.

    Raises:
        ModelError: the model changes the hidden states between its layers.
    """
    losses: dict[Item | None, list[float]] = {}
    with torch.no_grad():
        for shared in _groups(model, batches, 1 + len(items), stream_bytes):
            walks = [_Walk(model, anatomy, batches[number], number) for number in shared]
            for index, layer in enumerate(decoder_layers(model)):
                missing = removed.get(index, frozenset())
                if missing == _ALL:
                    continue
                with holding(layer):
                    for walk in walks:
                        walk.advance(index, layer, items, missing, observer)
            for walk in walks:
                for item, loss in walk.losses():
                    losses.setdefault(item, []).append(loss)
    weights = [batch.num_tokens for batch in batches]
    return {item: float(np.average(values, weights=weights)) for item, values in losses.items()}


def _groups(
    model: nn.Module, batches: Sequence[Batch], num_variants: int, stream_bytes: int
) -> Iterator[list[int]]:
    """Numbers of the batches that share a sweep."""
    weight = _embedding(model).weight
    token_bytes = int(weight.shape[1]) * weight.element_size() * num_variants
    group: list[int] = []
    taken = 0
    for number, batch in enumerate(batches):
        needed = batch.input_ids.numel() * token_bytes
        if group and taken + needed > stream_bytes:
            yield group
            group, taken = [], 0
        group.append(number)
        taken += needed
    if group:
        yield group


def _embedding(model: Any) -> Any:
    return model.get_input_embeddings()


def device_of(model: nn.Module) -> torch.device:
    """Where a batch has to be for the model to take it."""
    device: torch.device = _embedding(model).weight.device
    return device


@dataclass(frozen=True)
class _Call:
    """What the model hands one layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden_of(layer(hidden, *self.args, **self.kwargs))


class _Walk:
    """One batch on its way through the layers, with its variants."""

    def __init__(
        self, model: nn.Module, anatomy: list[LayerAnatomy], batch: Batch, number: int
    ) -> None:
        self._model, self._anatomy, self._batch, self._number = model, anatomy, batch, number
        start, self._calls = self._prepare()
        self._states: dict[Item | None, torch.Tensor] = {None: start}

    def _prepare(self) -> tuple[torch.Tensor, list[_Call]]:
        """The first layer's input, and every layer's other arguments; computes no layer."""
        inputs: list[torch.Tensor] = []
        calls: list[_Call] = []

        def note(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs.append(hidden)
            calls.append(_Call(args, kwargs))
            return hidden

        self._run(note)
        if len(calls) != len(self._anatomy) or any(hidden is not inputs[0] for hidden in inputs):
            raise ModelError(
                f"{type(self._model).__name__} changes the hidden states between its layers and "
                f"can't be probed layer by layer"
            )
        return inputs[0], calls

    def _run(self, passing: Callable[..., torch.Tensor]) -> Any:
        """The model's own forward; no layer computes, each returns what `passing` says."""

        def stand_in(returns: int) -> Forward:
            return lambda *args, **kwargs: padded(passing(*split_call(args, kwargs)), returns)

        layers = zip(decoder_layers(self._model), self._anatomy, strict=True)
        with replaced_forwards({layer: stand_in(parts.returns) for layer, parts in layers}):
            return self._model(**self._batch.arguments(device_of(self._model)), use_cache=False)

    def advance(
        self,
        index: int,
        layer: nn.Module,
        items: Collection[Item],
        missing: frozenset[Kind],
        observer: Observer | None,
    ) -> None:
        """Take every variant through one layer, and start those that go without some of it."""
        call, parts = self._calls[index], self._anatomy[index]
        before = self._states[None]
        started: dict[Item | None, torch.Tensor] = {}
        for family in Family:
            if (family, index) in items:
                with _without(layer, parts, missing | family.kinds) as rest:
                    started[family, index] = call(rest, before) if rest else before
        with _without(layer, parts, missing):
            for item, hidden in self._states.items():
                if item is None and observer is not None:
                    with _contributions(layer, parts) as added:
                        self._states[item] = call(layer, hidden)
                    # Some layers flatten batch and sequence within a half.
                    shaped = {kind: tensor.view_as(hidden) for kind, tensor in added.items()}
                    observer.see(self._number, index, hidden, shaped, self._states[item])
                else:
                    self._states[item] = call(layer, hidden)
        self._states |= started

    def losses(self) -> Iterator[tuple[Item | None, float]]:
        """Each variant's loss, nats per token; frees it."""
        while self._states:
            item, hidden = self._states.popitem()
            yield item, self._run(lambda _h, _a, _k, hidden=hidden: hidden).loss.item()


@contextmanager
def _without(
    layer: nn.Module, parts: LayerAnatomy, missing: frozenset[Kind]
) -> Iterator[nn.Module | None]:
    """The layer without some of its halves; None where nothing is left of it."""
    if missing == _ALL:
        yield None
        return
    children = dict(layer.named_children())
    try:
        stub_halves(layer, parts, missing, index=None)
        yield layer
    finally:
        for name, child in children.items():
            setattr(layer, name, child)


@contextmanager
def _contributions(layer: nn.Module, parts: LayerAnatomy) -> Iterator[Contributions]:
    """Filled with what each half adds to the residual stream while the layer runs."""
    added: Contributions = {}
    handles = []
    for kind, half in parts.halves.items():

        def keep(_m: Any, _a: Any, output: Any, kind: Kind = kind) -> None:
            hidden = hidden_of(output)
            added[kind] = added[kind] + hidden if kind in added else hidden

        handles += [getattr(layer, name).register_forward_hook(keep) for name in outlets(half)]
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


def outlets(half: Half) -> list[str]:
    """The modules whose outputs a half adds to the residual stream."""
    if half.post:
        return [half.post[-1]]
    return [child for child in half.core if child not in half.links]
