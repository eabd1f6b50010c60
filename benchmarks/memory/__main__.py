"""`python -m benchmarks.memory`: measure what is missing, and make the page.

    accuracy   the byte model against the kernel's peak: benchmarks/results/memory.jsonl
    headline   a device with memory for two layers, and what others need: memory-headline.jsonl
    modes      one limit, several ways to live with it (needs root): memory-modes.jsonl
    report     docs/memory.md from all of them

Without a name all four. What has a record is not measured again.
"""

import argparse
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import transformers

from benchmarks.memory import accuracy, headline, modes, report
from benchmarks.memory.agent import MIB, Bench
from benchmarks.memory.records import append, read
from fedpruner_client.ctl.demo.domains import write_domain
from fedpruner_common.errors import FedPrunerError

_PARTS = ("accuracy", "headline", "modes", "report")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=_PARTS, help="only this")
    parser.add_argument("--jobs", type=int, default=2, help="measurements at a time")
    parser.add_argument("--only", nargs="*", default=[], help="names of configurations")
    parser.add_argument("--work", type=Path, help="for models and tokenizers; default: temporary")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parts = [arguments.part] if arguments.part else _PARTS
    with tempfile.TemporaryDirectory(prefix="fedpruner-memory-") as name:
        work = arguments.work or Path(name)
        text, _ = write_domain("manual", work)
        if "accuracy" in parts:
            _accuracy(work, text, arguments.jobs, arguments.only)
        if "headline" in parts:
            headline.run(work, text, arguments.only)
        if "modes" in parts:
            modes.run(work, text)
    if "report" in parts:
        report.write()


def _accuracy(work: Path, text: Path, jobs: int, only: list[str]) -> None:
    local = threading.local()
    benches: list[Bench] = []

    def do(case: accuracy.Case) -> None:
        if not hasattr(local, "bench"):
            local.bench = Bench(work / f"bench-{threading.get_ident()}", text, work / "tokenizers")
            benches.append(local.bench)
        try:
            record = accuracy.measure(case, local.bench)
        except FedPrunerError as error:
            print(f"{case.name}: {error}", flush=True)
            return
        append(accuracy.RECORDS, record)
        errors = accuracy.with_errors(record)
        print(
            f"{case.name:46} floor {record['floor_bytes'] / MIB:6.1f}, "
            f"predicted {record['predicted_bytes'] / MIB:7.1f}, "
            f"measured {record['measured_bytes'] / MIB:7.1f} MiB: {errors['error']:+.1%}, "
            f"above the floor {errors['error_above_floor']:+.1%}",
            flush=True,
        )

    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(do, accuracy.missing(read(accuracy.RECORDS), only)))
    finally:
        for bench in benches:
            bench.close()


if __name__ == "__main__":
    main()
