"""`python -m benchmarks.wire.flower`: one JSON object per size and number of clients on stdout."""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import NoReturn

from benchmarks.wire import flower
from benchmarks.wire.flower.environment import DEFAULT_VENV, DEFAULT_VERSION


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wire.flower",
        description=flower.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 1000], help="of 10^6 B")
    parser.add_argument("--tiny", action="store_true", help="8 bytes instead: an empty round")
    parser.add_argument(
        "--clients", type=int, nargs="+", help="default: 1, or 2 and 10 with --tiny"
    )
    parser.add_argument("--rounds", type=int, default=4, help="after the first, which is apart")
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help="made where missing")
    parser.add_argument(
        "--version", default=DEFAULT_VERSION, help="of flwr; '' takes what pip resolves"
    )
    parser.add_argument("--round-timeout", type=float, default=600, metavar="SECONDS")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _leave)
    all_equal = True
    for megabytes in [0] if arguments.tiny else arguments.megabytes:
        for clients in arguments.clients or ([2, 10] if arguments.tiny else [1]):
            try:
                result = flower.run(
                    megabytes,
                    clients=clients,
                    rounds=arguments.rounds,
                    venv=arguments.venv,
                    version=arguments.version,
                    round_timeout_s=arguments.round_timeout,
                )
            except flower.FlowerError as error:
                print(f"{megabytes} MB, {clients} clients: {error}", file=sys.stderr)
                return 1
            print(json.dumps(result), flush=True)
            all_equal = all_equal and result["equal"]
    return 0 if all_equal else 1


def _leave(number: int, _: object) -> NoReturn:
    # Python dies of SIGTERM without unwinding, and Flower's processes would be left behind.
    sys.exit(128 + number)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
