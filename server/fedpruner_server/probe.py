"""Layer statistics on calibration text, by the coordinator, which has the whole model.

The model itself is a memory mapping of its file, and is streamed: one layer resident at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from fedpruner_common.errors import ModelError
from fedpruner_common.modeling import probe as common
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.data import load_sequences, load_tokenizer, pad_token_id
from fedpruner_common.modeling.load import read_config
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.streaming import streaming
from fedpruner_common.statistics import Granularity, Score, Statistics
from fedpruner_server.model import load_full_model

_MAPS = Path("/proc/self/maps")


def probe(
    model_dir: Path,
    calibration: list[Path],
    *,
    granularity: Granularity,
    score: str,
    max_seq_length: int,
    num_sequences: int,
    seed: int,
    adapter_dir: Path | None = None,
    rms_rows: bool = True,
) -> Statistics:
    """CKA and importance of every layer's items.

    Args:
        model_dir: Hugging Face directory.
        calibration: files of public text.
        granularity: which families are needed.
        score: one of `Score`.
        max_seq_length: of the calibration sequences.
        num_sequences: how many of them to use.
        seed: of which sequences and tokens are taken.
        adapter_dir: exported adapter to apply; None for the base model.
        rms_rows: scale tokens alike before CKA.

    Raises:
        DataError, ModelError: a file, the model or the adapter cannot be used.
        ValueError: there is no such score.
    """
    wanted = Score(score)
    config = read_config(model_dir)
    anatomy = find_anatomy(config)
    tokenizer = load_tokenizer(model_dir)
    sequences = load_sequences(calibration, tokenizer, max_seq_length=max_seq_length)
    batches = common.draw(
        sequences,
        num_sequences,
        pad_token_id=pad_token_id(tokenizer),
        rng=np.random.default_rng(seed),
    )
    model = _load(model_dir, adapter_dir)
    with _streamed(model, model_dir):
        return common.probe(
            model,
            anatomy,
            batches,
            families=granularity.families,
            score=wanted,
            rng=np.random.default_rng(seed),
            source="public",
            rms_rows=rms_rows,
        )


def _load(model_dir: Path, adapter_dir: Path | None) -> Any:
    """The frozen base model, with the adapter if there is one."""
    model = load_full_model(model_dir).requires_grad_(False)
    if adapter_dir is None:
        return model
    try:
        # Trainable, or its tensors would count as base weights and `fisher` had no gradients.
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=True)
    except Exception as error:  # PEFT raises anything here
        raise ModelError(f"cannot load the adapter in {adapter_dir}: {error}") from error


@contextmanager
def _streamed(model: nn.Module, model_dir: Path) -> Iterator[None]:
    """Stream the layers whose weights are all mapped; others were converted and stay resident."""
    maps = _maps(model_dir)
    mapped = [p for p in model.parameters() if not p.requires_grad and _is_in(p, maps)]
    known = {id(parameter) for parameter in mapped}
    layers = [
        index
        for index, layer in enumerate(decoder_layers(model))
        if all(p.requires_grad or id(p) in known for p in layer.parameters())
    ]
    with streaming(model, layers, mapped, dtype=None, device=torch.device("cpu")):
        yield


def _maps(model_dir: Path) -> list[range]:
    """Addresses where files of the model are mapped privately; none where the system won't say."""
    if not _MAPS.exists():
        return []
    # Resolved: a download cache keeps the files elsewhere, behind links.
    files = {str(path.resolve()) for path in model_dir.glob("*.safetensors")}
    found = []
    for line in _MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].endswith("p") and fields[5] in files:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            found.append(range(start, end))
    return found


def _is_in(tensor: torch.Tensor, maps: list[range]) -> bool:
    return any(tensor.untyped_storage().data_ptr() in place for place in maps)
