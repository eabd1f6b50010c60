"""Base model and adapter folded into one Hugging Face directory."""

from pathlib import Path

from peft import PeftModel

from fedpruner_common.modeling.data import load_tokenizer
from fedpruner_server.model import load_full_model


def merge(model_dir: Path, adapter_dir: Path, output_dir: Path) -> None:
    """Write the merged model and its tokenizer; needs memory for the whole model.

    Raises:
        ModelError: the base model cannot be loaded.
    """
    model = PeftModel.from_pretrained(load_full_model(model_dir), str(adapter_dir))
    model.merge_and_unload().save_pretrained(output_dir)
    load_tokenizer(model_dir).save_pretrained(output_dir)
