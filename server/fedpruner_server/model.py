"""The full base model in the coordinator's torch process."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedpruner_common.errors import ModelError


def load_full_model(model_dir: Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The base model, ready for inference.

    In the dtype of its file it is a memory mapping: pages are read when used and the kernel may
    drop them again, so a model larger than memory works, slowly.

    Raises:
        ModelError: transformers cannot load it.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype or "auto",
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:  # transformers raises anything here
        raise ModelError(f"cannot load the base model in {model_dir}: {error}") from error
    return model.eval()
