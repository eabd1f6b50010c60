"""LoRA on the full model as most people run it, in a process of its own.

    python -m benchmarks.memory.plain MODEL_DIR TEXT DTYPE BATCH SEQ_LEN RANK LAYERS

transformers' `from_pretrained`, PEFT's `get_peft_model`, torch's AdamW, the model's own loss,
nothing recomputed, the C library's malloc as it is. LAYERS is how many of the first layers to keep;
0 for all. Prints one JSON object: what the process holds before any model, and its peak.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import torch
import transformers

_STEPS = 4


def main() -> None:
    model_dir, text, dtype = sys.argv[1:4]
    batch, seq_len, rank, layers = map(int, sys.argv[4:])
    torch.set_num_threads(1)
    _step(_tiny_model())
    floor = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype)
    )
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    documents = [json.loads(line)["text"] for line in Path(text).read_text().splitlines()]
    ids = torch.tensor(tokenizer("\n".join(documents))["input_ids"])
    count = batch * seq_len
    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    adapted.train()
    optimizer = _optimizer(adapted)
    for step in range(_STEPS):
        start = step * count % (len(ids) - count)
        _step(adapted, ids[start : start + count].view(batch, seq_len), optimizer)
    print(json.dumps({"floor_bytes": floor, "measured_bytes": _status("VmHWM")}))


def _tiny_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def _step(
    model: Any, ids: torch.Tensor | None = None, optimizer: torch.optim.Optimizer | None = None
) -> None:
    ids = torch.zeros(2, 8, dtype=torch.long) if ids is None else ids
    optimizer = optimizer or _optimizer(model)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _status(name: str) -> int:
    """Of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not tell {name}")


if __name__ == "__main__":
    main()
