"""Fit bridges, and note what they miss, by two sweeps: the full model, then the submodel.

A sweep goes through the layers once, all sequences together: layer by layer, a few sequences at a
time. With `streaming`, one layer is in memory at a time and the weights are read once per sweep.

The first sweep takes the full model's hidden states behind every dropped run. The second goes
through the submodel: in front of a dropped run, the hidden state it has reached and the state
behind the run are known for every token, so the bridge is fitted there, and applied, and the sweep
goes on with the state it leads to: errors do not pile up. `corrected` also notes the difference
that is left, token by token. Added in training, it makes the submodel's function the full model's,
exactly, as long as the adapter is the one of the sweep; what the bridge then contributes is how the
run responds to changes.

Source: METHOD.md 2.5 of the project's notes; the correction is ours.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.bridges import Bridge, Moments
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.stubs import SkippedLayer, ZeroStub, skipping, stub_halves
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind

Tensors = dict[str, torch.Tensor]
Streamed = Callable[[], AbstractContextManager[None]]


def allocate_states(submodel: Submodel, shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    """Room for the hidden states behind every dropped run, by the run's index."""
    return {str(i): torch.empty(shape, dtype=dtype) for i in range(len(submodel.dropped_runs()))}


def bridge_runs(
    model: Any,
    anatomy: list[LayerAnatomy],
    submodel: Submodel,
    input_ids: torch.Tensor,
    *,
    kind: BridgeKind,
    rank: int,
    given: Sequence[Tensors] | None = None,
    states: Sequence[torch.Tensor],
    corrected: bool,
    rows: int,
    streamed: Streamed = nullcontext,
) -> list[Tensors]:
    """The bridges of a submodel's dropped runs, and in `states` what they miss.

    Args:
        model: the full model, with the current adapter in place.
        anatomy: of its layers.
        submodel: what stays.
        input_ids: (num_sequences, seq_len), padded on the right.
        kind, rank: which bridges to fit.
        given: bridges to use instead of fitting them.
        states: one tensor (num_sequences, seq_len, hidden_size) per dropped run, to be filled; on
            return they hold what to add besides the bridge when `corrected`.
        corrected: see the module's docstring.
        rows: sequences that go through a layer together.
        streamed: opens a block within which layers are in memory only while they work.

    Returns:
        Each run's bridge tensors, empty for `kind` off.
    """
    runs = submodel.dropped_runs()
    ends = {_cut_behind(run[-1]): index for index, run in enumerate(runs)}

    def keep(cut: int, hidden: torch.Tensor) -> None:
        if cut in ends:
            states[ends[cut]].copy_(hidden)

    with torch.no_grad(), _sweeping(model, anatomy, frozenset(ends), keep, rows), streamed():
        _run(model, input_ids)
    fitting = _Fitting(kind, rank, given, states, corrected)
    with (
        torch.no_grad(),
        skipping(model, anatomy, submodel.skipped()),
        _bridging(model, anatomy, runs, fitting, rows),
        streamed(),
    ):
        _run(model, input_ids)
    return fitting.bridges


def install_bridges(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    submodel: Submodel,
    bridges: Sequence[Mapping[str, torch.Tensor]],
) -> list[Bridge]:
    """Put bridges into a submodel's stubs, in the order of its dropped runs."""
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    installed = []
    for run, tensors in zip(submodel.dropped_runs(), bridges, strict=True):
        first = run[0]
        stub = _stub_of(layers[first.layer], anatomy[first.layer], first)
        gain = 1.0
        if isinstance(stub, ZeroStub):
            gain = _gain(layers[first.layer], anatomy[first.layer], first.kind)
        stub.bridge = Bridge(tensors, gain=gain).to(device) if tensors else Offset(gain)
        installed.append(stub.bridge)
    return installed


class Offset(Bridge):
    """A bridge without a map: adds only what is noted for each token."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__({"scale": torch.zeros(1)}, gain=gain)

    def estimate(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)


def _cut_behind(component: ComponentId) -> int:
    """Index of the place behind a component in the residual stream; 2 l is in front of layer l."""
    return 2 * component.layer + (1 if component.kind is Kind.ATTENTION else 2)


def _stub_of(layer: nn.Module, parts: LayerAnatomy, first: ComponentId) -> ZeroStub | SkippedLayer:
    if isinstance(layer, SkippedLayer):
        return layer
    half = parts.halves[first.kind]
    stub = getattr(layer, next(child for child in half.core if child not in half.links))
    assert isinstance(stub, ZeroStub)
    return stub


def _gain(layer: nn.Module, parts: LayerAnatomy, kind: Kind) -> float:
    """What a layer multiplies a block's output with before it adds it to the residual stream."""
    weightless: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in layer.parameters()
    }
    bare = copy.deepcopy(layer, weightless).eval()
    stub_halves(bare, parts, frozenset(Kind), index=None)
    one = Bridge({"scale": torch.ones(1)})
    _stub_of(bare, parts, ComponentId(0, kind)).bridge = one
    x = torch.ones(1, 1, 4)
    y = bare(x, **_absent_arguments(layer))
    y = y[0] if isinstance(y, tuple) else y
    return float((y - x).mean())


def _absent_arguments(layer: nn.Module) -> dict[str, None]:
    import inspect

    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None for p in parameters if p.default is p.empty and p.kind in kinds}


# A sweep: the model's own forward, with every layer going through its sequences in turns.


def _run(model: Any, input_ids: torch.Tensor) -> None:
    decoder = model.get_decoder()
    device = decoder.get_input_embeddings().weight.device
    decoder(input_ids=input_ids.to(device), use_cache=False)


@contextmanager
def _replaced_forwards(layers: nn.ModuleList, forwards: Sequence[Any]) -> Iterator[None]:
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _in_turns(
    forward: Callable[..., Any], rows: int
) -> Callable[..., tuple[torch.Tensor, tuple[Any, ...] | None]]:
    """A layer's forward that takes a few sequences at a time.

    Returns the hidden states of all, and for layers that return tuples what else they returned.
    """

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        total, output, rest = len(hidden), torch.empty_like(hidden), None
        for start in range(0, total, rows):
            part = slice(start, min(start + rows, total))
            result = forward(
                hidden[part],
                *(_rows_of(value, part, total) for value in args),
                **{name: _rows_of(value, part, total) for name, value in kwargs.items()},
            )
            if isinstance(result, tuple):
                result, rest = result[0], result[1:]
            output[part] = result
        return output, rest

    return run


def _rows_of(value: Any, part: slice, total: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[part] if value.dim() > 1 and len(value) == total > 1 else value
    if isinstance(value, (list, tuple)):
        return type(value)(_rows_of(item, part, total) for item in value)
    return value


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any, Any]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


@contextmanager
def _sweeping(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    cuts: frozenset[int],
    on_cut: Callable[[int, torch.Tensor], None],
    rows: int,
) -> Iterator[None]:
    """The full model, telling `on_cut` the hidden states at some places of the residual stream."""
    layers = decoder_layers(model)

    def wrap(index: int, layer: nn.Module) -> Any:
        in_turns = _in_turns(layer.forward, rows)
        middle, end = 2 * index + 1, 2 * index + 2

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split(args, kwargs)
            if middle in cuts:
                # The layer without its ffn ends where its attention does, in any architecture.
                with skipping(model, anatomy, {index: frozenset({Kind.FFN})}):
                    on_cut(middle, in_turns(hidden, *args, **kwargs)[0])
            output, rest = in_turns(hidden, *args, **kwargs)
            if end in cuts:
                on_cut(end, output)
            return output if rest is None else (output, *rest)

        return forward

    forwards = [wrap(index, layer) for index, layer in enumerate(layers)]
    with _replaced_forwards(layers, forwards):
        yield


@dataclass
class _Fitting:
    """What happens in front of every dropped run during the second sweep."""

    kind: BridgeKind
    rank: int
    given: Sequence[Tensors] | None
    states: Sequence[torch.Tensor]
    corrected: bool

    def __post_init__(self) -> None:
        self.bridges: list[Tensors] = [{} for _ in self.states]

    def settle(self, run: int, seen: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Fit the bridge of a run; returns what it and the correction add to the residual.

        Args:
            run: index of the run.
            seen: what the bridge is given, (num_sequences, seq_len, hidden_size).
            residual: what is added to; the same as `seen` unless a norm stands in between.
        """
        states = self.states[run]
        bridge = self._bridge(run, seen, residual)
        added = torch.empty_like(residual)
        for row in range(len(seen)):  # a second copy of all hidden states would be the largest
            added[row] = bridge.estimate(seen[row])
            if self.corrected:
                missed = states[row].to(residual.device) - residual[row] - added[row]
                added[row] += missed
                states[row].copy_(missed)
        return added

    def _bridge(self, run: int, seen: torch.Tensor, residual: torch.Tensor) -> Bridge:
        if self.given is not None:
            self.bridges[run] = dict(self.given[run])
        elif self.kind is not BridgeKind.OFF:
            moments = Moments(seen.shape[-1])
            for x, target, reached in zip(seen, self.states[run], residual, strict=True):
                moments.add(x, target.to(reached.device) - reached)
            self.bridges[run] = moments.solve(self.kind, rank=self.rank)
        tensors = self.bridges[run]
        return Bridge(tensors).to(seen.device) if tensors else Offset()


@contextmanager
def _bridging(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    runs: Sequence[Sequence[ComponentId]],
    fitting: _Fitting,
    rows: int,
) -> Iterator[None]:
    """The submodel, fitting the bridge of every dropped run when the sweep gets there."""
    layers = decoder_layers(model)
    starts = {run[0].layer: (index, run[0]) for index, run in enumerate(runs)}

    def wrap(index: int, layer: nn.Module) -> Any:
        if isinstance(layer, SkippedLayer):
            return _bridge_layer(layer, starts.get(index), fitting)
        in_turns = _in_turns(layer.forward, rows)
        if index not in starts:
            return _as_layer(in_turns)
        run, first = starts[index]
        stub = _stub_of(layer, anatomy[index], first)
        gain = _gain(layer, anatomy[index], first.kind)
        return _bridge_half(in_turns, stub, run, first.kind, fitting, gain, rows)

    forwards = [wrap(index, layer) for index, layer in enumerate(layers)]
    with _replaced_forwards(layers, forwards):
        yield


def _as_layer(in_turns: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _split(args, kwargs)
        output, rest = in_turns(hidden, *args, **kwargs)
        return output if rest is None else (output, *rest)

    return forward


def _bridge_layer(
    layer: SkippedLayer, start: tuple[int, ComponentId] | None, fitting: _Fitting
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _split(args, kwargs)
        if start is not None:
            hidden = hidden + fitting.settle(start[0], hidden, hidden)
        return (hidden,) + (None,) * (layer.returns - 1) if layer.returns else hidden

    return forward


def _bridge_half(
    in_turns: Callable[..., Any],
    stub: ZeroStub | SkippedLayer,
    run: int,
    kind: Kind,
    fitting: _Fitting,
    gain: float,
    rows: int,
) -> Callable[..., Any]:
    """A layer of which one half was dropped and begins a run."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _split(args, kwargs)
        seen = _Listener()
        stub.bridge = seen
        try:
            without, rest = in_turns(hidden, *args, **kwargs)
            # An ffn is the last to add to the stream; behind a dropped attention the ffn follows.
            residual = without if kind is Kind.FFN else hidden
            added = fitting.settle(run, torch.cat(seen.inputs).view_as(hidden), residual)
            if kind is Kind.FFN:
                output = without + added
            else:
                stub.bridge = _Recital(torch.split(added / gain, rows))
                output, rest = in_turns(hidden, *args, **kwargs)
        finally:
            stub.bridge = None
        return output if rest is None else (output, *rest)

    return forward


class _Listener(nn.Module):
    """Adds nothing, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.inputs.append(hidden)
        return torch.zeros_like(hidden)


class _Recital(nn.Module):
    """Adds prepared tensors, one per call."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._parts = iter(parts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return next(self._parts).view_as(hidden)
