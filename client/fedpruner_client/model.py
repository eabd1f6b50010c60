"""Cached tensors -> a submodel with the task's adapter, ready to train."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from fedpruner_common.errors import CorruptChunk, ModelError
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.load import TORCH_DTYPES, load_submodel, map_tensor, read_config
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LocalTensor:
    """A base tensor in the cache."""

    info: TensorInfo
    path: Path


def build_submodel(
    config_dir: Path,
    submodel: Submodel,
    tensors: list[LocalTensor],
    *,
    dtype: str,
    device: torch.device,
) -> Any:
    """The submodel from exactly the tensors this device was sent.

    Built on the meta device; with the stored dtype on the CPU its weights are mappings of the cache
    files and take no anonymous memory.

    Args:
        config_dir: config and tokenizer of the full model.
        submodel: what to keep.
        tensors: all it needs.
        dtype: float32, bfloat16, or auto: as most tensors are stored.
        device: to train on.

    Raises:
        ModelError: a tensor is missing or damaged, or the model cannot be pruned.
    """
    config = read_config(config_dir)
    anatomy = find_anatomy(config)
    if len(anatomy) != submodel.num_layers:
        raise ModelError(f"the task says {submodel.num_layers} layers, the config {len(anatomy)}")
    most_common = Counter(tensor.info.dtype for tensor in tensors).most_common(1)[0][0]
    model = load_submodel(
        config,
        anatomy,
        submodel,
        {tensor.info.name: map_tensor(tensor.info, tensor.path) for tensor in tensors},
        dtype=_DTYPES.get(dtype) or TORCH_DTYPES[most_common],
    )
    model.config.use_cache = False
    return model.to(device)


def add_adapter(model: Any, lora: LoraSettings, adapter_path: Path) -> PeftModel:
    """Put LoRA on the task's modules, with the global adapter's values.

    Raises:
        CorruptChunk: the adapter is not the one these modules need.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        fan_in_fan_out=isinstance(model.get_submodule(lora.target_modules[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    try:
        values = load_file(adapter_path)
    except Exception as error:  # safetensors has an exception of its own
        raise CorruptChunk(f"the adapter cannot be read: {error}") from error
    expected = {name: value.shape for name, value in _adapter_state(peft_model).items()}
    found = {name: value.shape for name, value in values.items()}
    if found != expected:
        names = sorted(name for name, _ in found.items() ^ expected.items())[:3]
        raise CorruptChunk(f"the adapter does not fit the submodel: {', '.join(names)}")
    set_peft_model_state_dict(peft_model, values)
    return peft_model


def _adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors by PEFT's names; without the embeddings, which nobody trains."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def save_update(model: PeftModel, path: Path) -> None:
    """Write the trained adapter values, float32, in PEFT's spelling."""
    state = _adapter_state(model)
    tensors = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in state.items()}
    save_file(tensors, path, metadata={"format": "pt"})
