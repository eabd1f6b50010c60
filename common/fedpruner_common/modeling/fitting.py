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

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.bridges import Bridge, Moments
from fedpruner_common.modeling.forwards import (
    Beside,
    Compute,
    Forward,
    as_forward,
    replaced_forwards,
    split_output,
)
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.stubs import (
    SkippedLayer,
    ZeroStub,
    bare_layer,
    run_bare,
    skipping,
)
from fedpruner_common.modeling.sweep import device_of
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind

Tensors = dict[str, torch.Tensor]
Streamed = Callable[[], AbstractContextManager[None]]
Settle = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # see `_Fitting.settle`


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
    behind = {run[-1]: state for run, state in zip(runs, states, strict=True)}
    with torch.no_grad(), _noting(model, anatomy, behind, rows), streamed():
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
    layers, device = decoder_layers(model), device_of(model)
    installed = []
    for run, tensors in zip(submodel.dropped_runs(), bridges, strict=True):
        first = run[0]
        layer, parts = layers[first.layer], anatomy[first.layer]
        bridge = _bridge_of(tensors, gain=_gain(layer, parts, first.kind)).to(device)
        _stub_of(layer, parts, first.kind).bridge = bridge
        installed.append(bridge)
    return installed


class Offset(Bridge):
    """A bridge without a map: adds only what is noted for each token."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__({"scale": torch.zeros(1)}, gain=gain)

    def estimate(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)


def _bridge_of(tensors: Mapping[str, torch.Tensor], *, gain: float = 1.0) -> Bridge:
    return Bridge(tensors, gain=gain) if tensors else Offset(gain)


def _stub_of(layer: nn.Module, parts: LayerAnatomy, kind: Kind) -> ZeroStub | SkippedLayer:
    if isinstance(layer, SkippedLayer):
        return layer
    half = parts.halves[kind]
    stub = getattr(layer, next(child for child in half.core if child not in half.links))
    assert isinstance(stub, ZeroStub)
    return stub


def _gain(layer: nn.Module, parts: LayerAnatomy, kind: Kind) -> float:
    """What a layer multiplies a block's output with before it adds it to the residual stream."""
    if isinstance(layer, SkippedLayer):
        return 1.0
    bare = bare_layer(layer, parts)
    _stub_of(bare, parts, kind).bridge = Bridge({"scale": torch.ones(1)})
    x = torch.ones(1, 1, 4)
    return float((run_bare(bare, x) - x).mean())


# A sweep: the model's own forward, with every layer going through its sequences in turns.


def _run(model: Any, input_ids: torch.Tensor) -> None:
    model.get_decoder()(input_ids=input_ids.to(device_of(model)), use_cache=False)


def _in_turns(forward: Forward, rows: int) -> Compute:
    """What `forward` makes of all sequences, taking a few at a time."""

    def compute(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Beside]:
        total, output = len(hidden), torch.empty_like(hidden)
        beside: Beside = None
        for start in range(0, total, rows):
            part = slice(start, min(start + rows, total))
            result = forward(
                hidden[part],
                *(_rows_of(value, part, total) for value in args),
                **{name: _rows_of(value, part, total) for name, value in kwargs.items()},
            )
            output[part], beside = split_output(result)
        return output, beside

    return compute


def _rows_of(value: Any, part: slice, total: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[part] if value.dim() > 1 and len(value) == total > 1 else value
    if isinstance(value, (list, tuple)):
        return type(value)(_rows_of(item, part, total) for item in value)
    return value


def _noting(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    behind: Mapping[ComponentId, torch.Tensor],
    rows: int,
) -> AbstractContextManager[None]:
    """The full model, writing down the hidden states behind some components."""

    def noting(index: int, layer: nn.Module) -> Forward:
        in_turns = _in_turns(layer.forward, rows)
        attention, ffn = ComponentId(index, Kind.ATTENTION), ComponentId(index, Kind.FFN)

        def compute(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Beside]:
            if attention in behind:
                # The layer without its ffn ends where its attention does, in any architecture.
                with skipping(model, anatomy, {index: frozenset({Kind.FFN})}):
                    behind[attention].copy_(in_turns(hidden, *args, **kwargs)[0])
            output, beside = in_turns(hidden, *args, **kwargs)
            if ffn in behind:
                behind[ffn].copy_(output)
            return output, beside

        return as_forward(compute)

    layers = enumerate(decoder_layers(model))
    return replaced_forwards({layer: noting(index, layer) for index, layer in layers})


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
        bridge = self._fitted(run, seen, residual)
        added = torch.empty_like(residual)
        for row in range(len(seen)):  # a second copy of all hidden states would be the largest
            added[row] = bridge.estimate(seen[row])
            if self.corrected:
                missed = states[row].to(residual.device) - residual[row] - added[row]
                added[row] += missed
                states[row].copy_(missed)
        return added

    def _fitted(self, run: int, seen: torch.Tensor, residual: torch.Tensor) -> Bridge:
        if self.given is not None:
            self.bridges[run] = dict(self.given[run])
        elif self.kind is not BridgeKind.OFF:
            moments = Moments(seen.shape[-1])
            for x, target, reached in zip(seen, self.states[run], residual, strict=True):
                moments.add(x, target.to(reached.device) - reached)
            self.bridges[run] = moments.solve(self.kind, rank=self.rank)
        return _bridge_of(self.bridges[run]).to(seen.device)


def _bridging(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    runs: Sequence[Sequence[ComponentId]],
    fitting: _Fitting,
    rows: int,
) -> AbstractContextManager[None]:
    """The submodel, fitting the bridge of every dropped run when the sweep gets there.

    Of a whole layer it is the stub's bridge that does so, and stays for as long as the stub does.
    """
    layers = decoder_layers(model)
    computes = {
        layer: _in_turns(layer.forward, rows)
        for layer in layers
        if not isinstance(layer, SkippedLayer)
    }
    for number, run in enumerate(runs):
        layer, parts, kind = layers[run[0].layer], anatomy[run[0].layer], run[0].kind
        stub, settle = _stub_of(layer, parts, kind), partial(fitting.settle, number)
        if isinstance(stub, SkippedLayer):
            stub.bridge = _Settled(settle)
        else:
            gain = _gain(layer, parts, kind)
            computes[layer] = _bridge_half(computes[layer], stub, kind, settle, gain, rows)
    return replaced_forwards({layer: as_forward(compute) for layer, compute in computes.items()})


def _bridge_half(
    in_turns: Compute,
    stub: ZeroStub,
    kind: Kind,
    settle: Settle,
    gain: float,
    rows: int,
) -> Compute:
    """A layer of which one half was dropped and begins a run."""

    def compute(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Beside]:
        stub.bridge = listener = _Listener()
        output, beside = in_turns(hidden, *args, **kwargs)
        # An ffn is the last to add to the stream; behind a dropped attention the ffn follows.
        residual = output if kind is Kind.FFN else hidden
        added = settle(torch.cat(listener.inputs).view_as(hidden), residual)
        if kind is Kind.FFN:
            output += added
        else:
            stub.bridge = _Recital(torch.split(added / gain, rows))
            output, beside = in_turns(hidden, *args, **kwargs)
        stub.bridge = None
        return output, beside

    return compute


class _Settled(nn.Module):
    """Adds what settles a run that begins with a whole layer."""

    def __init__(self, settle: Settle) -> None:
        super().__init__()
        self._settle = settle

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._settle(hidden, hidden)


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
