"""Records as JSON lines: what is there is not measured again."""

import json
import platform
import subprocess
import threading
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]
_writing = threading.Lock()


def read(path: Path) -> list[Record]:
    """All records of a file; none if there is no file."""
    return [json.loads(line) for line in path.open()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """Add a record, with where and of what code it is; several threads may do so."""
    line = json.dumps({**record, **_ENVIRONMENT}) + "\n"
    with _writing, path.open("a") as file:
        file.write(line)


def _environment() -> Record:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+changes"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return {
        "commit": described.stdout.strip(),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


_ENVIRONMENT = _environment()  # of the code that this process has read
