"""Load a submodel through transformers' public `from_pretrained`.

A throw-away subclass drops the halves right after construction, on the meta device, before any
weight is looked at. Names, dtype conversion, fused or tied weights and buffers stay transformers'
own business, for every architecture.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from fedpruner_common.components import Kind
from fedpruner_common.errors import ModelError
from fedpruner_common.manifest import ITEM_BYTES, TensorInfo
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.meta import causal_lm_class
from fedpruner_common.modeling.stubs import apply_stubs
from fedpruner_common.out_of_memory import is_out_of_memory
from fedpruner_common.submodel import Submodel

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
assert set(TORCH_DTYPES) == set(ITEM_BYTES)


def read_config(model_dir: Path) -> PreTrainedConfig:
    """The model's configuration, its own dropout off; never runs code from the directory.

    A frozen model has nothing to regularise (LoRA has a dropout of its own), and any dropout in
    attention forces a path that saves half as much again for the backward pass.

    Raises:
        ModelError: missing, unreadable or of an unknown model type.
    """
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir} is not a model directory: it has no config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            model_dir, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises anything here
        raise ModelError(f"{model_dir / 'config.json'} cannot be used: {error}") from error
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def pruned_class(
    base: type[PreTrainedModel],
    anatomy: list[LayerAnatomy],
    skipped: Mapping[int, frozenset[Kind]],
) -> type[PreTrainedModel]:
    """A subclass that is built without the skipped halves.

    It keeps the base's module name: transformers converts weights only for its own classes, and
    silently re-initialises them for others.
    """

    def __init__(
        self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any
    ) -> None:
        base.__init__(self, config, *args, **kwargs)
        apply_stubs(self, anatomy, skipped)

    names = {"__init__": __init__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), names)


def map_tensor(info: TensorInfo, path: Path) -> torch.Tensor:
    """A tensor that is a private view of a file of raw bytes: no copy, no anonymous memory.

    Raises:
        ModelError: the file does not have the promised length.
    """
    if not path.is_file() or path.stat().st_size != info.num_bytes:
        raise ModelError(f"tensor {info.name}: {path} is not {info.num_bytes} bytes")
    dtype = TORCH_DTYPES[info.dtype]
    num_elements = info.num_bytes // ITEM_BYTES[info.dtype]
    flat = torch.from_file(str(path), shared=False, size=num_elements, dtype=dtype)
    return flat.view(info.shape)


def load_submodel(
    config: PreTrainedConfig,
    anatomy: list[LayerAnatomy],
    submodel: Submodel,
    tensors: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The submodel as a transformers model, from exactly the tensors it needs.

    With tensors of the same dtype the parameters are those tensors, not copies.

    Args:
        config: of the full model.
        anatomy: of the full model.
        submodel: what to keep.
        tensors: name in the base checkpoint -> value.
        dtype: of the parameters.

    Raises:
        ModelError: a tensor is missing, superfluous or of another shape.
    """
    model_class = causal_lm_class(config)
    pruned = pruned_class(model_class, anatomy, submodel.skipped())
    try:
        model, info = pruned.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"the submodel's tensors cannot be loaded: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            names = ", ".join(sorted(map(str, info[what]))[:5])
            raise ModelError(f"the submodel's tensors have {what.replace('_', ' ')}: {names}")
    model.__class__ = model_class  # the subclass was needed for construction only
    return model
