"""Scoring an adapter: loss of the full model on held-out text."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.data import (
    Batch,
    collate,
    load_sequences,
    load_tokenizer,
    pad_token_id,
)
from fedpruner_common.modeling.fitting import install_bridges
from fedpruner_common.modeling.stubs import skipping
from fedpruner_common.submodel import Submodel
from fedpruner_server.model import load_full_model

_BATCH_SIZE = 8


class Evaluator:
    """The full base model and the held-out text, loaded once."""

    def __init__(
        self, model_dir: Path, files: list[Path], *, max_seq_length: int, max_sequences: int
    ) -> None:
        """Load both; at most `max_sequences` evenly spaced sequences of each file are used.

        Raises:
            DataError, ModelError: a file or the model cannot be used.
        """
        tokenizer = load_tokenizer(model_dir)
        self._batches: dict[str, list[Batch]] = {}
        for file in files:
            sequences = load_sequences([file], tokenizer, max_seq_length=max_seq_length)
            stride = -(-len(sequences) // max_sequences)
            chosen = sequences[::stride]
            name = file.stem if file.stem not in self._batches else str(file)
            self._batches[name] = [
                collate(chosen[start : start + _BATCH_SIZE], pad_token_id=pad_token_id(tokenizer))
                for start in range(0, len(chosen), _BATCH_SIZE)
            ]
        self._model: PreTrainedModel = load_full_model(model_dir)
        self._anatomy: list[LayerAnatomy] | None = None

    def losses(
        self,
        adapter_dir: Path | None,
        *,
        submodel: Submodel | None = None,
        bridges: Sequence[Mapping[str, torch.Tensor]] | None = None,
    ) -> dict[str, float]:
        """Mean loss in nats per token of each file.

        Args:
            adapter_dir: exported adapter; None for the base model.
            submodel: to evaluate instead of the full model.
            bridges: of its dropped runs.
        """
        with ExitStack() as stack:
            model: torch.nn.Module = self._model
            if adapter_dir is not None:
                peft_model = PeftModel.from_pretrained(self._model, str(adapter_dir))
                stack.callback(peft_model.unload)
                model = peft_model
            if submodel is not None:
                if self._anatomy is None:
                    self._anatomy = find_anatomy(self._model.config)
                stack.enter_context(skipping(self._model, self._anatomy, submodel.skipped()))
                if bridges is not None:
                    install_bridges(self._model, self._anatomy, submodel, bridges)
            return {name: self._loss(model, batches) for name, batches in self._batches.items()}

    @staticmethod
    def _loss(model: torch.nn.Module, batches: list[Batch]) -> float:
        total, num_tokens = 0.0, 0
        with torch.inference_mode():
            for batch in batches:
                loss = model(**batch.arguments(torch.device("cpu"))).loss.item()
                total += loss * batch.num_tokens
                num_tokens += batch.num_tokens
        return total / max(num_tokens, 1)
