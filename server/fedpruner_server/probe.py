"""Layer statistics on calibration text, by the coordinator, which has the whole model.

The model itself is a memory mapping of its file; what is held besides is one batch's activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpruner_common.components import Kind
from fedpruner_common.modeling.anatomy import Half, LayerAnatomy
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.data import (
    Batch,
    TokenSequence,
    collate,
    load_sequences,
    load_tokenizer,
    pad_token_id,
)
from fedpruner_common.modeling.load import read_config
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.stubs import skipping
from fedpruner_server.core.similarity import CkaAccumulator, gram
from fedpruner_server.core.statistics import Family, FamilyStatistics, Granularity, Statistics
from fedpruner_server.model import load_full_model

_BATCH_SIZE = 4
_TOKENS_PER_GRAM = 256
# The first tokens of a sequence have outputs unlike all others (attention sinks).
_SKIPPED_POSITIONS = 4


def probe(
    model_dir: Path,
    calibration: list[Path],
    *,
    granularity: Granularity,
    score: str,
    max_seq_length: int,
    num_sequences: int,
    seed: int,
) -> Statistics:
    """CKA and importance of every layer's items.

    Args:
        model_dir: Hugging Face directory.
        calibration: files of public text.
        granularity: which families are needed.
        score: `loo`, the rise of the loss without the item (one forward pass per item), or `bi`,
            Block Influence, one minus the cosine of the residual stream before and after it.
        max_seq_length: of the calibration sequences.
        num_sequences: how many of them to use.
        seed: of which sequences and tokens are taken.

    Source: CKA, METHOD.md 2.2; Block Influence, ShortGPT (Men et al. 2024).
    """
    config = read_config(model_dir)
    anatomy = find_anatomy(config)
    tokenizer = load_tokenizer(model_dir)
    sequences = load_sequences(calibration, tokenizer, max_seq_length=max_seq_length)
    batches = _batches(sequences, num_sequences, pad_token_id(tokenizer), seed=seed)
    model = load_full_model(model_dir)
    streams = _Streams(len(anatomy), granularity.families)
    rng = np.random.default_rng(seed)
    with torch.inference_mode(), _watching(model, anatomy, streams):
        for batch in batches:
            streams.start(batch, rng)
            model(**batch.arguments(torch.device("cpu")))
            streams.finish()
    families = {}
    for family in granularity.families:
        importance = streams.block_influence(family)
        if score == "loo":
            importance = _leave_one_out(model, anatomy, family, batches)
        families[family] = FamilyStatistics(streams.cka[family].matrix(), tuple(importance))
    return Statistics(families, source="public", score=score)


def _batches(
    sequences: list[TokenSequence], num_sequences: int, pad: int, *, seed: int
) -> list[Batch]:
    order = np.random.default_rng(seed).permutation(len(sequences))[:num_sequences]
    chosen = [sequences[index] for index in order]
    return [
        collate(chosen[start : start + _BATCH_SIZE], pad_token_id=pad)
        for start in range(0, len(chosen), _BATCH_SIZE)
    ]


class _Streams:
    """The residual stream before and after every item, reduced batch by batch."""

    def __init__(self, num_layers: int, families: tuple[Family, ...]) -> None:
        self.cka = {family: CkaAccumulator(num_layers) for family in families}
        self._influence = {family: np.zeros(num_layers) for family in families}
        self._num_batches = 0
        self._grams: dict[Family, dict[int, np.ndarray[Any, Any]]] = {}
        self._positions = torch.zeros(0, dtype=torch.long)

    def start(self, batch: Batch, rng: np.random.Generator) -> None:
        """Choose the tokens of this batch that enter the Gram matrices."""
        real = torch.ones_like(batch.input_ids)
        if batch.attention_mask is not None:
            real = batch.attention_mask.clone()
        if real.shape[1] > 2 * _SKIPPED_POSITIONS:
            real[:, :_SKIPPED_POSITIONS] = 0
        candidates = real.flatten().nonzero()[:, 0].numpy()
        count = min(_TOKENS_PER_GRAM, len(candidates))
        self._positions = torch.from_numpy(rng.choice(candidates, size=count, replace=False))
        self._grams = {family: {} for family in self.cka}
        self._num_batches += 1

    def add(self, family: Family, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take note of one item; both (batch, seq_len, hidden_size)."""
        if family not in self.cka:
            return
        before, after = before.flatten(0, 1).float(), after.flatten(0, 1).float()
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)[self._positions]
        self._influence[family][layer] += 1 - cosine.mean().item()
        self._grams[family][layer] = gram(after[self._positions].numpy())

    def finish(self) -> None:
        for family, grams in self._grams.items():
            self.cka[family].add([grams[layer] for layer in sorted(grams)])

    def block_influence(self, family: Family) -> list[float]:
        influence: list[float] = (self._influence[family] / self._num_batches).tolist()
        return influence


@contextmanager
def _watching(model: nn.Module, anatomy: list[LayerAnatomy], streams: _Streams) -> Iterator[None]:
    """Feed `streams` while the model runs."""
    handles = []
    for index, (layer, parts) in enumerate(zip(decoder_layers(model), anatomy, strict=True)):
        added: dict[Kind, list[torch.Tensor]] = {kind: [] for kind in Kind}
        for kind, half in parts.halves.items():
            for name in _outlets(half):

                def keep(_m: Any, _a: Any, output: Any, into: list[Any] = added[kind]) -> None:
                    into.append(output[0] if isinstance(output, tuple) else output)

                handles.append(getattr(layer, name).register_forward_hook(keep))

        def after_layer(
            _: Any, args: Any, kwargs: Any, output: Any, index: int = index, added: Any = added
        ) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            after_attention = before + sum(added[Kind.ATTENTION])
            streams.add(Family.LAYER, index, before, after)
            streams.add(Family.ATTENTION, index, before, after_attention)
            streams.add(Family.FFN, index, after - sum(added[Kind.FFN]), after)
            for tensors in added.values():
                tensors.clear()

        handles.append(layer.register_forward_hook(after_layer, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outlets(half: Half) -> list[str]:
    """The modules whose outputs a half adds to the residual stream."""
    if half.post:
        return [half.post[-1]]
    return [child for child in half.core if child not in half.links]


def _leave_one_out(
    model: nn.Module, anatomy: list[LayerAnatomy], family: Family, batches: list[Batch]
) -> list[float]:
    """Loss without each item minus the intact loss, nats per token."""

    def loss() -> float:
        losses = [model(**b.arguments(torch.device("cpu"))).loss.item() for b in batches]
        return float(np.average(losses, weights=[b.num_tokens for b in batches]))

    with torch.inference_mode():
        intact = loss()
        rises = []
        for layer in range(len(anatomy)):
            kinds = frozenset(component.kind for component in family.components(layer))
            with skipping(model, anatomy, {layer: kinds}):
                rises.append(loss() - intact)
    return rises
