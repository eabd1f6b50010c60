"""The facts of a base model that planning needs, found on the meta device: no weights are read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from fedpruner_common.adapters import LoraTarget
from fedpruner_common.budget import MemoryProfile
from fedpruner_common.components import ComponentId, Kind, all_components
from fedpruner_common.errors import ConfigError, ModelError
from fedpruner_common.manifest import ITEM_BYTES, TensorInfo
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.load import TORCH_DTYPES, pruned_class, read_config
from fedpruner_common.modeling.meta import causal_lm_class, decoder_layers, meta_model
from fedpruner_common.spec import ModelSpec
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import SMALLEST_LOSS_CHUNK
from fedpruner_server.activations import saved_bytes
from fedpruner_server.config import LoraOptions, TrainingOptions

_LOSS_BYTES_PER_LOGIT = 12  # log-softmax and two gradients in float32; the logits are gone by then
_CHUNK_BYTES_PER_LOGIT = 8  # the logits and their log-softmax, which becomes the gradient in place
_CHUNK_BYTES = 128 << 20  # what `loss_chunk = auto` lets the loss take
_CODE_BYTES = 17 << 20  # the model's own code, and what torch keeps of the kernels it uses
_TOKEN_BYTES = 340  # of the tokenizer, per entry
_TRAINED_BYTES = {"adamw": 12.0, "adamw_8bit": 4 + 2 * (1 + 4 / 256)}  # a scale per 256 values


def describe(
    model_dir: Path,
    tensors: dict[str, TensorInfo],
    *,
    lora: LoraOptions,
    training: TrainingOptions,
) -> ModelSpec:
    """Everything planning needs to know of a model, for one training shape.

    Args:
        model_dir: Hugging Face directory.
        tensors: what its checkpoint holds.
        lora: rank and modules to adapt.
        training: dtype, batch and sequence that training will use.

    Raises:
        ModelError: the model cannot be pruned; the message says why.
        ConfigError: `target_modules` matches nothing.
    """
    config = read_config(model_dir)
    anatomy = find_anatomy(config)
    num_layers = len(anatomy)
    shared = _needed_tensors(config, anatomy, Submodel.of(num_layers, ()), tensors)
    needed = {
        component: _needed_tensors(config, anatomy, Submodel.of(num_layers, [component]), tensors)
        for component in all_components(num_layers)
    }
    component_tensors = {c: tuple(sorted(names - shared)) for c, names in needed.items()}
    targets, fan_in_fan_out = _lora_targets(config, anatomy, lora)
    memory = _memory_profile(
        config, anatomy, tensors, shared, component_tensors, targets, lora, training
    )
    return ModelSpec(
        num_layers=num_layers,
        shared_tensors=tuple(sorted(shared)),
        component_tensors=component_tensors,
        lora_targets=targets,
        fan_in_fan_out=fan_in_fan_out,
        memory=memory,
    )


# Which tensors of the checkpoint does a submodel need? transformers is asked itself, by loading
# stand-ins that note when they are read: names on disk may differ from names in the model.


class _Recorder:
    """Stands for a tensor on disk; what `from_pretrained` asks of a lazily loaded slice."""

    def __init__(self, info: TensorInfo, log: set[str]) -> None:
        self._info = info
        self._log = log
        self.shape = torch.Size(info.shape)
        self.dtype = TORCH_DTYPES[info.dtype]

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def get_dtype(self) -> str:
        return self._info.dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, _: Any) -> torch.Tensor:
        self._log.add(self._info.name)
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _needed_tensors(
    config: PreTrainedConfig,
    anatomy: list[LayerAnatomy],
    submodel: Submodel,
    tensors: dict[str, TensorInfo],
) -> set[str]:
    read: set[str] = set()
    pruned = pruned_class(causal_lm_class(config), anatomy, submodel.skipped())
    _, info = pruned.from_pretrained(
        None,
        config=config,
        state_dict={name: _Recorder(tensor, read) for name, tensor in tensors.items()},
        dtype=torch.float32,
        device_map={"": "meta"},
        output_loading_info=True,
    )
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(f"the checkpoint lacks tensors that its config asks for: {names}")
    return read


def _lora_targets(
    config: PreTrainedConfig, anatomy: list[LayerAnatomy], lora: LoraOptions
) -> tuple[dict[ComponentId, tuple[LoraTarget, ...]], bool]:
    """The linear modules to adapt, by component, and whether they store (in, out)."""
    model = meta_model(config)
    layers = decoder_layers(model)
    (stack_name,) = [name for name, module in model.named_modules() if module is layers]
    targets: dict[ComponentId, tuple[LoraTarget, ...]] = {}
    transposed = False
    for index, layer in enumerate(layers):
        for kind in Kind:
            found = []
            for name, module in _linear_modules(layer, anatomy[index], kind):
                transposed = transposed or isinstance(module, Conv1D)
                wanted = lora.target_modules == "all-linear" or (
                    name.rpartition(".")[2] in lora.target_modules
                )
                if wanted:
                    found.append(_lora_target(f"{stack_name}.{index}.{name}", module))
            targets[ComponentId(index, kind)] = tuple(found)
    if not any(targets.values()):
        raise ConfigError(f"lora.target_modules = {lora.target_modules!r} matches no linear module")
    return targets, transposed


def _linear_modules(
    layer: nn.Module, anatomy: LayerAnatomy, kind: Kind
) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    for child in anatomy.halves[kind].core:
        for name, module in getattr(layer, child).named_modules(prefix=child):
            if isinstance(module, (nn.Linear, Conv1D)):
                yield name, module


def _lora_target(name: str, module: nn.Linear | Conv1D) -> LoraTarget:
    rows, columns = module.weight.shape
    if isinstance(module, Conv1D):
        return LoraTarget(name, in_features=int(rows), out_features=int(columns))
    return LoraTarget(name, in_features=int(columns), out_features=int(rows))


def _memory_profile(
    config: PreTrainedConfig,
    anatomy: list[LayerAnatomy],
    tensors: dict[str, TensorInfo],
    shared: set[str],
    component_tensors: dict[ComponentId, tuple[str, ...]],
    targets: dict[ComponentId, tuple[LoraTarget, ...]],
    lora: LoraOptions,
    training: TrainingOptions,
) -> MemoryProfile:
    stored_dtypes = {tensors[name].dtype for name in shared}
    held = {"float32": 4, "bfloat16": 2}.get(training.dtype)

    def held_bytes(names: set[str] | tuple[str, ...]) -> int:
        return sum(
            tensors[n].num_bytes * held // ITEM_BYTES[tensors[n].dtype]
            if held
            else tensors[n].num_bytes
            for n in names
        )

    stored = sum(tensors[n].num_bytes for n in shared)
    converted = held is not None and stored != held_bytes(shared)
    item_bytes = held or min(ITEM_BYTES[dtype] for dtype in stored_dtypes)
    batch, seq_len = training.per_device_train_batch_size, training.max_seq_length
    num_tokens = batch * seq_len
    text_config = config.get_text_config(decoder=True)
    saved_shared, saved = saved_bytes(config, anatomy, targets, lora, training, item_bytes)
    loss_chunk = _loss_chunk(training.loss_chunk, num_tokens, text_config.vocab_size)
    width = {
        c: max((max(t.in_features, t.out_features) for t in items), default=0)
        for c, items in targets.items()
    }
    return MemoryProfile(
        weight_bytes={c: held_bytes(names) for c, names in component_tensors.items()},
        shared_weight_bytes=held_bytes(shared),
        disk_ratio=stored / held_bytes(shared) if converted else 0.0,
        lora_parameters={c: sum(t.num_parameters(lora.r) for t in i) for c, i in targets.items()},
        saved_bytes=saved,
        shared_saved_bytes=saved_shared,
        layer_input_bytes=num_tokens * text_config.hidden_size * item_bytes,
        temporary_bytes={
            c: num_tokens * (3 * w + 2 * text_config.hidden_size) * 4 for c, w in width.items()
        },
        loss_bytes=_loss_bytes(num_tokens, text_config, loss_chunk, item_bytes),
        text_bytes=_CODE_BYTES + _TOKEN_BYTES * text_config.vocab_size,
        gradient_checkpointing=training.gradient_checkpointing,
        hidden_size=text_config.hidden_size,
        num_batches=training.max_steps * training.gradient_accumulation_steps,
        trained_bytes=_TRAINED_BYTES[training.optim],
        loss_chunk=loss_chunk,
    )


def _loss_chunk(wanted: int | str, num_tokens: int, vocab_size: int) -> int:
    """Tokens whose logits exist at a time; 0 when all of a micro-batch's may."""
    if wanted != "auto":
        chunk = int(wanted)
    elif num_tokens * vocab_size * _LOSS_BYTES_PER_LOGIT <= _CHUNK_BYTES:
        chunk = 0
    else:
        fitting = max(SMALLEST_LOSS_CHUNK, _CHUNK_BYTES // (vocab_size * _CHUNK_BYTES_PER_LOGIT))
        chunk = 1 << (fitting.bit_length() - 1)
    return chunk if chunk < num_tokens else 0


def _loss_bytes(num_tokens: int, config: PreTrainedConfig, loss_chunk: int, item_bytes: int) -> int:
    """Most that the loss takes beside what is saved."""
    # A cap on the logits (Gemma 2) saves what it computes for its backward.
    capped = item_bytes if getattr(config, "final_logit_softcapping", None) else 0
    if not loss_chunk:
        return int(num_tokens * config.vocab_size * (_LOSS_BYTES_PER_LOGIT + capped))
    gradients = 2 * num_tokens * config.hidden_size * item_bytes  # the loss's, and it scaled
    return int(loss_chunk * config.vocab_size * (_CHUNK_BYTES_PER_LOGIT + 2 * capped) + gradients)
