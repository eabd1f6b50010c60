"""Predicted against measured peak memory of training, on the demo's base model.

    python -m benchmarks.memory > benchmarks/results/memory.jsonl

Every configuration is trained for real in the agent's own training process, three steps, and the
peak is the kernel's high-water mark of its resident set. First the demo's base model in many
shapes, then random models of other families in one shape.
"""

import itertools
import json
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from fedpruner_client.ctl.demo.domains import write_domain
from fedpruner_client.ctl.demo.run import BASE_MODEL_DIR
from fedpruner_common.budget import predicted_peak_bytes
from fedpruner_common.child import Child
from fedpruner_common.spec import ModelSpec
from fedpruner_common.submodel import Submodel
from fedpruner_server import specs
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.config import LoraOptions, TrainingOptions
from fedpruner_server.core.aggregation import initial_adapter
from fedpruner_server.export import write_adapter

MIB = 1 << 20
SHAPES = [(4, 128), (8, 256), (16, 256), (4, 1024)]
LAYERS = [2, 6, 12]
FAMILY_LAYERS = [2, 6]
FAMILIES = ["gpt2", "gpt_neox", "gemma2", "mistral", "olmo2", "phi3", "qwen3"]
VARIANTS: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "float32", "gradient_checkpointing": True},
]


def describe(
    worker: Child, blocks: BlockStore, lora: LoraOptions, options: TrainingOptions
) -> ModelSpec:
    arguments = {
        "model": str(blocks.model_dir),
        "tensors": [asdict(info) for info in blocks.tensors.values()],
        "lora": lora.model_dump(),
        "training": options.model_dump(),
    }
    return specs.spec_from_json(worker.call("describe", arguments))


def cut_out(blocks: BlockStore, folder: Path) -> dict[str, dict[str, Any]]:
    """Every tensor as a raw file, as in an agent's cache."""
    tensors = {}
    for name, info in blocks.tensors.items():
        place, path = blocks.locate(info.hash), folder / info.hash
        with place.path.open("rb") as file:
            file.seek(place.start)
            path.write_bytes(file.read(place.num_bytes))
        tensors[name] = {**asdict(info), "path": str(path)}
    return tensors


def make_model(family: str, folder: Path) -> Path:
    """A random model of six layers, with the demo's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE_MODEL_DIR)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4 if family == "gpt_neox" else 2,
        head_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model_dir = folder / family
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    return model_dir


def measure(
    folder: Path,
    model_dir: Path,
    spec: ModelSpec,
    tensors: dict[str, dict[str, Any]],
    submodel: Submodel,
    lora: LoraOptions,
    options: TrainingOptions,
) -> tuple[int, int]:
    """Floor and peak of a fresh training process."""
    shapes = spec.adapter_shapes(lora.r, submodel.components)
    write_adapter(initial_adapter(shapes, seed=0), folder / "adapter.safetensors")
    trainer = Child(
        "fedpruner_client.train_jobs",
        log_path=folder / "training.log",
        env={"OMP_NUM_THREADS": "1"},
    )
    try:
        floor: int = trainer.call("measure", {"device": "cpu"})["floor_bytes"]
        settings = options.model_dump(exclude={"lr_scheduler_type"})
        result = trainer.call(
            "train",
            {
                "task_id": "benchmark",
                "client_id": "benchmark",
                "config_dir": str(model_dir),
                "num_layers": spec.num_layers,
                "components": [str(component) for component in submodel.components],
                "tensors": [tensors[name] for name in spec.tensor_names(submodel)],
                "lora": {
                    **lora.model_dump(exclude={"target_modules"}),
                    "target_modules": [t.module for t in spec.targets(submodel.components)],
                },
                "training": {**settings, "seed": 0},
                "adapter": str(folder / "adapter.safetensors"),
                "update": str(folder / "update.safetensors"),
                "data": [str(folder / "private" / "bytecode.jsonl")],
                "device": "cpu",
            },
        )
        return floor, result["measured_peak_bytes"]
    finally:
        trainer.close()


def environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+changes"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "command": "python -m benchmarks.memory",
        "commit": commit,
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cases(folder: Path) -> Iterator[tuple[str, Path, TrainingOptions, list[int]]]:
    """(model's name, model's directory, training shape, numbers of layers)."""
    for (batch, seq_len), variant in itertools.product(SHAPES, VARIANTS):
        shape = {"per_device_train_batch_size": batch, "max_seq_length": seq_len, "max_steps": 3}
        yield "demo", BASE_MODEL_DIR, TrainingOptions(**shape, **variant), LAYERS
    shape = {"per_device_train_batch_size": 8, "max_seq_length": 256, "max_steps": 3}
    for family in FAMILIES:
        yield family, make_model(family, folder), TrainingOptions(**shape), FAMILY_LAYERS


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lora = LoraOptions()
    errors, added_errors = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_domain("bytecode", folder)
        worker = Child("fedpruner_server.torch_jobs", log_path=folder / "torch_jobs.log")
        for model, model_dir, options, sizes in cases(folder):
            blocks = BlockStore(model_dir, hash_cache=folder / f"{model}.json")
            tensors = cut_out(blocks, folder)
            spec = describe(worker, blocks, lora, options)
            for num_layers in sizes:
                kept = [c for c in spec.full().components if c.layer < num_layers]
                submodel = Submodel.of(spec.num_layers, kept)
                floor, measured = measure(folder, model_dir, spec, tensors, submodel, lora, options)
                predicted = predicted_peak_bytes(spec.memory, kept, floor_bytes=floor)
                errors.append(predicted / measured - 1)
                added_errors.append((predicted - floor) / (measured - floor) - 1)
                row = {
                    "model": model,
                    "layers": num_layers,
                    "batch": options.per_device_train_batch_size,
                    "seq_len": options.max_seq_length,
                    "dtype": options.dtype,
                    "gradient_checkpointing": options.gradient_checkpointing,
                    "floor_mib": round(floor / MIB, 1),
                    "predicted_mib": round(predicted / MIB, 1),
                    "measured_mib": round(measured / MIB, 1),
                    "error": round(errors[-1], 4),
                    "error_above_floor": round(added_errors[-1], 4),
                }
                print(json.dumps(row), flush=True)
        worker.close()
    summary = {
        "configurations": len(errors),
        "mean_absolute_error": round(statistics.mean(map(abs, errors)), 4),
        "worst_error": round(max(errors, key=abs), 4),
        "mean_absolute_error_above_floor": round(statistics.mean(map(abs, added_errors)), 4),
        **environment(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
