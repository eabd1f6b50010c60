"""The training process: everything on a device that needs torch.

Run as `python -m fedpruner_client.train_jobs`; `trainer` speaks to it.
"""

from fedpruner_common import malloc

malloc.set_for_training()  # before torch makes its first allocation

import gc
import os
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from fedpruner_client.memory import PeakMeter, resident_bytes
from fedpruner_client.model import LocalTensor, add_adapter, build_submodel, save_update
from fedpruner_client.train import train
from fedpruner_common.child import Json, Progress, serve
from fedpruner_common.components import ComponentId
from fedpruner_common.errors import ConfigError
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.modeling.data import load_sequences, load_tokenizer, pad_token_id
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings, TrainingSettings


def _device(name: str) -> torch.device:
    """The device to train on.

    Raises:
        ConfigError: a GPU was asked for and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda, but torch sees no GPU here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _measure(arguments: Json, _: Progress) -> Json:
    """What this process needs before any model: run one tiny training step and look."""
    device = _device(arguments["device"])
    _tiny_step(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        reserved = torch.cuda.memory_reserved(device)
        free, _total = torch.cuda.mem_get_info(device)
        return {
            "memory_kind": "cuda",
            "floor_bytes": reserved,
            "available_bytes": free + reserved,
        }
    return {"memory_kind": "rss", "floor_bytes": resident_bytes(), "available_bytes": 0}


def _tiny_step(device: torch.device) -> None:
    """Import and initialise all that training uses, with a model of a few kilobytes."""
    import peft

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config).to(device),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    ids = torch.zeros(2, 8, dtype=torch.long, device=device)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _train(arguments: Json, on_progress: Progress) -> Json:
    """One task: build the submodel, train it, write the update."""
    started = time.monotonic()
    device = _device(arguments["device"])
    gc.collect()
    meter = PeakMeter(device)
    meter.start()
    settings = TrainingSettings(**arguments["training"])
    lora = arguments["lora"]
    config_dir = Path(arguments["config_dir"])
    tokenizer = load_tokenizer(config_dir)
    sequences = load_sequences(
        [Path(path) for path in arguments["data"]],
        tokenizer,
        max_seq_length=settings.max_seq_length,
    )
    malloc.trim()
    base = build_submodel(
        config_dir,
        Submodel.of(arguments["num_layers"], map(ComponentId.parse, arguments["components"])),
        [_local_tensor(tensor) for tensor in arguments["tensors"]],
        dtype=settings.dtype,
        device=device,
    )
    model = add_adapter(
        base,
        LoraSettings(**{**lora, "target_modules": tuple(lora["target_modules"])}),
        Path(arguments["adapter"]),
    )

    def on_step(step: int, loss: float) -> None:
        on_progress({"step": step, "num_steps": settings.max_steps, "train_loss": loss})

    result = train(
        model,
        sequences,
        settings,
        order=f"{arguments['client_id']} {settings.seed}",
        pad_token_id=pad_token_id(tokenizer),
        device=device,
        on_step=on_step,
    )
    save_update(model, Path(arguments["update"]))
    return {
        "num_examples": len(sequences),
        "num_tokens": result.num_tokens,
        "train_loss_first": result.loss_first,
        "train_loss_last": result.loss_last,
        "measured_peak_bytes": meter.peak_bytes(),
        "train_s": time.monotonic() - started,
    }


def _local_tensor(tensor: Json) -> LocalTensor:
    path = Path(tensor.pop("path"))
    return LocalTensor(TensorInfo(**{**tensor, "shape": tuple(tensor["shape"])}), path)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    serve({"measure": _measure, "train": _train})


if __name__ == "__main__":
    main()
