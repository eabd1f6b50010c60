"""A probe of a model that does not fit, under a real limit; the whole model dies under it.

The model is stored in bfloat16 and computed with in float32, so that its weights need memory that
the kernel cannot take back.
"""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from cgroups import Group, memory_group
from safetensors.torch import save_file

from fedpruner_common.modeling.meta import meta_model

MIB = 1 << 20
LAYERS, HIDDEN, FFN, TOKENS = 14, 512, 2048, 2 * 16
ROOM = 100 * MIB  # beyond what the libraries take; the model takes 224 MiB in float32


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 112 MiB in bfloat16."""
    path = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=8, max_position_embeddings=128, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(path)
    torch.manual_seed(0)
    tensors = {
        name: (0.02 * torch.randn(p.shape)).bfloat16() if p.dim() > 1 else torch.ones(p.shape)
        for name, p in meta_model(config).named_parameters()
    }
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def layer_parameters() -> int:
    return 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN


@pytest.fixture
def group() -> Iterator[Group | None]:
    """A cgroup, or None where it cannot be had."""
    with memory_group() as (found, _):
        yield found


class Child:
    """A probing process, waiting."""

    def __init__(self, directory: Path, mode: str) -> None:
        here = Path(__file__).parent
        paths = [str(here), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, str(here / "probe_child.py"), str(directory), mode],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # Freed memory goes back at once, so that the peak is what is in use.
            env={**os.environ, "PYTHONPATH": ":".join(paths), "MALLOC_TRIM_THRESHOLD_": "0",
                 "MALLOC_MMAP_THRESHOLD_": "65536"},
        )  # fmt: skip

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # nothing happens to one that has ended
        self.process.communicate()

    def wait_until_ready(self) -> None:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line == "READY\n", self.process.communicate()[1]

    def status_bytes(self, field: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(n.split()[1]) * 1024 for n in lines if n.startswith(field + ":"))

    def finish(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate("go\n", timeout=120)
        return self.process.returncode, output, errors


def run_limited(child: Child, directory: Path, group: Group | None) -> tuple[int, str, str]:
    child.wait_until_ready()
    if group:
        group.enter(child.process.pid)
        # Pages touched before are not charged here, those from now on are: weights first of all.
        group.limit(ROOM)
    else:
        # Counts private mappings of files too, so the file is granted on top.
        file_bytes = (directory / "model.safetensors").stat().st_size
        limit = child.status_bytes("VmData") + file_bytes + ROOM
        resource.prlimit(child.process.pid, resource.RLIMIT_DATA, (limit, limit))
    return child.finish()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")


@needs_linux
def test_the_probe_survives_a_limit_that_the_whole_model_does_not(
    model_dir: Path, group: Group | None
) -> None:
    assert LAYERS * layer_parameters() * 4 > 2 * ROOM
    with Child(model_dir, "streamed") as streamed, Child(model_dir, "resident") as resident:
        code, output, errors = run_limited(streamed, model_dir, group)
        assert code == 0, errors
        assert output.startswith("IMPORTANCE ")
        assert len(output.split()) == 1 + LAYERS
        code, output, errors = run_limited(resident, model_dir, group)
    assert "IMPORTANCE" not in output
    if group:
        assert code == -signal.SIGKILL
    else:
        assert code != 0
        assert "memory" in errors.lower()


@needs_linux
def test_a_mapped_probe_holds_one_layer_its_streams_and_little_else(model_dir: Path) -> None:
    with Child(model_dir, "measured") as measured:
        measured.wait_until_ready()
        code, output, errors = measured.finish()
    assert code == 0, errors
    streamed, resident = (
        int(line.split()[1]) for line in output.splitlines() if line.startswith("GROWTH")
    )
    layer = 2 * layer_parameters()
    streams = 2 * (LAYERS + 1) * TOKENS * HIDDEN
    grams = 8 * LAYERS * TOKENS**2
    within_layer = 4 * TOKENS * (3 * FFN + 8 * HIDDEN)
    slack = 16 * MIB  # code that is used for the first time, python, the allocator
    assert streamed <= layer + streams + grams + within_layer + slack
    assert resident >= 0.9 * LAYERS * layer
    importances = {line for line in output.splitlines() if line.startswith("IMPORTANCE")}
    assert len(importances) == 1  # three runs, one result
