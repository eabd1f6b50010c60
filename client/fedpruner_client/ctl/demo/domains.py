"""The demo's text: four private domains and some public text, made from what every Python has.

Four imaginary teams, each with documents of its own kind and none of the others':

    manual      the Python language reference (pydoc's topics): English prose
    bytecode    disassembly listings of standard library functions
    characters  Unicode's table of names
    trees       syntax trees of standard library modules

The base model was pretrained on the standard library's source code and has seen none of these.
"""

import ast
import dis
import importlib
import inspect
import io
import json
import random
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Documents per domain: unequal on purpose.
_NUM_DOCUMENTS = {"manual": 50, "bytecode": 120, "characters": 30, "trees": 20}
_MAX_CHARACTERS = 6_000  # of one document
_HELD_OUT_EVERY = 5
_MODULES = (
    "argparse", "bdb", "calendar", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "difflib", "fractions", "ftplib", "functools", "heapq", "inspect", "json.decoder",
    "locale", "mailbox", "optparse", "pathlib", "pickle", "platform", "pprint", "shlex", "shutil",
    "smtplib", "statistics", "string", "tarfile", "textwrap", "threading", "tokenize", "traceback",
    "typing", "unittest.mock", "urllib.parse", "urllib.request", "zipfile",
)  # fmt: skip


def manual() -> list[str]:
    topics: ModuleType = importlib.import_module("pydoc_data.topics")
    return [text for _, text in sorted(topics.topics.items()) if len(text) > 800]


def bytecode() -> list[str]:
    return [_disassembled(function) for function in _functions()]


def _functions() -> list[Callable[..., object]]:
    functions: list[Callable[..., object]] = []
    for name in _MODULES:
        module = importlib.import_module(name)
        for _, function in sorted(inspect.getmembers(module, inspect.isfunction)):
            if function.__module__ == name and len(function.__code__.co_code) > 200:
                functions.append(function)
    return functions


def _disassembled(function: Callable[..., object]) -> str:
    listing = io.StringIO()
    print(f"{function.__module__}.{function.__qualname__}:", file=listing)
    dis.dis(function, file=listing)
    return listing.getvalue()


def characters() -> list[str]:
    named = [(c, unicodedata.name(chr(c), "")) for c in range(0x20, 0x3000)]
    lines = [
        f"U+{code:04X} {unicodedata.category(chr(code))} {name}" for code, name in named if name
    ]
    return ["\n".join(lines[start : start + 96]) for start in range(0, len(lines), 96)]


def trees() -> list[str]:
    return [ast.dump(ast.parse(source), indent=1) for source in _sources()]


def _sources() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (root / (name.replace(".", "/") + ".py") for name in _MODULES)
    return [path.read_text(encoding="utf-8") for path in paths if path.is_file()]


DOMAINS: dict[str, Callable[[], list[str]]] = {
    "manual": manual,
    "bytecode": bytecode,
    "characters": characters,
    "trees": trees,
}


def write_public_text(path: Path) -> Path:
    """Some of the base model's own kind of text, for the coordinator to measure the layers on."""
    return _write_jsonl(path, [source[:_MAX_CHARACTERS] for source in _sources()])


def write_domain(name: str, folder: Path) -> tuple[Path, Path]:
    """One domain as JSONL files: what its owner trains on, and what is held out."""
    documents = [text[:_MAX_CHARACTERS] for text in DOMAINS[name]()]
    return write_split(documents[: _NUM_DOCUMENTS[name]], name, folder)


def write_split(documents: list[str], name: str, folder: Path) -> tuple[Path, Path]:
    """Training and held-out documents as JSONL, every fifth held out, in a fixed shuffled order."""
    rows = list(documents)
    random.Random(0).shuffle(rows)
    held_out = rows[::_HELD_OUT_EVERY]
    train = [row for index, row in enumerate(rows) if index % _HELD_OUT_EVERY]
    return (
        _write_jsonl(folder / "private" / f"{name}.jsonl", train),
        _write_jsonl(folder / "held_out" / f"{name}.jsonl", held_out),
    )


def _write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
