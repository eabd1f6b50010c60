"""Tiny models twice: resident, as transformers loads them, and as mappings to be streamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch_support import CPU, TinyModel

from fedpruner_common.components import all_components
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.load import load_submodel, map_tensor, read_config
from fedpruner_common.modeling.streaming import streaming
from fedpruner_common.submodel import Submodel


def with_adapter(model: Any, *, seed: int = 3, dropout: float = 0.0) -> Any:
    """LoRA with random A and B on every linear module; the same seed gives the same values."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear",
        init_lora_weights=False, fan_in_fan_out=model.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def resident(tiny: TinyModel, *, adapter: bool, dropout: float = 0.0) -> Any:
    model: Any = tiny.full().requires_grad_(False)
    return with_adapter(model, dropout=dropout) if adapter else model


def mapped(tiny: TinyModel, dtype: torch.dtype = torch.float32) -> tuple[Any, list[torch.Tensor]]:
    """The model as mappings of its tensors' files, and these mappings."""
    config = read_config(tiny.path)
    tensors = {name: map_tensor(info, tiny.raw(name)) for name, info in tiny.infos.items()}
    everything = Submodel.of(tiny.num_layers, all_components(tiny.num_layers))
    model = load_submodel(config, find_anatomy(config), everything, tensors, dtype=dtype)
    return model.requires_grad_(False), list(tensors.values())


@contextmanager
def streamed(tiny: TinyModel, *, adapter: bool, dropout: float = 0.0) -> Iterator[Any]:
    """The model with every layer streamed from its files."""
    model, tensors = mapped(tiny)
    model = with_adapter(model, dropout=dropout) if adapter else model
    with streaming(model, range(tiny.num_layers), tensors, dtype=torch.float32, device=CPU):
        yield model
