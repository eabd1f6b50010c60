"""A model without its weights: the meta device has shapes and names, and takes no memory."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fedpruner_common.errors import ModelError


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class of a causal language model.

    Raises:
        ModelError: this configuration has none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model type {config.model_type!r} is not a causal language model")
    model_class: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class


def meta_model(config: PreTrainedConfig, *, attention: str | None = None) -> PreTrainedModel:
    """The model on the meta device: shapes and names, no memory.

    Args:
        config: of the model; not changed.
        attention: attention implementation to use instead of the configured one.
    """
    config = copy.deepcopy(config)
    _make_traceable(config)
    if attention:
        config._attn_implementation = attention
    with torch.device("meta"):
        return causal_lm_class(config)(config)


def _make_traceable(config: PreTrainedConfig) -> None:
    """Avoid the few branches that look at values, which the meta device has not got."""

    def plain_rope(parameters: dict[str, Any]) -> None:
        for value in parameters.values():
            if isinstance(value, dict):
                plain_rope(value)
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            parameters["rope_type"] = "default"

    if isinstance(getattr(config, "rope_parameters", None), dict):
        plain_rope(config.rope_parameters)
    config._experts_implementation = "batched_mm"
    config.pad_token_id = None


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: the module list of the configured length nearest the root.

    Raises:
        ModelError: there is none.
    """
    config: Any = model.config
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    stacks = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no stack of {num_layers} decoder layers")
    return min(stacks, key=lambda stack: stack[0])[1]
