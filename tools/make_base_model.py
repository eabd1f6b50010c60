"""Pretrain the demo's base model: a small Llama on the sources of Python's standard library.

The result (config, safetensors weights, tokenizer) is committed under
`client/fedpruner_client/ctl/demo/base_model/`, so that nobody has to run this to use the demo.
Run it again with `make base-model`; half an hour on two cores.

The text is what every Python machine has: the standard library's own `.py` files, without its
test suites. Twelve layers is deliberately deep for the width: like in real LLMs, the middle layers
come out partly redundant and the ends do not, which is what layer pruning lives from.
"""

import argparse
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUTPUT_DIR = (
    Path(__file__).parent.parent / "client" / "fedpruner_client" / "ctl" / "demo" / "base_model"
)
# The demo's private text is made from these, or is not source code: never pretrain on it.
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "lib2to3"}
VOCAB_SIZE = 1024
SEQ_LEN = 256
BATCH_SIZE = 16
LEARNING_RATE = 3e-3


def python_sources() -> list[str]:
    """The standard library's source files, largest tables left out, in a fixed shuffled order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not LEFT_OUT & set(path.relative_to(root).parts) and path.stat().st_size < 400_000
    )
    random.Random(0).shuffle(paths)
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=SEQ_LEN * 4,
    )


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN * 4,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def learning_rate(step: int, max_steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine down to 3 % of the peak."""
    warm_up = min(1.0, (step + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * step / max_steps))
    return LEARNING_RATE * warm_up * (0.03 + 0.97 * cosine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=2400)
    parser.add_argument("--output-dir", type=Path, default=OUTPUT_DIR)
    args = parser.parse_args()

    torch.manual_seed(0)
    texts = python_sources()
    tokenizer = train_tokenizer(texts)
    stream = [
        token
        for text in texts
        for token in [0, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids, 1]
    ]
    tokens = torch.tensor(stream)
    held_out, train = tokens[: len(tokens) // 50], tokens[len(tokens) // 50 :]
    model = LlamaForCausalLM(model_config())
    num_parameters = sum(p.numel() for p in model.parameters())
    num_bytes = sum(len(text.encode()) for text in texts)
    print(
        f"{num_parameters:,} parameters; {len(tokens):,} tokens of {num_bytes / len(tokens):.2f} B"
    )

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05
    )
    generator = torch.Generator().manual_seed(1)

    def batch(source: torch.Tensor, rows: int, gen: torch.Generator) -> torch.Tensor:
        starts = torch.randint(len(source) - SEQ_LEN, (rows,), generator=gen)
        return torch.stack([source[i : i + SEQ_LEN] for i in starts.tolist()])

    def held_out_loss() -> float:
        gen = torch.Generator().manual_seed(2)
        model.eval()
        with torch.no_grad():
            losses = []
            for _ in range(8):
                ids = batch(held_out, BATCH_SIZE, gen)
                losses.append(model(input_ids=ids, labels=ids).loss.item())
        model.train()
        return sum(losses) / len(losses)

    started = time.monotonic()
    for step in range(args.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.max_steps)
        ids = batch(train, BATCH_SIZE, generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step == 0:
            elapsed = time.monotonic() - started
            print(f"step {step + 1}: train {loss.item():.3f}, {elapsed:.0f} s", flush=True)
        if step % 400 == 399:  # an interrupted run leaves a usable model behind
            model.save_pretrained(args.output_dir)
            tokenizer.save_pretrained(args.output_dir)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"held-out loss {held_out_loss():.4f} nats per token -> {args.output_dir}")


if __name__ == "__main__":
    main()
