"""Layer statistics against references: losses and residual streams of hooked full models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming_support import with_adapter
from torch_support import (
    ARCHITECTURES,
    ATTENTION,
    BOTH,
    EOS,
    FFN,
    TinyModel,
    difference,
    hooked_off,
    ids_of,
    logits,
    module_at,
    random_ids,
)

from fedpruner_common.components import Kind
from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.stubs import skipping
from fedpruner_common.statistics import Family, Granularity, Statistics
from fedpruner_server.probe import probe

TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 times it did. " * 2
SEQ_LEN = 32
FIRST = 4  # positions of each sequence that do not count
KINDS = {Family.LAYER: BOTH, Family.ATTENTION: frozenset({ATTENTION}), Family.FFN: frozenset({FFN})}


def windows() -> list[torch.Tensor]:
    """The sequences of TEXT: all full but the last."""
    ids = [*ids_of(TEXT), EOS]
    return [torch.tensor([ids[start : start + SEQ_LEN]]) for start in range(0, len(ids), SEQ_LEN)]


def run_probe(
    tiny: TinyModel,
    tmp_path: Path,
    granularity: Granularity,
    score: str,
    num_sequences: int = 100,
    adapter_dir: Path | None = None,
) -> Statistics:
    (tmp_path / "text.txt").write_text(TEXT)
    return probe(
        tiny.path, [tmp_path / "text.txt"], granularity=granularity, score=score,
        max_seq_length=SEQ_LEN, num_sequences=num_sequences, seed=5, adapter_dir=adapter_dir,
    )  # fmt: skip


def mean_loss(model: Any) -> float:
    """Nats per predicted token over all windows."""
    total, count = 0.0, 0
    for ids in windows():
        log_probabilities = logits(model, ids)[0, :-1].double().log_softmax(-1)
        total -= log_probabilities.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("granularity", Granularity)
def test_similarity_is_symmetric_within_bounds_and_one_on_the_diagonal(
    llama: TinyModel, tmp_path: Path, granularity: Granularity
) -> None:
    statistics = run_probe(llama, tmp_path, granularity, "bi")
    expected = (
        [Family.LAYER] if granularity is Granularity.LAYER else [Family.ATTENTION, Family.FFN]
    )
    assert list(statistics.families) == expected
    for family in statistics.families.values():
        cka = np.asarray(family.similarity)
        assert cka.shape == (5, 5)
        assert np.array_equal(cka, cka.T)
        assert np.array_equal(np.diag(cka), np.ones(5))
        assert cka.min() >= 0
        assert cka.max() <= 1
        assert cka.min() < 0.99  # not everything alike
        assert len(family.importance) == 5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("granularity", Granularity)
def test_leave_one_out_is_the_loss_without_the_item_minus_the_intact_loss(
    zoo: Callable[[str], TinyModel], tmp_path: Path, name: str, granularity: Granularity
) -> None:
    tiny = zoo(name)
    statistics = run_probe(tiny, tmp_path, granularity, "loo")
    assert statistics.score == "loo"
    intact = mean_loss(tiny.reference)
    for family, found in statistics.families.items():
        expected = []
        for layer in range(5):
            with hooked_off(tiny.reference, tiny.architecture, {layer: KINDS[family]}):
                expected.append(mean_loss(tiny.reference) - intact)
        assert found.importance == pytest.approx(expected, abs=1e-5)
        assert max(abs(rise) for rise in expected) > 1e-3


def residual_streams(tiny: TinyModel) -> dict[Family, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Residual stream before and after each item, (tokens, hidden_size), for sequential halves."""
    model, architecture = tiny.full(), tiny.architecture
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def note(key: tuple[int, str], tensor: torch.Tensor) -> None:
        seen.setdefault(key, []).append(tensor[0, FIRST:])

    for index in range(5):
        layer = module_at(model, f"{architecture.stack}.{index}")
        layer.register_forward_pre_hook(lambda _m, args, i=index: note((i, "in"), args[0]))
        layer.register_forward_hook(lambda _m, _a, output, i=index: note((i, "out"), output))
        for part in ("attention", "ffn"):
            child = getattr(layer, getattr(architecture, part))
            child.register_forward_hook(
                lambda _m, _a, o, i=index, p=part: note((i, p), o[0] if isinstance(o, tuple) else o)
            )
    for ids in windows():
        if ids.shape[1] == SEQ_LEN:
            logits(model, ids)
    streams: dict[Family, list[tuple[torch.Tensor, torch.Tensor]]] = {f: [] for f in Family}
    for index in range(5):
        before, attention, out = (
            torch.cat(seen[index, key]).double() for key in ("in", "attention", "out")
        )
        middle = before + attention
        assert difference(middle + torch.cat(seen[index, "ffn"]).double(), out) < 1e-4
        streams[Family.LAYER].append((before, out))
        streams[Family.ATTENTION].append((before, middle))
        streams[Family.FFN].append((middle, out))
    return streams


def unbiased_cka(outputs: list[torch.Tensor]) -> np.ndarray:
    """CKA from U-centred Gram matrices (Székely and Rizzo 2014): another road to unbiased HSIC."""
    centred = []
    for x in outputs:
        x = (x / x.pow(2).mean(1, keepdim=True).sqrt()).numpy()
        k = x @ x.T
        np.fill_diagonal(k, 0)
        n = len(k)
        rows = k.sum(1) / (n - 2)
        u = k - rows[:, None] - rows[None, :] + k.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(u, 0)
        centred.append(u)
    products = np.array([[(a * b).sum() for b in centred] for a in centred])
    norms = np.sqrt(np.diag(products))
    return products / norms[:, None] / norms[None, :]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("granularity", Granularity)
def test_similarity_and_block_influence_are_those_of_the_residual_stream(
    zoo: Callable[[str], TinyModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    granularity: Granularity,
) -> None:
    # Full windows only, in one batch: then every token counts, whatever the seed.
    cut = TEXT[: 4 * SEQ_LEN - 1]
    monkeypatch.setattr(f"{__name__}.TEXT", cut)
    assert [ids.shape[1] for ids in windows()] == [SEQ_LEN] * 4
    tiny = zoo(name)
    found = run_probe(tiny, tmp_path, granularity, "bi").families
    streams = residual_streams(tiny)
    for family, statistics in found.items():
        influence = [
            1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean().item()
            for before, after in streams[family]
        ]
        assert statistics.importance == pytest.approx(influence, abs=1e-5)
        expected = np.clip(unbiased_cka([after for _, after in streams[family]]), 0, 1)
        assert np.asarray(statistics.similarity) == pytest.approx(expected, abs=1e-4)


def test_a_layer_that_does_nothing_has_no_influence(tmp_path: Path) -> None:
    tiny = TinyModel(tmp_path / "model", ARCHITECTURES["llama"])
    model = tiny.full()
    with torch.no_grad():
        layer = model.model.layers[2]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.mul_(1e-6)
    tiny.save(model)
    influence = run_probe(tiny, tmp_path, Granularity.LAYER, "bi").families[Family.LAYER].importance
    assert abs(influence[2]) < 1e-6
    assert min(influence[i] for i in (0, 1, 3, 4)) > 1e-3
    rises = run_probe(tiny, tmp_path, Granularity.LAYER, "loo").families[Family.LAYER].importance
    assert abs(rises[2]) < 1e-5
    assert min(abs(rises[i]) for i in (0, 1, 3, 4)) > 1e-5


def test_the_same_seed_gives_the_same_statistics(llama: TinyModel, tmp_path: Path) -> None:
    a, b = (run_probe(llama, tmp_path, Granularity.LAYER, "loo", num_sequences=3) for _ in range(2))
    one, two = a.families[Family.LAYER], b.families[Family.LAYER]
    assert one.importance == two.importance
    assert np.array_equal(one.similarity, two.similarity)


def stored_layer_bytes(tiny: TinyModel) -> int:
    return sum(info.num_bytes for name, info in tiny.infos.items() if ".layers." in name)


def test_the_model_is_streamed_from_its_file(llama: TinyModel, tmp_path: Path) -> None:
    cost = run_probe(llama, tmp_path, Granularity.COMPONENT, "loo").cost
    assert cost
    assert cost.bytes_read == stored_layer_bytes(llama)
    assert cost.loss_full == pytest.approx(mean_loss(llama.reference), abs=1e-5)
    assert cost.num_tokens == sum(ids.shape[1] - 1 for ids in windows())


def test_a_model_behind_links_as_in_a_download_cache_is_streamed_too(
    llama: TinyModel, tmp_path: Path
) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in llama.path.iterdir():
        (linked / file.name).symlink_to(file)
    (tmp_path / "text.txt").write_text(TEXT)
    cost = probe(
        linked, [tmp_path / "text.txt"], granularity=Granularity.LAYER, score="bi",
        max_seq_length=SEQ_LEN, num_sequences=4, seed=5,
    ).cost  # fmt: skip
    assert cost
    assert cost.bytes_read == stored_layer_bytes(llama)


def test_an_adapter_is_applied_when_one_is_given(llama: TinyModel, tmp_path: Path) -> None:
    adapted = with_adapter(llama.full())
    adapted.save_pretrained(tmp_path / "adapter")
    merged = TinyModel(tmp_path / "merged", llama.architecture)
    merged.save(adapted.merge_and_unload())
    for score in ("loo", "angular"):
        found = run_probe(
            llama, tmp_path, Granularity.LAYER, score, adapter_dir=tmp_path / "adapter"
        )
        expected = run_probe(merged, tmp_path, Granularity.LAYER, score).families[Family.LAYER]
        bare = run_probe(llama, tmp_path, Granularity.LAYER, score).families[Family.LAYER]
        one = found.families[Family.LAYER]
        assert one.importance == pytest.approx(expected.importance, abs=1e-4)
        assert one.similarity == pytest.approx(expected.similarity, abs=1e-4)
        assert one.importance != pytest.approx(bare.importance, abs=1e-3)
    fisher = run_probe(
        llama, tmp_path, Granularity.COMPONENT, "fisher", adapter_dir=tmp_path / "adapter"
    )
    assert all(min(family.importance) > 0 for family in fisher.families.values())


def test_an_adapter_that_is_not_there_is_a_model_error(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        run_probe(llama, tmp_path, Granularity.LAYER, "bi", adapter_dir=tmp_path / "nowhere")


def test_an_unknown_score_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="magic"):
        run_probe(llama, tmp_path, Granularity.LAYER, "magic")


# skipping


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_skipping_equals_hooks_and_restores_the_model_exactly(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    tiny = zoo(name)
    model, ids = tiny.reference, random_ids(2, 12)
    anatomy = find_anatomy(tiny.architecture.config)
    skipped: Mapping[int, frozenset[Kind]] = {
        0: frozenset({ATTENTION}),
        1: frozenset({FFN}),
        3: BOTH,
    }
    with hooked_off(model, tiny.architecture, skipped):
        expected = logits(model, ids)
    intact = logits(model, ids)
    before = [(n, id(m)) for n, m in model.named_modules()]
    with skipping(model, anatomy, skipped):
        assert difference(logits(model, ids), expected) < 1e-5
        assert difference(logits(model, ids), intact) > 1e-3
    assert [(n, id(m)) for n, m in model.named_modules()] == before
    assert torch.equal(logits(model, ids), intact)


def test_skipping_restores_the_model_when_the_block_raises(llama: TinyModel) -> None:
    model = llama.reference
    before = [(n, id(m)) for n, m in model.named_modules()]
    with (
        pytest.raises(ZeroDivisionError),
        skipping(model, find_anatomy(llama.architecture.config), {0: BOTH, 2: frozenset({FFN})}),
    ):
        raise ZeroDivisionError
    assert [(n, id(m)) for n, m in model.named_modules()] == before
