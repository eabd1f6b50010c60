"""Which modules of a decoder layer make up its attention half and its ffn half.

Traced, not tabulated: one forward pass on the meta device with hooks on every direct child of
every layer. A child with matrices that is handed attention masks, positions or a cache is the
attention core; the other children with matrices are the ffn core. A norm or dropout whose output is
the core's input is `pre`, one fed by the core's output is `post`. This holds for dozens of
architectures without naming one; `check` proves it for the model at hand before anything relies on
it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedpruner_common.components import Kind
from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.meta import decoder_layers

# Arguments that only a token mixer takes.
_MIXER_ARGUMENTS = {
    "alibi", "attention_mask", "cache_params", "cache_position", "conv_mask", "head_mask",
    "layer_past", "past_key_value", "past_key_values", "position_embeddings", "position_ids",
}  # fmt: skip
_HIDDEN_ARGUMENTS = ("hidden_states", "x", "hidden_state")


@dataclass(frozen=True)
class Half:
    """The modules of one half of a layer, by the names of the layer's direct children.

    Attributes:
        core: child -> length of the tuple it returns, 0 for a bare tensor; in order of execution.
        links: cores whose output only feeds a later core (fc1 of fc1 -> fc2), not the residual.
        pre: norms in front of the core.
        post: norms or dropouts between the core and the residual stream.
        adds_residual: the core is handed the residual stream and adds it itself.
    """

    core: dict[str, int]
    links: frozenset[str]
    pre: tuple[str, ...]
    post: tuple[str, ...]
    adds_residual: bool


@dataclass(frozen=True)
class LayerAnatomy:
    """One decoder layer.

    Attributes:
        halves: attention and ffn, as far as the layer has them.
        shared: `pre` modules that both halves read (parallel attention and ffn).
        returns: length of the tuple the layer returns, 0 for a bare tensor.
    """

    halves: dict[Kind, Half]
    shared: frozenset[str]
    returns: int


@dataclass
class _Call:
    """One execution of a direct child during the trace; tensors are known by their id."""

    child: str
    module: nn.Module
    inputs: set[int]
    first_hidden: int | None
    outputs: set[int]
    returns: int
    is_mixer: bool

    @property
    def has_matrices(self) -> bool:
        return any(p.dim() >= 2 for p in self.module.parameters())


@dataclass
class _Trace:
    calls: list[_Call] = field(default_factory=list)
    hidden: int | None = None
    returns: int = 0


def trace_anatomy(model: PreTrainedModel) -> list[LayerAnatomy]:
    """The anatomy of every layer of a meta model, as one forward pass shows it.

    Raises:
        ModelError: the model cannot be run without its weights, or a layer has no two halves.
    """
    return [_layer_anatomy(trace, index) for index, trace in enumerate(_trace(model))]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _tuple_length(output: Any) -> int:
    return len(output) if isinstance(output, tuple) else 0


@contextmanager
def _recording(model: nn.Module, traces: list[_Trace], alive: list[Any]) -> Iterator[None]:
    """Fill one trace per layer while the model runs; `alive` keeps tensors so ids stay unique."""
    handles = []

    def watch_layer(layer: nn.Module, trace: _Trace) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            trace.hidden = id(hidden)
            alive.append(hidden)

        def after(_: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            trace.returns = _tuple_length(output)

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))

    def watch_child(name: str, child: nn.Module, trace: _Trace) -> None:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = [*_tensors(args), *_tensors({n: kwargs.get(n) for n in _HIDDEN_ARGUMENTS})]
            inputs, outputs = [*_tensors(args), *_tensors(kwargs)], list(_tensors(output))
            alive.extend((*inputs, *outputs))
            parameters = set(inspect.signature(module.forward).parameters) | set(kwargs)
            trace.calls.append(
                _Call(
                    child=name,
                    module=module,
                    inputs={id(t) for t in inputs},
                    first_hidden=id(hidden[0]) if hidden else None,
                    outputs={id(t) for t in outputs},
                    returns=_tuple_length(output),
                    is_mixer=bool(_MIXER_ARGUMENTS & parameters),
                )
            )

        handles.append(child.register_forward_hook(after, with_kwargs=True))

    for layer, trace in zip(decoder_layers(model), traces, strict=True):
        watch_layer(layer, trace)
        for name, child in layer.named_children():
            watch_child(name, child, trace)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace(model: PreTrainedModel) -> list[_Trace]:
    """Run the meta model once and return what every layer did."""
    seq_len = 4
    ids = torch.zeros(1, seq_len, dtype=torch.long, device="meta")
    # A 4-D float mask avoids a check for packed sequences that reads values.
    mask = torch.zeros(1, 1, seq_len, seq_len, device="meta", dtype=model.dtype)
    attempts: list[dict[str, Any]] = [
        {"attention_mask": mask, "use_cache": False},
        {"use_cache": True},
        {"use_cache": False},
    ]
    reason: Exception | None = None
    for arguments in attempts:
        traces = [_Trace() for _ in decoder_layers(model)]
        alive: list[Any] = []
        try:
            with torch.no_grad(), _recording(model, traces, alive):
                model(input_ids=ids, **arguments)
        except Exception as error:  # transformers raises anything here
            reason = error
            continue
        if all(trace.hidden is not None for trace in traces):
            return traces
    raise ModelError(f"{type(model).__name__} cannot be traced without its weights: {reason}")


def _layer_anatomy(trace: _Trace, index: int) -> LayerAnatomy:
    cores = {
        Kind.ATTENTION: [c for c in trace.calls if c.has_matrices and c.is_mixer],
        Kind.FFN: [c for c in trace.calls if c.has_matrices and not c.is_mixer],
    }
    for kind, calls in cores.items():
        if not calls:
            raise ModelError(f"layer {index} has no separate {kind.value} module to prune")
    halves = {kind: _half(calls, trace) for kind, calls in cores.items()}
    attention, ffn = halves[Kind.ATTENTION], halves[Kind.FFN]
    # What one half's output feeds may be the norm in front of the other: that is its pre, not post.
    halves = {
        Kind.ATTENTION: _without_post(attention, ffn.pre),
        Kind.FFN: _without_post(ffn, attention.pre),
    }
    shared = frozenset(attention.pre) & frozenset(ffn.pre)
    return LayerAnatomy(halves=halves, shared=shared, returns=trace.returns)


def _without_post(half: Half, names: tuple[str, ...]) -> Half:
    post = tuple(name for name in half.post if name not in names)
    return Half(half.core, half.links, half.pre, post, half.adds_residual)


def _half(core: list[_Call], trace: _Trace) -> Half:
    light = [call for call in trace.calls if not call.has_matrices]
    core_inputs = set().union(*(call.inputs for call in core))
    pre = tuple(call.child for call in light if call.outputs & core_inputs)
    post, frontier = [], set(core[-1].outputs)
    for call in light:
        if call.first_hidden in frontier:
            post.append(call.child)
            frontier |= call.outputs
    first = core[0]
    adds_residual = (
        trace.hidden in first.inputs
        and first.first_hidden is not None
        and first.first_hidden != trace.hidden
    )
    return Half(
        core={call.child: call.returns for call in core},
        links=_links(core, trace),
        pre=pre,
        post=tuple(post),
        adds_residual=adds_residual,
    )


def _links(core: list[_Call], trace: _Trace) -> frozenset[str]:
    """Cores whose output reaches a later core, directly or through light modules."""
    links = set()
    for call in core[:-1]:
        reach = set(call.outputs)
        for later in trace.calls[trace.calls.index(call) + 1 :]:
            if not later.inputs & reach:
                continue
            if later in core:
                links.add(call.child)
                break
            reach |= later.outputs
    return frozenset(links)
