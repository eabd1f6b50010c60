"""Bridges for the plans of a round, fitted by the coordinator on public text."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from fedpruner_common.modeling.bridges import save_bridges
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.data import collate, load_sequences, load_tokenizer, pad_token_id
from fedpruner_common.modeling.fitting import bridge_runs
from fedpruner_common.modeling.load import read_config
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind
from fedpruner_server.model import load_full_model

_ROWS = 4


class BridgeFitter:
    """The base model and the public text, loaded once."""

    def __init__(
        self, model_dir: Path, calibration: list[Path], *, max_seq_length: int, num_sequences: int
    ) -> None:
        """Load both; evenly spaced sequences of the text are used.

        Raises:
            DataError, ModelError: a file or the model cannot be used.
        """
        tokenizer = load_tokenizer(model_dir)
        sequences = load_sequences(calibration, tokenizer, max_seq_length=max_seq_length)
        stride = max(1, len(sequences) // num_sequences)
        chosen = sequences[::stride][:num_sequences]
        self._input_ids = collate(chosen, pad_token_id=pad_token_id(tokenizer)).input_ids
        self._anatomy = find_anatomy(read_config(model_dir))
        self._model: Any = load_full_model(model_dir)

    def fit(
        self,
        submodels: Sequence[Submodel],
        paths: Sequence[Path],
        *,
        kind: BridgeKind,
        rank: int,
        adapter_dir: Path | None,
    ) -> None:
        """Write the bridges of each submodel to its path, fitted with the adapter in place."""
        with ExitStack() as stack:
            base = self._model
            if adapter_dir is not None:
                peft_model = PeftModel.from_pretrained(self._model, str(adapter_dir))
                stack.callback(peft_model.unload)
                base = peft_model.get_base_model()
            for submodel, path in zip(submodels, paths, strict=True):
                save_bridges(self._bridges(base, submodel, kind, rank), path)

    def _bridges(
        self, model: Any, submodel: Submodel, kind: BridgeKind, rank: int
    ) -> list[dict[str, torch.Tensor]]:
        hidden_size = model.get_decoder().get_input_embeddings().weight.shape[1]
        shape = (*self._input_ids.shape, hidden_size)
        return bridge_runs(
            model,
            self._anatomy,
            submodel,
            self._input_ids,
            kind=kind,
            rank=rank,
            states=[torch.empty(shape, dtype=model.dtype) for _ in submodel.dropped_runs()],
            corrected=False,
            rows=_ROWS,
        )
