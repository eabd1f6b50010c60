"""`python -m benchmarks.wire`: measure the wire against physical limits, and make the page.

    down       1 GB from checkpoint to verified files, beside bare sockets, in the clear and TLS
    up         an update of 100 MB to a coordinator that checks and stores it, likewise
    memory     the coordinator while 1, 10 and 100 agents download models of 0.25 and 1 GB
    uploads    the coordinator while 100 agents upload 1 MiB each at once
    rounds     rounds of 10, 100 and 500 agents that train nothing
    flower     1 GB there and back, Flower beside ours (only where asked for: it installs Flower)
    report     docs/wire.md from all records of benchmarks/results/wire.jsonl

Without a name all but `flower`. Every measurement appends a line to the records; the page shows the
newest run of each part. On a machine that is used otherwise, give this session the cores:

    setsid -w sh -c 'echo -20 > /proc/self/autogroup; exec python -m benchmarks.wire'
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from benchmarks.wire import flower_pair, memory, report, rounds, transfers
from benchmarks.wire.records import RECORDS, Recorder

_PARTS = ("down", "up", "memory", "uploads", "rounds", "flower", "report")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wire",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", choices=[*_PARTS, []], help="only these")
    parser.add_argument("--flower", action="store_true", help="with Flower")
    parser.add_argument("--dir", type=Path, help="for models and what arrives; default: temporary")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RECORDS)
    arguments = parser.parse_args()
    parts = set(arguments.parts or _PARTS) - (set() if arguments.parts else {"flower"})
    parts |= {"flower"} if arguments.flower else set()
    signal.signal(signal.SIGTERM, _leave)
    if parts - {"report"}:
        with tempfile.TemporaryDirectory(prefix="fedpruner-wire-", dir=arguments.dir) as name:
            _measure(parts, Path(name), arguments)
    if "report" in parts:
        report.write(arguments.output)


def _measure(parts: set[str], folder: Path, arguments: argparse.Namespace) -> None:
    recorder = Recorder(arguments.output, folder)
    if "down" in parts:
        transfers.down(folder / "down", recorder, arguments.repetitions)
    if "up" in parts:
        transfers.up(folder / "up", recorder, arguments.repetitions)
    if "memory" in parts:
        memory.downloads(folder / "memory", recorder)
    if "uploads" in parts:
        memory.uploads(folder / "uploads", recorder, min(3, arguments.repetitions))
    if "rounds" in parts:
        rounds.run(folder / "rounds", recorder)
    if "flower" in parts:
        flower_pair.run(folder / "flower", recorder, rounds=min(4, arguments.repetitions))


def _leave(number: int, _: object) -> NoReturn:
    # Python dies of SIGTERM without unwinding, and the measured processes would be left behind.
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
