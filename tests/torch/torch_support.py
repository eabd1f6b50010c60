"""Tiny models on disk, and references for them that share no code with the project.

References are transformers' own full models with hand-written forward hooks or hand-edited weights.
"""

import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fedpruner_client.model import LocalTensor, Skeleton, build_submodel
from fedpruner_common.components import ComponentId, Kind, all_components
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.spec import ModelSpec
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings, TrainingSettings
from fedpruner_server.config import LoraOptions, TrainingOptions
from fedpruner_server.describe import describe

ATTENTION, FFN = Kind.ATTENTION, Kind.FFN
BOTH = frozenset(Kind)
VOCAB_SIZE = 128
CPU = torch.device("cpu")

# Tokenizer: one token a character, so that expected ids can be written by hand.
PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3


def ids_of(text: str) -> list[int]:
    """The ids of a text: a printable ASCII character's place in `string.printable`, plus 4."""
    return [4 + string.printable.index(character) for character in text]


def make_tokenizer(
    *, eos: bool = True, bos: bool = True, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    vocab = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    vocab |= {character: 4 + index for index, character in enumerate(string.printable)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        unk_token="<unk>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


# Architectures: configuration, where the layers are, and which children of a layer add to the
# residual stream (attention, ffn); zeroing their outputs is the reference for dropping a half.

_SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Architecture:
    config: transformers.PreTrainedConfig
    stack: str
    attention: str
    ffn: str


ARCHITECTURES = {
    "llama": Architecture(transformers.LlamaConfig(**_GROUPED), "model.layers", "self_attn", "mlp"),
    "gpt2": Architecture(
        transformers.GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=32, n_layer=5, n_head=4, n_positions=128,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=BOS, eos_token_id=EOS,
        ),
        "transformer.h", "attn", "mlp",
    ),
    "qwen2": Architecture(
        transformers.Qwen2Config(
            **_GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=2
        ),
        "model.layers", "self_attn", "mlp",
    ),
    "gemma2": Architecture(
        transformers.Gemma2Config(
            **{**_GROUPED, "tie_word_embeddings": True}, head_dim=8, sliding_window=4,
            query_pre_attn_scalar=8,
        ),
        "model.layers", "post_attention_layernorm", "post_feedforward_layernorm",
    ),
    "gpt_neox": Architecture(
        transformers.GPTNeoXConfig(**_SMALL), "gpt_neox.layers", "attention", "mlp"
    ),
    "gpt_neox_serial": Architecture(
        transformers.GPTNeoXConfig(**_SMALL, use_parallel_residual=False),
        "gpt_neox.layers", "attention", "mlp",
    ),
    "mistral": Architecture(
        transformers.MistralConfig(**_GROUPED, sliding_window=4), "model.layers", "self_attn", "mlp"
    ),
    "qwen3": Architecture(
        transformers.Qwen3Config(**_GROUPED, head_dim=8), "model.layers", "self_attn", "mlp"
    ),
    "phi": Architecture(transformers.PhiConfig(**_SMALL), "model.layers", "self_attn", "mlp"),
    "olmo2": Architecture(
        transformers.Olmo2Config(**_GROUPED),
        "model.layers", "post_attention_layernorm", "post_feedforward_layernorm",
    ),
    "opt": Architecture(
        transformers.OPTConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=64, num_hidden_layers=5,
            num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32,
            dropout=0.0, attention_dropout=0.0,
        ),
        "model.decoder.layers", "self_attn", "fc2",
    ),
}  # fmt: skip


def module_at(model: nn.Module, path: str) -> Any:
    return reduce(
        lambda m, name: m[int(name)] if name.isdigit() else getattr(m, name), path.split("."), model
    )


@contextmanager
def hooked_off(
    model: nn.Module, architecture: Architecture, skipped: Mapping[int, frozenset[Kind]]
) -> Iterator[None]:
    """The full model with the contributions of some halves set to zero by forward hooks."""

    def zeroed(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = []
    for index, kinds in skipped.items():
        layer = module_at(model, f"{architecture.stack}.{index}")
        for kind in kinds:
            child = architecture.attention if kind is ATTENTION else architecture.ffn
            handles.append(getattr(layer, child).register_forward_hook(zeroed))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def submodel_without(num_layers: int, skipped: Mapping[int, frozenset[Kind]]) -> Submodel:
    return Submodel.of(
        num_layers,
        [c for c in all_components(num_layers) if c.kind not in skipped.get(c.layer, frozenset())],
    )


def components(text: str) -> list[ComponentId]:
    return [ComponentId.parse(word) for word in text.split()]


def tensor_infos(model_dir: Path) -> dict[str, TensorInfo]:
    """What a checkpoint of one file holds, read by the safetensors library."""
    infos = {}
    with safe_open(model_dir / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part, tensor = file.get_slice(name), file.get_tensor(name)
            infos[name] = TensorInfo(
                name, part.get_dtype(), tuple(part.get_shape()), tensor.nbytes, hash=""
            )
    return infos


TRAINING = TrainingOptions(per_device_train_batch_size=2, max_seq_length=16)
TRAINING_SETTINGS = TrainingSettings(
    per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=3, max_seq_length=16,
    learning_rate=5e-3, weight_decay=0.0, max_grad_norm=1.0, gradient_checkpointing=False,
    dtype="auto", seed=1,
)  # fmt: skip
R, ALPHA = 4, 8


class TinyModel:
    """A random model in a folder, with its tokenizer, and each tensor as a file of raw bytes."""

    def __init__(
        self, path: Path, architecture: Architecture, *, noise: float = 0.1, seed: int = 0
    ) -> None:
        self.path = path
        self.architecture = architecture
        self._built: dict[Submodel, Any] = {}
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(architecture.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
        self.save(model)

    def save(self, model: PreTrainedModel) -> None:
        model.save_pretrained(self.path)
        make_tokenizer().save_pretrained(self.path)
        raw = self.path / "raw"
        raw.mkdir(exist_ok=True)
        self.infos = tensor_infos(self.path)
        for name, tensor in load_file(self.path / "model.safetensors").items():
            self.raw(name).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    def raw(self, name: str) -> Path:
        return self.path / "raw" / name

    @property
    def num_layers(self) -> int:
        return self.architecture.config.num_hidden_layers

    def full(self) -> PreTrainedModel:
        """A fresh full model, loaded by transformers."""
        return AutoModelForCausalLM.from_pretrained(self.path).eval()

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The full model, for tests that leave it as it is."""
        return self.full()

    def describe(
        self, lora: LoraOptions | None = None, training: TrainingOptions = TRAINING
    ) -> ModelSpec:
        lora = lora or LoraOptions(r=R, lora_alpha=ALPHA)
        return describe(self.path, self.infos, lora=lora, training=training)

    @cached_property
    def spec(self) -> ModelSpec:
        return self.describe()

    @cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton.read(self.path)

    def lora_settings(self, submodel: Submodel) -> LoraSettings:
        """For all modules of a submodel, without dropout."""
        modules = tuple(target.module for target in self.spec.targets(submodel.components))
        return LoraSettings(R, ALPHA, 0.0, modules)

    def local_tensors(self, names: tuple[str, ...]) -> list[LocalTensor]:
        return [LocalTensor(self.infos[name], self.raw(name)) for name in names]

    def built(self, submodel: Submodel) -> Any:
        """As `build`, once for all tests that leave it as it is."""
        if submodel not in self._built:
            self._built[submodel] = self.build(submodel)
        return self._built[submodel]

    def build(self, submodel: Submodel) -> Any:
        """The submodel as an agent builds it, from the files the spec names."""
        tensors = self.local_tensors(self.spec.tensor_names(submodel))
        built = build_submodel(self.skeleton, submodel, tensors, dtype="auto", device=CPU)
        return built.model.eval()


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **arguments).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; shapes must agree, or broadcasting would hide a mistake."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()
