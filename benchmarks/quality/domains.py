"""Text for the grid: ten clients with text of their own, and public text of another kind.

By default it is what every machine with this project has: C++ headers of the installed torch, one
directory per client, to be learned; Python's standard library, which the base model was pretrained
on, as public text. Any JSONL file with one client per value of a key does as well.
"""

import json
import random
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

NUM_CLIENTS = 10
_TRAIN_CHARACTERS, _EVAL_CHARACTERS, _PUBLIC_CHARACTERS = 400_000, 20_000, 200_000
_HEADERS = (
    "ATen/ops", "ATen/native", "ATen/core", "ATen/cpu", "c10", "torch/csrc/jit",
    "torch/csrc/autograd", "torch/csrc/api", "torch/csrc/distributed", "pybind11",
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """Files of text.

    Attributes:
        name: for the records.
        train: one file per client.
        eval: of the same clients, other texts.
        public: that the coordinator may see.
    """

    name: str
    train: tuple[Path, ...]
    eval: tuple[Path, ...]
    public: Path


def headers(folder: Path) -> Domain:
    """C++ headers of the installed torch; a fifth of each client's files is held out."""
    import torch

    include = Path(torch.__file__).parent / "include"
    clients = []
    for index, name in enumerate(_HEADERS):
        files = sorted(p for p in (include / name).rglob("*") if p.suffix in (".h", ".hpp"))
        random.Random(index).shuffle(files)
        clients.append([path.read_text(encoding="utf-8", errors="ignore") for path in files])
    return _written("headers", clients, folder)


def clients_of_jsonl(path: Path, key: str, folder: Path) -> Domain:
    """The ten clients with most text in a JSONL file whose rows have `text` and a client's key."""
    by_client: dict[str, list[str]] = defaultdict(list)
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            by_client[str(row[key])].append(row["text"])
    largest = sorted(by_client, key=lambda c: -sum(map(len, by_client[c])))[:NUM_CLIENTS]
    for index, client in enumerate(largest):
        random.Random(index).shuffle(by_client[client])
    return _written(path.stem, [by_client[client] for client in largest], folder)


def _written(name: str, clients: list[list[str]], folder: Path) -> Domain:
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = [], []
    for index, texts in enumerate(clients):
        cut = max(1, len(texts) // 5)
        for kind, part, limit, into in (
            ("eval", texts[:cut], _EVAL_CHARACTERS, held_out),
            ("train", texts[cut:], _TRAIN_CHARACTERS, train),
        ):
            path = folder / f"{kind}-{index}.txt"
            path.write_text("\n".join(part)[:limit])
            into.append(path)
    public = folder / "public.txt"
    public.write_text("\n".join(_python_sources())[:_PUBLIC_CHARACTERS])
    return Domain(name, tuple(train), tuple(held_out), public)


def _python_sources() -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(1).shuffle(files)
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]
