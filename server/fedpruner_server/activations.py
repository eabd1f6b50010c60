"""Bytes that a forward pass keeps for its backward, counted on the meta device: exact, and free."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from fedpruner_common.adapters import LoraTarget
from fedpruner_common.components import ComponentId, all_components
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.meta import causal_lm_class, decoder_layers, meta_model
from fedpruner_common.modeling.stubs import apply_stubs
from fedpruner_common.submodel import Submodel
from fedpruner_server.config import LoraOptions, TrainingOptions


class _SavedByAttention(torch.autograd.Function):
    """Saves what the fused attention kernels save, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        log_sum_exp = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, log_sum_exp)
        return output

    @staticmethod
    def backward(_ctx: Any, *_: torch.Tensor) -> Any:
        raise AssertionError("only counted, never run backwards")


def _counting_attention(
    _module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    output: torch.Tensor = _SavedByAttention.apply(q, k, v)
    return output, None


def saved_bytes(
    config: PreTrainedConfig,
    anatomy: list[LayerAnatomy],
    targets: dict[ComponentId, tuple[LoraTarget, ...]],
    lora: LoraOptions,
    training: TrainingOptions,
    item_bytes: int,
) -> tuple[int, dict[ComponentId, int]]:
    """Bytes saved for backward outside all components, and by each component.

    A component's bytes are those of a model that has no other. Components of the same shapes cost
    the same, so each kind of layer is measured once.
    """
    num_layers = len(anatomy)
    full = meta_model(config)
    known: dict[tuple[Any, ...], int] = {}
    dtype = torch.bfloat16 if item_bytes == 2 else torch.float32

    def measure(components: list[ComponentId]) -> int:
        model = _adapted_meta_model(config, anatomy, components, targets, lora, dtype)
        return _count_saved(model, training)

    shared = measure([])
    saved = {}
    for component in all_components(num_layers):
        layer = decoder_layers(full)[component.layer]
        half = anatomy[component.layer].halves[component.kind]
        shapes = [
            (child, name, tuple(p.shape))
            for child in (*half.core, *half.pre, *half.post)
            for name, p in getattr(layer, child).named_parameters()
        ]
        key = (component.kind, type(layer).__name__, *shapes)
        if key not in known:
            known[key] = measure([component]) - shared
        saved[component] = known[key]
    return shared, saved


def _adapted_meta_model(
    config: PreTrainedConfig,
    anatomy: list[LayerAnatomy],
    components: list[ComponentId],
    targets: dict[ComponentId, tuple[LoraTarget, ...]],
    lora: LoraOptions,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The submodel of some components on the meta device, with LoRA on what it has of targets."""
    attention = "eager"
    if causal_lm_class(config)._supports_sdpa:
        ALL_ATTENTION_FUNCTIONS.register("fedpruner_counting", _counting_attention)
        attention = "fedpruner_counting"
    model = meta_model(config, attention=attention).to(dtype)
    model.requires_grad_(False)
    apply_stubs(model, anatomy, Submodel.of(len(anatomy), components).skipped())
    modules = [target.module for component in components for target in targets[component]]
    if modules:
        lora_config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=modules,
            fan_in_fan_out=isinstance(model.get_submodule(modules[0]), Conv1D),
            task_type="CAUSAL_LM",
        )
        get_peft_model(model, lora_config)
    return model


def _count_saved(model: PreTrainedModel, training: TrainingOptions) -> int:
    """Bytes that a forward pass of the decoder keeps for its backward, each storage once."""
    batch, seq_len = training.per_device_train_batch_size, training.max_seq_length
    model.train()
    own = {_storage_id(t) for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if _storage_id(tensor) not in own:
            seen[_storage_id(tensor)] = tensor.untyped_storage()
        return tensor

    decoder: Any = model.get_decoder()
    # Below the first component nothing needs a gradient and nothing is saved, yet any component can
    # come first: count as if its input needed one.
    handle = decoder.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.requires_grad_(True)
    )
    arguments: dict[str, Any] = {"use_cache": False}
    if model.config._attn_implementation == "eager":
        shape = (1, 1, seq_len, seq_len)
        arguments["attention_mask"] = torch.zeros(shape, device="meta", dtype=model.dtype)
    ids = torch.zeros(batch, seq_len, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(input_ids=ids, **arguments)
    finally:
        handle.remove()
    return sum(storage.nbytes() for storage in seen.values())


def _storage_id(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage; views of one storage share it."""
    return tensor.untyped_storage()._cdata
