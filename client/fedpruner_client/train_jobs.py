"""The training process: everything on a device that needs torch.

Run as `python -m fedpruner_client.train_jobs`; `trainer` speaks to it.
"""

from fedpruner_common import malloc

malloc.set_for_training()  # before torch makes its first allocation

import contextlib
import gc
import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from fedpruner_client.device import available_bytes, memory_limits, tightest
from fedpruner_client.gpu import gpu_offer, limit_allocator
from fedpruner_client.memory import resident_bytes
from fedpruner_client.model import LocalTensor
from fedpruner_client.workshop import ProbeWork, Work, Workshop
from fedpruner_common.child import Job, Json, Progress, serve
from fedpruner_common.components import ComponentId
from fedpruner_common.errors import ConfigError, OutOfMemory
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.out_of_memory import is_out_of_memory
from fedpruner_common.statistics import Granularity, Score, statistics_to_json
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind, BridgeSettings, LoraSettings, TrainingSettings

_workshops: dict[str, Workshop] = {}


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
        gpu = gpu_offer(torch, device, available_bytes())
        return {
            "memory_kind": gpu.kind,
            "floor_bytes": gpu.floor_bytes,
            "available_bytes": gpu.available_bytes,
            "limit": "GPU" if gpu.kind == "cuda" else tightest(memory_limits()).source,
        }
    floor, limit = resident_bytes(), tightest(memory_limits())
    return {
        "memory_kind": "rss",
        "floor_bytes": floor,
        "available_bytes": limit.available_bytes + floor,
        "limit": limit.source,
    }


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
    work = _work(arguments)

    def on_step(step: int, loss: float) -> None:
        progress = {"step": step, "num_steps": work.training.max_steps, "train_loss": loss}
        on_progress(progress)

    device = _device(arguments["device"])
    if device.type == "cuda" and work.memory_budget_bytes is not None:
        limit_allocator(torch, device, work.memory_budget_bytes)
    return asdict(_workshop(arguments["device"]).do(work, on_step))


def _probe(arguments: Json, _: Progress) -> Json:
    """How alike the layers are and what each is worth, on this device's text."""
    lora = arguments["lora"]
    statistics = _workshop(arguments["device"]).probe(
        ProbeWork(
            config_dir=Path(arguments["config_dir"]),
            num_layers=arguments["num_layers"],
            tensors=tuple(_local_tensor(tensor) for tensor in arguments["tensors"]),
            lora=LoraSettings(**{**lora, "target_modules": tuple(lora["target_modules"])}),
            adapter_path=Path(arguments["adapter"]),
            granularity=Granularity(arguments["granularity"]),
            score=Score(arguments["score"]),
            num_sequences=arguments["num_sequences"],
            max_seq_length=arguments["max_seq_length"],
            dtype=arguments["dtype"],
            seed=arguments["seed"],
            rms_rows=arguments["rms_rows"],
            data=tuple(Path(path) for path in arguments["data"]),
        )
    )
    return statistics_to_json(statistics)


def _workshop(device: str) -> Workshop:
    if device not in _workshops:
        _workshops[device] = Workshop(_device(device))
    return _workshops[device]


def _work(arguments: Json) -> Work:
    lora, bridge = arguments["lora"], arguments["bridge"]
    components = map(ComponentId.parse, arguments["components"])
    return Work(
        client_id=arguments["client_id"],
        submodel=Submodel.of(arguments["num_layers"], components),
        lora=LoraSettings(**{**lora, "target_modules": tuple(lora["target_modules"])}),
        training=TrainingSettings(**arguments["training"]),
        bridge=BridgeSettings(**{**bridge, "kind": BridgeKind(bridge["kind"])}),
        streamed=tuple(arguments["streamed"]),
        tensors=tuple(_local_tensor(tensor) for tensor in arguments["tensors"]),
        other_tensors=tuple(_local_tensor(tensor) for tensor in arguments["other_tensors"]),
        config_dir=Path(arguments["config_dir"]),
        adapter_path=Path(arguments["adapter"]),
        bridge_path=Path(arguments["bridges"]) if arguments["bridges"] else None,
        update_path=Path(arguments["update"]),
        data=tuple(Path(path) for path in arguments["data"]),
        work_dir=Path(arguments["work_dir"]),
        memory_budget_bytes=arguments["memory_budget_bytes"],
    )


def _reporting_memory(job: Job) -> Job:
    """A job whose errors for lack of memory are `OutOfMemory`, however torch words them."""

    def report(arguments: Json, on_progress: Progress) -> Json:
        try:
            return job(arguments, on_progress)
        except (MemoryError, OSError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(f"memory ran out: {str(error).splitlines()[0][:200]}") from error

    return report


def _offer_to_be_killed() -> None:
    """Let the kernel take this process, not the agent, when the machine is out of memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _local_tensor(tensor: Json) -> LocalTensor:
    path = Path(tensor.pop("path"))
    return LocalTensor(TensorInfo(**{**tensor, "shape": tuple(tensor["shape"])}), path)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _offer_to_be_killed()
    jobs = {"measure": _measure, "train": _train, "probe": _probe}
    serve({name: _reporting_memory(job) for name, job in jobs.items()})


if __name__ == "__main__":
    main()
