"""A small model, two devices' texts, and programs that end with the test that started them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import NUM_LAYERS, Program

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with a byte-level tokenizer, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    model_dir = tmp_path_factory.mktemp("small-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(model_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(model_dir)
    return model_dir


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two devices' texts, and held-out text of both kinds."""
    folder = tmp_path_factory.mktemp("texts")
    rows = {
        "counting": [f"{n} plus {n + 1} is {2 * n + 1}. " * 4 for n in range(60)],
        "letters": [" ".join(chr(97 + (n + i) % 26) for i in range(80)) for n in range(40)],
    }
    files = {}
    for name, lines in rows.items():
        for part, chosen in (("train", lines[:-8]), ("held_out", lines[-8:])):
            path = folder / f"{name}-{part}.jsonl"
            path.write_text("".join(json.dumps({"text": line}) + "\n" for line in chosen))
            files[f"{name}-{part}"] = path
    return files


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start programs; all of them end with the test."""
    programs: list[Program] = []

    def start_program(name: str, module: str, *arguments: str) -> Program:
        program = Program(tmp_path / "logs", f"{name}-{len(programs)}", module, *arguments)
        programs.append(program)
        return program

    yield start_program
    for program in reversed(programs):
        program.end()
