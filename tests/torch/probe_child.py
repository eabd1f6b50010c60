"""Child of test_probe_memory: probes a generated model, streamed or resident.

Says READY once everything is imported and waits for a line, so that its parent can set a limit that
does not depend on what the libraries take.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from torch_support import CPU, random_ids

from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.data import TokenSequence, collate
from fedpruner_common.modeling.load import read_config
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.probe import probe
from fedpruner_common.modeling.streaming import streaming
from fedpruner_common.statistics import Family, Score
from fedpruner_server.model import load_full_model

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def run(model: torch.nn.Module, directory: Path) -> None:
    sequences = [TokenSequence.of(i := random_ids(16, seed=s).tolist(), i) for s in range(2)]
    statistics = probe(
        model, find_anatomy(read_config(directory)), [collate(sequences, pad_token_id=0)],
        families=(Family.LAYER,), score=Score.LOO, rng=np.random.default_rng(0),
    )  # fmt: skip
    importance = statistics.families[Family.LAYER].importance
    assert all(np.isfinite(importance))
    print("IMPORTANCE", *importance, flush=True)


def run_streamed(directory: Path, dtype: torch.dtype) -> None:
    model = load_full_model(directory).requires_grad_(False)
    layers = decoder_layers(model)
    within = {id(parameter) for parameter in layers.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in within:
            parameter.data = parameter.data.to(dtype)
    with streaming(model, range(len(layers)), list(layers.parameters()), dtype=dtype, device=CPU):
        run(model, directory)


def main() -> None:
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    print("READY", flush=True)
    sys.stdin.readline()
    if mode == "streamed":
        run_streamed(directory, torch.float32)
    elif mode == "resident":
        run(load_full_model(directory, dtype=torch.float32), directory)
    else:
        run(load_full_model(directory), directory)  # so that libraries have loaded what they need
        for stored in (run_streamed, lambda *_: run(load_full_model(directory), directory)):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            before = status_bytes("VmRSS")
            stored(directory, torch.bfloat16)
            print("GROWTH", status_bytes("VmHWM") - before, flush=True)


if __name__ == "__main__":
    main()
