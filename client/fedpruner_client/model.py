"""Cached tensors -> a submodel with the task's adapter, ready to train."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
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
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from fedpruner_common.adapters import from_peft
from fedpruner_common.errors import CorruptChunk, ModelError
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.load import TORCH_DTYPES, load_submodel, map_tensor, read_config
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.streaming import streaming
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LocalTensor:
    """A base tensor in the cache."""

    info: TensorInfo
    path: Path


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights, kept between tasks.

    Attributes:
        config: of the full model.
        anatomy: of its layers.
    """

    config: PreTrainedConfig
    anatomy: list[LayerAnatomy]

    @classmethod
    def read(cls, config_dir: Path) -> "Skeleton":
        """The skeleton of the model in a Hugging Face directory.

        Raises:
            ModelError: it cannot be pruned.
        """
        config = read_config(config_dir)
        return cls(config, find_anatomy(config))


@dataclass(frozen=True)
class MappedModel:
    """A transformers model and what its weights are.

    Attributes:
        model: the model; with the stored dtype its weights are the mappings.
        mapped: mappings of the cache files.
        dtype: to compute with; the weights' own unless they are streamed.
        device: to compute on.
        streamed: layers that rest as they are stored.
    """

    model: Any
    mapped: tuple[torch.Tensor, ...]
    dtype: torch.dtype
    device: torch.device
    streamed: Collection[int]

    def streaming(self) -> AbstractContextManager[None]:
        """Within a `with` block, the streamed layers can work; see `streaming`."""
        return streaming(
            self.model, self.streamed, self.mapped, dtype=self.dtype, device=self.device
        )


def build_submodel(
    skeleton: Skeleton,
    submodel: Submodel,
    tensors: Sequence[LocalTensor],
    *,
    dtype: str,
    device: torch.device,
    streamed: Collection[int] = (),
) -> MappedModel:
    """The submodel from the tensors this device was sent.

    Built on the meta device; with the stored dtype on the CPU its weights are mappings of the cache
    files and take no anonymous memory.

    Args:
        skeleton: of the full model.
        submodel: what to keep.
        tensors: all it needs, and no other.
        dtype: float32, bfloat16, or auto: as most tensors are stored.
        device: to train on.
        streamed: layers to leave as they are stored.

    Raises:
        ModelError: a tensor is missing or damaged, or the model cannot be pruned.
    """
    if len(skeleton.anatomy) != submodel.num_layers:
        raise ModelError(
            f"the task says {submodel.num_layers} layers, the config {len(skeleton.anatomy)}"
        )
    most_common = Counter(tensor.info.dtype for tensor in tensors).most_common(1)[0][0]
    stored = TORCH_DTYPES[most_common]
    wanted = _DTYPES.get(dtype) or stored
    mapped = {tensor.info.name: map_tensor(tensor.info, tensor.path) for tensor in tensors}
    model = load_submodel(
        skeleton.config,
        skeleton.anatomy,
        submodel,
        mapped,
        dtype=stored if streamed else wanted,
    )
    model.config.use_cache = False
    if streamed:
        _move_others(model, streamed, wanted, device)
    else:
        model = model.to(device)
    still = _used_by(model, streamed, mapped.values())
    return MappedModel(model, still, wanted, device, streamed)


def _used_by(
    model: Any, streamed: Collection[int], mapped: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The mappings that streamed layers are read from.

    Those that were converted go: as long as one lives, the pages that were read count as memory.
    """
    layers = decoder_layers(model)
    used = {p.untyped_storage().data_ptr() for i in streamed for p in layers[i].parameters()}
    return tuple(tensor for tensor in mapped if tensor.untyped_storage().data_ptr() in used)


def _move_others(
    model: Any, streamed: Collection[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Bring all but the streamed layers' parameters to where and how they are computed with."""
    layers = decoder_layers(model)
    resting = {id(p) for index in streamed for p in layers[index].parameters()}
    for parameter in model.parameters():
        if id(parameter) not in resting:
            parameter.data = parameter.data.to(device, dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def read_adapter(path: Path) -> dict[str, torch.Tensor]:
    """The adapter in a file, by PEFT's names.

    Raises:
        CorruptChunk: it is not a safetensors file.
    """
    try:
        values: dict[str, torch.Tensor] = load_file(path)
    except Exception as error:  # safetensors has an exception of its own
        raise CorruptChunk(f"the adapter cannot be read: {error}") from error
    return values


def adapted_modules(adapter: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The modules that an adapter is for, sorted.

    Raises:
        CorruptChunk: a name is not PEFT's.
    """
    try:
        return tuple(sorted({from_peft(key).rpartition(".")[0] for key in adapter}))
    except ValueError as error:
        raise CorruptChunk(f"the adapter cannot be used: {error}") from error


def part_of(adapter: Mapping[str, torch.Tensor], lora: LoraSettings) -> dict[str, torch.Tensor]:
    """The values of the task's own modules in an adapter that may be for more.

    Raises:
        CorruptChunk: a name is not PEFT's.
    """
    wanted = set(lora.target_modules) & set(adapted_modules(adapter))
    return {k: v for k, v in adapter.items() if from_peft(k).rpartition(".")[0] in wanted}


def add_adapter(
    model: Any, lora: LoraSettings, adapter: Path | Mapping[str, torch.Tensor]
) -> PeftModel:
    """Put LoRA on the task's modules, with the global adapter's values.

    Raises:
        CorruptChunk: the adapter is not the one these modules need.
    """
    values = read_adapter(adapter) if isinstance(adapter, Path) else dict(adapter)
    foreign = sorted(set(lora.target_modules) - {name for name, _ in model.named_modules()})
    if foreign:
        raise CorruptChunk(f"the adapter is for modules the model has not got: {foreign[0]}")
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        fan_in_fan_out=isinstance(model.get_submodule(lora.target_modules[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    expected = {name: value.shape for name, value in _adapter_state(peft_model).items()}
    found = {name: value.shape for name, value in values.items()}
    if found != expected:
        names = sorted(name for name, _ in found.items() ^ expected.items())[:3]
        raise CorruptChunk(f"the adapter does not fit the submodel: {', '.join(names)}")
    set_peft_model_state_dict(peft_model, values)
    # PEFT puts an adapter where its layer is, and a streamed layer only works on the device.
    device = model.get_input_embeddings().weight.device
    for name, module in peft_model.named_modules():
        if name.endswith((".lora_A", ".lora_B")):
            module.to(device)
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
