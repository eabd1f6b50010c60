"""Models to measure: random weights of any family and shape, and tokenizers of any size."""

import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedpruner_client.ctl.demo.run import BASE_MODEL_DIR
from fedpruner_common.manifest import ITEM_BYTES, TensorInfo
from fedpruner_common.modeling.load import TORCH_DTYPES, read_config
from fedpruner_common.modeling.meta import meta_model

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "mistral", "olmo2", "phi3", "qwen3")
_SPECIAL = ["<s>", "</s>", "<pad>"]
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_building = threading.Lock()  # transformers sets torch's default dtype while it builds a model


@dataclass(frozen=True)
class Shape:
    """A model's architecture; `family` is transformers' model type, or `demo` for the demo's own.

    Attributes:
        heads, kv_heads: of attention; with `head_dim` features each.
        stored: dtype of the checkpoint.
        tied: whether the head is the embedding.
    """

    family: str = "demo"
    layers: int = 12
    hidden: int = 96
    ffn: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 24
    vocab: int = 1024
    stored: str = "float32"
    tied: bool = False

    @classmethod
    def of(cls, family: str, *, hidden: int, **others: Any) -> "Shape":
        """One of usual proportions: heads of 64 features, an ffn of 2.75 times the width."""
        heads = hidden // 64
        kv_heads = heads if family in ("gpt2", "gpt_neox") else heads // 2 if heads % 2 == 0 else 1
        shape = {"ffn": hidden * 11 // 4, "heads": heads, "kv_heads": kv_heads, "head_dim": 64}
        return cls(family, hidden=hidden, **{**shape, **others})

    def config(self) -> transformers.PreTrainedConfig:
        """Of transformers."""
        return transformers.AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=2048,
            tie_word_embeddings=self.tied or self.family in ("gpt2", "gemma2"),
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )


def make_model(shape: Shape, folder: Path, tokenizers: Path) -> Path:
    """A directory with random weights of a shape and a tokenizer of its vocabulary's size."""
    if shape.family == "demo":
        return BASE_MODEL_DIR
    with _building:
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(
            shape.config(), dtype=getattr(torch, shape.stored)
        )
        model.save_pretrained(folder)
        _tokenizer(shape.vocab, tokenizers).save_pretrained(folder)
    return folder


def make_weightless(shape: Shape, folder: Path) -> tuple[Path, dict[str, TensorInfo]]:
    """A directory with only the configuration, and what a checkpoint of it would hold."""
    folder.mkdir(parents=True, exist_ok=True)
    shape.config().save_pretrained(folder)
    model = meta_model(read_config(folder)).to(getattr(torch, shape.stored))
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    tensors = {}
    for name, parameter in model.named_parameters():
        if name not in tied:
            dtype = _DTYPE_NAMES[parameter.dtype]
            num_bytes = parameter.numel() * ITEM_BYTES[dtype]
            tensors[name] = TensorInfo(name, dtype, tuple(parameter.shape), num_bytes, "0" * 64)
    return folder, tensors


def _tokenizer(vocab: int, folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE trained on the installed Python packages; made once per size.

    What a tokenizer weighs in memory, and how its tokens are spread over the embedding, is part of
    what is measured: a stand-in with few tokens would flatter both.
    """
    path = folder / f"bpe-{vocab}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_source_texts(), trainer)
        tokenizer.save(str(path))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _source_texts() -> Iterator[str]:
    for name in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_path(name)).rglob("*.py")):
            yield path.read_text(encoding="utf-8", errors="ignore")
