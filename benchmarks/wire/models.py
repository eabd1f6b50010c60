"""Llama-shaped base models of any size, with random weights: only their bytes matter here."""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

_HEAD = 64
_BLOCK = 16 << 20


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings in bfloat16.

    Attributes:
        hidden: width; a multiple of 64 or less than 64.
        ffn: width of the feed-forward half.
        layers: how many.
        vocab: entries of the embedding.
        kv_heads: fewer than heads where keys and values are shared.
    """

    hidden: int
    ffn: int
    layers: int
    vocab: int
    kv_heads: int = 8

    @property
    def head(self) -> int:
        return min(_HEAD, self.hidden)

    @property
    def heads(self) -> int:
        return self.hidden // self.head

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, as in a checkpoint of Hugging Face."""
        wide, narrow = self.hidden, min(self.kv_heads, self.heads) * self.head
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, wide)}
        for layer in range(self.layers):
            front = f"model.layers.{layer}"
            found |= {
                f"{front}.self_attn.q_proj.weight": (wide, wide),
                f"{front}.self_attn.k_proj.weight": (narrow, wide),
                f"{front}.self_attn.v_proj.weight": (narrow, wide),
                f"{front}.self_attn.o_proj.weight": (wide, wide),
                f"{front}.mlp.gate_proj.weight": (self.ffn, wide),
                f"{front}.mlp.up_proj.weight": (self.ffn, wide),
                f"{front}.mlp.down_proj.weight": (wide, self.ffn),
                f"{front}.input_layernorm.weight": (wide,),
                f"{front}.post_attention_layernorm.weight": (wide,),
            }
        return {**found, "model.norm.weight": (wide,)}


# The layers of Llama 3.2 1B, seven of them, and the vocabulary that makes it 1.000 GB.
LARGE = Shape(hidden=2048, ffn=8192, layers=7, vocab=36_254)
# The same with one layer and a smaller vocabulary: about a quarter.
SMALL = Shape(hidden=2048, ffn=8192, layers=1, vocab=31_000)
# Its adapters are small; two layers, since the first and the last are in every submodel.
TINY = Shape(hidden=64, ffn=128, layers=2, vocab=256, kv_heads=1)
MEDIUM = Shape(hidden=1024, ffn=2048, layers=2, vocab=256, kv_heads=8)


def write_model(folder: Path, shape: Shape) -> int:
    """Write a Hugging Face directory; returns the bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": min(shape.kv_heads, shape.heads),
        "head_dim": shape.head,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dimensions in shape.tensors().items():
        begin, end = end, end + 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, _BLOCK):
            file.write(os.urandom(min(_BLOCK, end - start)))
    return end
