"""What stands in for a dropped half or layer, and how it is put in place.

Stubs replace modules in place: nothing is renumbered and the configuration is untouched, so every
layer keeps its own index, attention type and per-layer settings. Removing or renumbering layers is
silently wrong on several architectures.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedpruner_common.components import Kind
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.forwards import hidden_of, padded
from fedpruner_common.modeling.meta import decoder_layers


class ZeroStub(nn.Module):
    """Stands for a dropped core: adds nothing to the residual stream and holds nothing.

    Attributes:
        returns: length of the tuple the core returned, 0 for a bare tensor.
        layer_index: of a dropped attention; keeps the KV cache's length right.
        bridge: what it adds instead of nothing, at the first core of a dropped run.
    """

    bridge: nn.Module | None

    def __init__(self, returns: int, layer_index: int | None = None) -> None:
        super().__init__()
        self.returns = returns
        self.layer_index = layer_index
        self.bridge = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden_states(args, kwargs)
        if self.layer_index is not None:
            _touch_cache(args, kwargs, hidden, self.layer_index)
        # Of full shape: some layers view it or add to it in place.
        added = torch.zeros_like(hidden) if self.bridge is None else self.bridge(hidden)
        return padded(added, self.returns)


class SkippedLayer(nn.Module):
    """Stands for a layer that lost both halves: the identity, plus a bridge if it has one."""

    bridge: nn.Module | None

    def __init__(self, returns: int, layer_index: int) -> None:
        super().__init__()
        self.returns = returns
        self.layer_index = layer_index
        self.bridge = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _touch_cache(args, kwargs, hidden_states, self.layer_index)
        if self.bridge is not None:
            hidden_states = hidden_states + self.bridge(hidden_states)
        return padded(hidden_states, self.returns)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    hidden: torch.Tensor = next(
        kwargs[n] for n in ("hidden_states", "x", "hidden_state") if n in kwargs
    )
    return hidden


def _touch_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor, index: int
) -> None:
    """Write an empty 1x1 head, so that the cache counts the tokens that passed a dropped layer.

    Some models pass the cache by position, some under other names: look for the object.
    """
    cache: Any = next((v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")), None)
    if cache is None:
        return
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache.layers[index] if index < len(cache.layers) else cache, "update"):
        empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(empty, empty, index)


def stub_halves(
    layer: nn.Module, anatomy: LayerAnatomy, dropped: frozenset[Kind], *, index: int | None
) -> None:
    """Replace the dropped halves of one layer by stubs, in place.

    Args:
        layer: the decoder layer.
        anatomy: of this layer.
        dropped: the halves to drop.
        index: of the layer in the model, for the KV cache; None where there is no cache.
    """
    for kind in dropped:
        half = anatomy.halves[kind]
        cache_index = index if kind is Kind.ATTENTION else None
        for child, returns in half.core.items():
            stub = nn.Identity() if child in half.links else ZeroStub(returns, cache_index)
            setattr(layer, child, stub)
        # A norm in front of both halves stays while either half lives.
        unused = [n for n in half.pre if n not in anatomy.shared or dropped == frozenset(Kind)]
        for child in (*unused, *half.post):
            setattr(layer, child, nn.Identity())


def bare_layer(layer: nn.Module, anatomy: LayerAnatomy) -> nn.Module:
    """A copy of a layer with both halves stubbed; its weights are not copied."""
    weightless: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in layer.parameters()
    }
    bare = copy.deepcopy(layer, weightless).eval()
    stub_halves(bare, anatomy, frozenset(Kind), index=None)
    return bare


def run_bare(bare: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a bare layer makes of hidden states; it has no use for its other arguments."""
    parameters = list(inspect.signature(type(bare).forward).parameters.values())[2:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
    return hidden_of(bare(hidden, **dict.fromkeys(required)))


def apply_stubs(
    model: nn.Module, anatomy: list[LayerAnatomy], skipped: Mapping[int, frozenset[Kind]]
) -> None:
    """Drop halves and layers of a model in place; works on the meta device and on real weights."""
    layers = decoder_layers(model)
    for index, dropped in skipped.items():
        if dropped == frozenset(Kind):
            layers[index] = SkippedLayer(anatomy[index].returns, index)
        else:
            stub_halves(layers[index], anatomy[index], dropped, index=index)


@contextmanager
def skipping(
    model: nn.Module, anatomy: list[LayerAnatomy], skipped: Mapping[int, frozenset[Kind]]
) -> Iterator[None]:
    """The model without some halves for the length of a `with` block; its weights stay loaded."""
    layers = decoder_layers(model)
    saved = {index: (layers[index], dict(layers[index].named_children())) for index in skipped}
    try:
        apply_stubs(model, anatomy, skipped)
        yield
    finally:
        for index, (layer, children) in saved.items():
            for name, child in children.items():
                setattr(layer, name, child)
            layers[index] = layer
