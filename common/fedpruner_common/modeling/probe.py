"""Layer statistics of a model on some text: how alike its layers are, what each one is worth.

The same probe serves both sides: the coordinator on public text, a device on its own. Weights are
touched in the layers' own forward and backward only, so inside `streaming` one layer is resident at
a time. Besides it, what is held is the residual streams (`stream_bytes`), one batch's logits and
the Gram matrices.

Source: METHOD.md 2.2 of the project's notes.
"""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedpruner_common.components import Kind
from fedpruner_common.modeling.anatomy import LayerAnatomy
from fedpruner_common.modeling.data import Batch, TokenSequence, collate
from fedpruner_common.modeling.scores import Importance, fisher, gate_taylor, wnorm
from fedpruner_common.modeling.streaming import bytes_read
from fedpruner_common.modeling.sweep import Contributions, Item, sweep
from fedpruner_common.similarity import CkaAccumulator, Matrix, gram
from fedpruner_common.statistics import Family, FamilyStatistics, ProbeCost, Score, Statistics

_ROWS = 4
_TOKENS_PER_GRAM = 256
# The first tokens of a sequence have outputs unlike all others (attention sinks).
_SKIPPED_POSITIONS = 4
_STREAM_BYTES = 256 << 20


def draw(
    sequences: Sequence[TokenSequence],
    num_sequences: int,
    *,
    pad_token_id: int,
    rng: np.random.Generator,
) -> list[Batch]:
    """Batches of so many sequences, chosen by `rng`; of all of them where there are no more."""
    order = rng.permutation(len(sequences))[:num_sequences]
    chosen = [sequences[index] for index in order]
    return [
        collate(chosen[start : start + _ROWS], pad_token_id=pad_token_id)
        for start in range(0, len(chosen), _ROWS)
    ]


def probe(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    batches: Sequence[Batch],
    *,
    families: Sequence[Family],
    score: Score,
    rng: np.random.Generator,
    source: str = "device",
    rms_rows: bool = True,
    stream_bytes: int = _STREAM_BYTES,
) -> Statistics:
    """CKA and importance of every layer's items.

    CKA, `bi`, `angular` and `loo` read the weights once for all batches that share a sweep. On top
    of that, `wnorm` reads them once, `gate_taylor` and `fisher` twice for every batch, and `sleb`
    once for every item it removes.

    Args:
        model: a causal language model, its adapter applied if it has one, streamed or resident.
        anatomy: of the model.
        batches: text, with at least 4 tokens in each batch.
        families: whose items.
        score: which importance.
        rng: chooses the tokens that enter the Gram matrices.
        source: for `Statistics.source`.
        rms_rows: scale tokens alike before CKA.
        stream_bytes: of hidden states that may be held at a time; batches that need no more share
            a sweep. One batch is always held: (1 + items) x tokens x hidden size.

    Raises:
        ModelError: the model changes the hidden states between its layers; `fisher` without an
            adapter that can be trained.
    """
    started, read_before = time.perf_counter(), bytes_read(model)
    was_training = model.training
    model.eval()
    try:
        observer = _Observer(len(anatomy), families, batches, rng, rms_rows)
        items = _items(families, len(anatomy)) if score is Score.LOO else []
        losses = sweep(
            model, anatomy, batches, items=items, observer=observer, stream_bytes=stream_bytes
        )
        if score is Score.LOO:
            importance = _rises(losses, families, len(anatomy))
        elif score is Score.SLEB:
            importance = _sleb(model, anatomy, batches, families, stream_bytes)
        elif score is Score.GATE_TAYLOR:
            importance = gate_taylor(model, anatomy, batches, families)
        elif score is Score.FISHER:
            importance = fisher(model, anatomy, batches, families)
        elif score is Score.WNORM:
            importance = wnorm(model, anatomy, families)
        else:
            importance = _free(score, observer, families, len(anatomy), rng)
    finally:
        model.train(was_training)
    return Statistics(
        {f: FamilyStatistics(observer.similarity(f), importance[f]) for f in families},
        source=source,
        score=score.value,
        cost=ProbeCost(
            loss_full=losses[None],
            num_tokens=sum(batch.num_tokens for batch in batches),
            seconds=time.perf_counter() - started,
            bytes_read=bytes_read(model) - read_before,
        ),
    )


def _items(families: Sequence[Family], num_layers: int) -> list[Item]:
    return [(family, layer) for family in families for layer in range(num_layers)]


def _rises(
    losses: dict[Item | None, float], families: Sequence[Family], num_layers: int
) -> Importance:
    """Loss without each item minus the intact loss."""
    return {
        family: tuple(losses[family, layer] - losses[None] for layer in range(num_layers))
        for family in families
    }


def _free(
    score: Score,
    observer: "_Observer",
    families: Sequence[Family],
    num_layers: int,
    rng: np.random.Generator,
) -> Importance:
    """Scores that take nothing beyond the observed stream, if that."""
    if score is Score.BI:
        return {family: observer.block_influence(family) for family in families}
    if score is Score.ANGULAR:
        return {family: observer.angular_distance(family) for family in families}
    if score is Score.RANDOM:
        return {family: tuple(rng.random(num_layers).tolist()) for family in families}
    assert score is Score.DEPTH
    depth = tuple(1 - layer / num_layers for layer in range(num_layers))
    return dict.fromkeys(families, depth)


def _sleb(
    model: nn.Module,
    anatomy: list[LayerAnatomy],
    batches: Sequence[Batch],
    families: Sequence[Family],
    stream_bytes: int,
) -> Importance:
    """Order in which items go if the one that is missed least is removed, again and again.

    The first to go scores lowest; items of the first and the last layer never go and score 1.
    Halves of both families compete; whole layers are a contest of their own.

    Source: SLEB (Song et al. 2024), algorithm 1.
    """
    last = len(anatomy) - 1
    importance = {family: [1.0] * len(anatomy) for family in families}
    contests: list[list[Family]] = [
        [family for family in families if family is Family.LAYER],
        [family for family in families if family is not Family.LAYER],
    ]
    for contest in contests:
        left = [item for item in _items(contest, len(anatomy)) if 0 < item[1] < last]
        removed: dict[int, frozenset[Kind]] = {}
        for place in range(num_items := len(left)):
            losses = sweep(
                model, anatomy, batches, items=left, removed=removed, stream_bytes=stream_bytes
            )
            family, layer = min(left, key=lambda item: losses[item])
            importance[family][layer] = (place + 1) / (num_items + 1)
            removed[layer] = removed.get(layer, frozenset()) | family.kinds
            left.remove((family, layer))
    return {family: tuple(values) for family, values in importance.items()}


class _Observer:
    """The residual stream before and after every item, reduced layer by layer."""

    def __init__(
        self,
        num_layers: int,
        families: Sequence[Family],
        batches: Sequence[Batch],
        rng: np.random.Generator,
        rms_rows: bool,
    ) -> None:
        self._num_layers = num_layers
        self._rms_rows = rms_rows
        self._chosen = [_choose(batch, rng) for batch in batches]
        self._last = [_last_tokens(batch) for batch in batches]
        self._cka = {family: CkaAccumulator(num_layers) for family in families}
        self._grams: dict[tuple[int, Family], list[Matrix]] = {}
        self._influence = {family: np.zeros(num_layers) for family in families}
        self._angle = {family: np.zeros(num_layers) for family in families}

    def see(
        self,
        batch: int,
        layer: int,
        before: torch.Tensor,
        added: Contributions,
        after: torch.Tensor,
    ) -> None:
        """Take note of one layer of one batch."""
        streams = {
            Family.LAYER: lambda: (before, after),
            Family.ATTENTION: lambda: (before, before + added[Kind.ATTENTION]),
            Family.FFN: lambda: (after - added[Kind.FFN], after),
        }
        for family in self._cka:
            self._add(batch, layer, family, *streams[family]())

    def _add(
        self, batch: int, layer: int, family: Family, before: torch.Tensor, after: torch.Tensor
    ) -> None:
        before, after = before.flatten(0, 1).cpu(), after.flatten(0, 1).cpu()  # (tokens, hidden)
        chosen, last = self._chosen[batch], self._last[batch]
        influence = 1 - _cosine(before[chosen], after[chosen]).mean().item()
        self._influence[family][layer] += influence / len(self._chosen)
        angle = torch.arccos(_cosine(before[last], after[last])).sum().item() / math.pi
        self._angle[family][layer] += angle / sum(map(len, self._last))
        grams = self._grams.setdefault((batch, family), [])
        grams.append(gram(after[chosen].float().numpy(), rms_rows=self._rms_rows))
        if len(grams) == self._num_layers:
            self._cka[family].add(self._grams.pop((batch, family)))

    def similarity(self, family: Family) -> Matrix:
        return self._cka[family].matrix()

    def block_influence(self, family: Family) -> tuple[float, ...]:
        """Mean over batches of their tokens' one minus cosine."""
        return tuple(self._influence[family].tolist())

    def angular_distance(self, family: Family) -> tuple[float, ...]:
        """Mean over sequences, in half turns."""
        return tuple(self._angle[family].tolist())


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1)


def _choose(batch: Batch, rng: np.random.Generator) -> torch.Tensor:
    """Places of the tokens that enter the Gram matrices, in the flattened batch."""
    real = _real(batch)
    if real.shape[1] > 2 * _SKIPPED_POSITIONS:
        real[:, :_SKIPPED_POSITIONS] = 0
    candidates = real.flatten().nonzero()[:, 0].numpy()
    count = min(_TOKENS_PER_GRAM, len(candidates))
    return torch.from_numpy(rng.choice(candidates, size=count, replace=False))


def _last_tokens(batch: Batch) -> torch.Tensor:
    """Places of each sequence's last real token, in the flattened batch."""
    real = _real(batch)
    rows = torch.arange(len(real)) * real.shape[1]
    return rows + real.sum(dim=1) - 1


def _real(batch: Batch) -> torch.Tensor:
    """1 on real tokens, 0 on padding; (batch, seq_len)."""
    if batch.attention_mask is None:
        return torch.ones_like(batch.input_ids)
    return batch.attention_mask.clone()
