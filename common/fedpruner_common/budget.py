"""The byte model: what a submodel costs to train, and what of it fits a budget.

    peak = floor + text + weights + 12 P + activations          P = LoRA parameters, float32

12 P is the adapter and AdamW's two moments, 6 P with moments of 8 bit; the gradients (4 P more)
exist only while activations are already going, so the optimizer step, 16 P without activations, is
a second candidate for the peak. Activations with everything saved: the saved bytes of every
component plus the larger of the loss's buffers and one component's temporaries. With gradient
checkpointing: one input per kept layer, and the larger of the loss's buffers and one whole layer
recomputed.

Text is the tokenizer, the tokens, the model's own code and what torch keeps of the kernels it uses.
All this holds only where the training process sets a low mmap threshold; see `malloc.py`.
`benchmarks/memory` compares it with measured peaks.

Source: METHOD.md 2.3 and ENGINEERING.md A4 of the project's notes; saved bytes are counted exactly
by a forward pass on the meta device (server `describe`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from fedpruner_common.components import ComponentId
from fedpruner_common.task import BridgeKind, BridgeSettings

_ADAM_BYTES = 12.0  # per LoRA parameter: value 4, first and second moment 8
_GRADIENT_BYTES = 4
TEXT_BYTES = 12 << 20  # where nobody has looked at the model; at least that
_HIDDEN_COPIES = 5  # before and after a layer, behind a run, and what is written to disk


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of a model's parts for one training shape (dtype, batch, sequence, LoRA rank).

    Attributes:
        weight_bytes: component -> bytes of its base weights, as held in memory.
        shared_weight_bytes: embeddings, final norm, head.
        disk_ratio: stored bytes / held bytes; not 1 when the dtype changes on loading, and then the
            stored tensors are in memory too while they are converted. 0 when nothing is converted.
        lora_parameters: component -> LoRA parameters.
        saved_bytes: component -> activations kept for its backward.
        shared_saved_bytes: activations kept outside all components.
        layer_input_bytes: one layer's input, what checkpointing keeps per layer.
        temporary_bytes: component -> most its backward needs beside what was saved.
        loss_bytes: logits and their gradients at the loss.
        gradient_checkpointing: whether activations are recomputed layer by layer.
        hidden_size: width of the residual stream.
        num_batches: micro-batches of one round.
        trained_bytes: per LoRA parameter: its value and the optimizer's moments.
        loss_chunk: tokens whose logits exist at a time, of which `loss_bytes` is; 0 for all.
        text_bytes: tokenizer, tokens and the model's own code.
    """

    weight_bytes: Mapping[ComponentId, int]
    shared_weight_bytes: int
    disk_ratio: float
    lora_parameters: Mapping[ComponentId, int]
    saved_bytes: Mapping[ComponentId, int]
    shared_saved_bytes: int
    layer_input_bytes: int
    temporary_bytes: Mapping[ComponentId, int]
    loss_bytes: int
    gradient_checkpointing: bool
    hidden_size: int = 0
    num_batches: int = 1
    trained_bytes: float = _ADAM_BYTES
    loss_chunk: int = 0
    text_bytes: int = TEXT_BYTES


@dataclass(frozen=True)
class Demand:
    """What a set of components asks for, term by term.

    Attributes:
        weight_bytes, lora_parameters, saved_bytes: sums over the components.
        num_layers: layers of which at least one half is kept.
        layer_saved_bytes: saved bytes of the one layer that saves most.
        temporary_bytes: of the component that needs most.
    """

    weight_bytes: int
    lora_parameters: int
    saved_bytes: int
    num_layers: int
    layer_saved_bytes: int
    temporary_bytes: int


def demand(profile: MemoryProfile, components: Iterable[ComponentId]) -> Demand:
    """What exactly these components ask for."""
    kept = tuple(components)
    saved_by_layer: dict[int, int] = {}
    for c in kept:
        saved_by_layer[c.layer] = saved_by_layer.get(c.layer, 0) + profile.saved_bytes[c]
    return Demand(
        weight_bytes=sum(profile.weight_bytes[c] for c in kept),
        lora_parameters=sum(profile.lora_parameters[c] for c in kept),
        saved_bytes=sum(saved_by_layer.values()),
        num_layers=len(saved_by_layer),
        layer_saved_bytes=max(saved_by_layer.values(), default=0),
        temporary_bytes=max((profile.temporary_bytes[c] for c in kept), default=0),
    )


def activation_bytes(profile: MemoryProfile, wanted: Demand) -> int:
    """Most bytes of activations alive at once in one forward and backward."""
    if profile.gradient_checkpointing:
        kept = wanted.num_layers * profile.layer_input_bytes
        backward = wanted.layer_saved_bytes + wanted.temporary_bytes
    else:
        kept, backward = wanted.saved_bytes, wanted.temporary_bytes
    return profile.shared_saved_bytes + kept + max(profile.loss_bytes, backward)


def peak_bytes(profile: MemoryProfile, wanted: Demand, *, floor_bytes: int) -> int:
    """Peak memory of the training process.

    Args:
        profile: bytes of the model's parts.
        wanted: what a submodel asks for.
        floor_bytes: the process before any model, measured on the device.
    """
    weights = profile.shared_weight_bytes + wanted.weight_bytes
    converting = round(weights * profile.disk_ratio)
    trained = round(profile.trained_bytes * wanted.lora_parameters)
    training = trained + activation_bytes(profile, wanted)
    stepping = trained + _GRADIENT_BYTES * wanted.lora_parameters
    return floor_bytes + profile.text_bytes + weights + max(converting, training, stepping)


def predicted_peak_bytes(
    profile: MemoryProfile, components: Iterable[ComponentId], *, floor_bytes: int
) -> int:
    """Peak memory of the training process for exactly these components."""
    return peak_bytes(profile, demand(profile, components), floor_bytes=floor_bytes)


def bridge_bytes(kind: BridgeKind, *, hidden_size: int, rank: int) -> int:
    """Bytes of one bridge's own numbers, float32; see `modeling.bridges`."""
    numbers = {
        BridgeKind.OFF: 0,
        BridgeKind.SCALE: 1,
        BridgeKind.LOWRANK: 2 * hidden_size * min(rank, hidden_size) + hidden_size,
        BridgeKind.FULL: hidden_size * hidden_size + hidden_size,
    }
    return 4 * numbers[kind]


def bridge_bytes_per_run(profile: MemoryProfile, bridge: BridgeSettings) -> int:
    """Memory that one dropped run takes in training: its bridge, what it saves, its corrections.

    A map saves its input and its normalised input; the correction of one micro-batch is as large as
    a hidden state.
    """
    size = bridge_bytes(bridge.kind, hidden_size=profile.hidden_size, rank=bridge.rank)
    saved = 0 if bridge.kind is BridgeKind.OFF else 2 * profile.layer_input_bytes
    corrected = profile.layer_input_bytes if bridge.corrected else 0
    return size + saved + corrected


def sweep_peak_bytes(profile: MemoryProfile, bridge: BridgeSettings, *, floor_bytes: int) -> int:
    """Peak memory of a device's sweep through the full model, one layer resident at a time.

    The largest layer, the shared tensors, the whole adapter twice (as read and in place), the
    hidden states of all the round's tokens a few times over, and the moments of a bridge if one is
    fitted.
    """
    layers: dict[int, int] = {}
    for component, size in profile.weight_bytes.items():
        layers[component.layer] = layers.get(component.layer, 0) + size
    weights = profile.shared_weight_bytes + max(layers.values(), default=0)
    weights += round(weights * profile.disk_ratio)
    adapter = 2 * _GRADIENT_BYTES * sum(profile.lora_parameters.values())
    hidden = _HIDDEN_COPIES * profile.num_batches * profile.layer_input_bytes
    moments = 0
    if bridge.local and bridge.kind is not BridgeKind.OFF:
        moments = 4 * 8 * (profile.hidden_size + 1) ** 2
    passing = max(profile.temporary_bytes.values(), default=0)
    return floor_bytes + profile.text_bytes + weights + adapter + hidden + moments + passing


def streamed_peak_bytes(
    profile: MemoryProfile,
    streamed: Collection[int],
    *,
    floor_bytes: int,
    kept: Iterable[ComponentId] | None = None,
) -> int:
    """Peak memory of training with some layers in memory only while they work.

    A streamed layer keeps its input and is computed again for its backward; the others are held and
    save what they save.

    Args:
        profile: bytes of the model's parts.
        streamed: layers; with none of them this is the peak of `kept` as it is.
        floor_bytes: the process before any model, measured on the device.
        kept: components of the submodel, None for all.
    """
    by_layer: dict[int, list[ComponentId]] = {}
    for component in profile.weight_bytes if kept is None else kept:
        by_layer.setdefault(component.layer, []).append(component)
    resident = [c for layer, cs in by_layer.items() if layer not in streamed for c in cs]
    held = demand(profile, resident)
    passing = [
        sum(profile.weight_bytes[c] for c in by_layer[layer]) for layer in by_layer
        if layer in streamed
    ]  # fmt: skip
    weights = profile.shared_weight_bytes + held.weight_bytes
    converting = round(weights * profile.disk_ratio)
    weights += round(max(passing, default=0) * (1 + profile.disk_ratio))
    again = max(
        (sum(profile.saved_bytes[c] for c in by_layer[layer]) for layer in streamed), default=0
    )
    everything = [c for components in by_layer.values() for c in components]
    temporary = max((profile.temporary_bytes[c] for c in everything), default=0)
    if profile.gradient_checkpointing:
        saved = held.num_layers * profile.layer_input_bytes
        again = max(again, held.layer_saved_bytes)
    else:
        saved = held.saved_bytes
    saved += len(streamed) * profile.layer_input_bytes
    parameters = sum(profile.lora_parameters[c] for c in everything)
    activations = profile.shared_saved_bytes + saved + max(profile.loss_bytes, again + temporary)
    trained = round(profile.trained_bytes * parameters)
    training = trained + activations
    stepping = trained + _GRADIENT_BYTES * parameters
    return floor_bytes + profile.text_bytes + weights + max(converting, training, stepping)


def streaming_seconds(
    profile: MemoryProfile, streamed: Iterable[int], *, read_bytes_per_s: int
) -> float:
    """Time that one micro-batch reads streamed layers: each for its forward and its backward."""
    layers = set(streamed)
    size = sum(b for component, b in profile.weight_bytes.items() if component.layer in layers)
    stored = size * profile.disk_ratio if profile.disk_ratio else size
    return 2 * stored / read_bytes_per_s


def largest_that_fits(cost: Callable[[int], int], sizes: range, budget_bytes: int) -> int | None:
    """The largest size whose cost is within the budget, or None.

    Args:
        cost: size -> bytes, not decreasing.
        sizes: candidates, ascending.
        budget_bytes: what may be used.
    """
    fitting = [size for size in sizes if cost(size) <= budget_bytes]
    return fitting[-1] if fitting else None
