"""Scoring: the mean loss over held-out tokens, and a base model that no adapter stays on."""

from pathlib import Path

import pytest
import torch
from torch_support import EOS, TinyModel, ids_of, logits

from fedpruner_common.errors import DataError, FedPrunerError, ModelError
from fedpruner_server.config import LoraOptions
from fedpruner_server.core.aggregation import initial_adapter
from fedpruner_server.evaluate import Evaluator
from fedpruner_server.export import export_peft, write_adapter

SEQ_LEN = 16
TEXTS = {
    "short": "hello world",
    "long": "The quick brown fox jumps over the lazy dog; pack my box with jugs. " * 3,
}


def mean_loss(model: torch.nn.Module, text: str, stride: int = 1) -> float:
    """Nats per predicted token, window by window, in float64."""
    ids = [*ids_of(text), EOS]
    windows = [ids[start : start + SEQ_LEN] for start in range(0, len(ids), SEQ_LEN)][::stride]
    total, count = 0.0, 0
    for window in windows:
        tokens = torch.tensor([window])
        log_probabilities = logits(model, tokens)[0, :-1].double().log_softmax(-1)
        total -= log_probabilities.gather(1, tokens[0, 1:, None]).sum().item()
        count += len(window) - 1
    return total / count


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.txt" for name in TEXTS]
    for path in paths:
        path.write_text(TEXTS[path.stem])
    return paths


def evaluator(tiny: TinyModel, files: list[Path], max_sequences: int = 100) -> Evaluator:
    return Evaluator(tiny.path, files, max_seq_length=SEQ_LEN, max_sequences=max_sequences)


def export(tiny: TinyModel, folder: Path, *, seed: int | None) -> Path:
    """An adapter that changes something, or with no seed one that is all zeros in B."""
    adapter = initial_adapter(tiny.spec.adapter_shapes(4), seed=seed or 0)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, values in adapter.items():
            adapter[name] = torch.randn(values.shape, generator=generator).mul(0.1).numpy()
    write_adapter(adapter, folder / "a.safetensors")
    output = folder / f"peft-{seed}"
    lora = LoraOptions(r=4, lora_alpha=8)
    export_peft(folder / "a.safetensors", output, spec=tiny.spec, lora=lora, model=tiny.path)
    return output


def test_the_loss_is_the_mean_over_all_predicted_tokens(
    llama: TinyModel, files: list[Path]
) -> None:
    expected = {name: mean_loss(llama.reference, text) for name, text in TEXTS.items()}
    assert evaluator(llama, files).losses(None) == pytest.approx(expected, rel=1e-5)


def test_fewer_sequences_are_taken_at_even_distances(llama: TinyModel, files: list[Path]) -> None:
    # 205 tokens are 13 windows; at most 5 of them: every third, 0 3 6 9 12
    assert -(-(len(TEXTS["long"]) + 1) // SEQ_LEN) == 13
    losses = evaluator(llama, files, max_sequences=5).losses(None)
    assert losses["long"] == pytest.approx(mean_loss(llama.reference, TEXTS["long"], 3), rel=1e-5)


def test_an_adapter_changes_the_loss_and_leaves_the_base_as_it_was(
    llama: TinyModel, files: list[Path], tmp_path: Path
) -> None:
    scorer = evaluator(llama, files)
    base = scorer.losses(None)
    first, second = (export(llama, tmp_path, seed=seed) for seed in (1, 2))
    with_first, with_second = scorer.losses(first), scorer.losses(second)
    for name in TEXTS:
        assert len({base[name], with_first[name], with_second[name]}) == 3
    # Every one again, in another order: none has left a trace.
    assert scorer.losses(None) == base
    assert scorer.losses(second) == with_second
    assert scorer.losses(first) == with_first


def test_an_adapter_whose_b_is_zero_changes_nothing(
    llama: TinyModel, files: list[Path], tmp_path: Path
) -> None:
    scorer = evaluator(llama, files)
    losses = scorer.losses(export(llama, tmp_path, seed=None))
    assert losses == pytest.approx(scorer.losses(None), abs=1e-7)


def test_two_files_of_the_same_name_are_not_taken_for_one(llama: TinyModel, tmp_path: Path) -> None:
    files = []
    for folder, text in (("law", TEXTS["short"]), ("medicine", TEXTS["long"])):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "eval.txt")
        files[-1].write_text(text)
    try:
        losses = evaluator(llama, files).losses(None)
    except FedPrunerError:
        return  # to refuse them would do as well
    assert len(losses) == 2


def test_data_or_models_that_cannot_be_used_are_told_when_loading(
    llama: TinyModel, files: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="gone"):
        evaluator(llama, [tmp_path / "gone.txt"])
    with pytest.raises(ModelError):
        Evaluator(tmp_path, files, max_seq_length=SEQ_LEN, max_sequences=5)
