"""`python -m benchmarks.quality`: run what is missing of the grid.

Every finished run is a line of `benchmarks/results/quality-<domain>[-<model>].jsonl`; what is there
is not run again, so the grid may be stopped and started at any time, and several processes may
share it. `python -m benchmarks.quality.report` makes the page of results.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.quality import domains
from benchmarks.quality.grid import Cell, Shape, run_cell
from benchmarks.quality.methods import (
    ABLATIONS,
    ALL,
    BRIDGES,
    FIRST_ABLATIONS,
    OTHERS,
    PRIMARY,
    SECONDARY,
)
from benchmarks.quality.tuning import TUNING_SEED, Record, best_rates, missing_rates, tuned_methods

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO_MODEL = ROOT / "client" / "fedpruner_client" / "ctl" / "demo" / "base_model"


def main() -> None:
    arguments = _arguments()
    if arguments.jobs == 1:
        _work(arguments)
        return
    one = [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:], "--jobs", "1"]
    # Threads that spin while they wait cost more than they bring beside another run.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    workers = [subprocess.Popen(one, env=env, cwd=ROOT) for _ in range(arguments.jobs)]
    sys.exit(max(worker.wait() for worker in workers))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="base model")
    parser.add_argument("--data", type=Path, help="JSONL with `text`; default: C++ headers")
    parser.add_argument("--key", default="speaker", help="key of the client in --data")
    parser.add_argument("--num-layers", type=int, default=12, help="of the base model")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--num-rounds", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so long")
    parser.add_argument("--methods", nargs="*", choices=list(ALL), help="only these")
    return parser.parse_args()


def _wanted(arguments: argparse.Namespace) -> set[str]:
    return set(arguments.methods or ALL)


def _to_tune(arguments: argparse.Namespace) -> list[str]:
    """Methods whose rate some wanted method takes."""
    needed = {ALL[name].tuned_as or name for name in _wanted(arguments)}
    return [method for method in tuned_methods() if method in needed]


def _cells(arguments: argparse.Namespace, records: list[Record]) -> Iterator[Cell]:
    """Runs that are still to be done, in the order of what they are worth."""
    for method in _to_tune(arguments):
        for rate in missing_rates(method, records):
            yield Cell(method, "sev", TUNING_SEED, rate)
    rates = best_rates(records)
    wanted = _wanted(arguments)
    first = arguments.first_seed
    seeds = range(first, first + arguments.seeds)
    some = seeds[:3]
    rest = [name for name in (*ABLATIONS, *BRIDGES) if name not in FIRST_ABLATIONS]
    in_sev = [name for name in PRIMARY if name != "exclusive"]  # nobody would take part
    blocks: list[tuple[Iterable[int], str, Iterable[str]]] = [
        (seeds, "sev", in_sev),
        (some, "sev", SECONDARY),
        (some, "mod", PRIMARY),
        (some, "sev", FIRST_ABLATIONS),
        (seeds, "mod", PRIMARY),
        (some, "sev", OTHERS),
        (some, "mod", SECONDARY),
        (seeds, "sev", [*SECONDARY, *FIRST_ABLATIONS]),
        (some, "sev", rest),
    ]
    for seed, budgets, name in (
        (seed, budgets, name)
        for among, budgets, names in blocks
        for seed in among
        for name in names
    ):
        rate = rates.get(ALL[name].tuned_as or name)
        if name in wanted and rate is not None:
            yield Cell(name, budgets, seed, rate)


def _work(arguments: argparse.Namespace) -> None:
    """Take one missing run after another."""
    ends = time.monotonic() + 60 * arguments.minutes
    folder = Path(tempfile.mkdtemp(prefix="fedpruner-quality-"))
    if arguments.data:
        domain = domains.clients_of_jsonl(arguments.data, arguments.key, folder / "text")
    else:
        domain = domains.headers(folder / "text")
    shape = Shape(arguments.model, arguments.num_layers, arguments.num_rounds)
    of_model = "" if arguments.model == DEMO_MODEL else f"-{arguments.model.name}"
    path = RESULTS / f"quality-{domain.name}{of_model}.jsonl"
    while time.monotonic() < ends:
        cell = _next(arguments, path)
        if cell is None:
            return
        record = run_cell(cell, shape, domain, folder / "run")
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{cell.method:32} {cell.budgets} seed {cell.seed} lr {cell.learning_rate:g}: "
            f"{record['loss_base']:.3f} -> {record['loss']:.3f}  ({record['seconds']:.0f} s)",
            flush=True,
        )


def _next(arguments: argparse.Namespace, path: Path) -> Cell | None:
    """The next run nobody has done or taken; None when there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.with_suffix(".taken").open("a+") as taken_file:
            fcntl.flock(taken_file, fcntl.LOCK_EX)
            taken_file.seek(0)
            owners = dict(line.rstrip("\n").split("\t", 1)[::-1] for line in taken_file)
            records = _records(path)
            done = {_key(record) for record in records}
            for cell in _cells(arguments, records):
                owner = owners.get(cell.key)
                if cell.key not in done and not (owner and Path(f"/proc/{owner}").exists()):
                    taken_file.write(f"{os.getpid()}\t{cell.key}\n")
                    return cell
        if not any(missing_rates(method, records) for method in _to_tune(arguments)):
            return None
        time.sleep(5)  # another process is still tuning, and what is next depends on it


def _records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def _key(record: Record) -> str:
    return Cell(record["method"], record["budgets"], record["seed"], record["learning_rate"]).key


if __name__ == "__main__":
    main()
