"""The child process of test_trainer.py: `python -m trainer_stand_in`, in place of torch.

Environment variables say what it does: ATTEMPTS is a file that gets a line for every attempt at a
task; FITS are settings, as JSON, without which it ends as END says.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from fedpruner_common.child import Json, Progress, serve
from fedpruner_common.errors import DataError, OutOfMemory


def killed(_: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(_: Progress) -> None:
    raise OutOfMemory("memory ran out: not enough of it")


def no_data(_: Progress) -> None:
    raise DataError("train.jsonl: line 3 is not JSON")


def leave(_: Progress) -> None:
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)


def hang(progress: Progress) -> None:
    progress({"step": 1})
    threading.Event().wait()


ENDS = {end.__name__: end for end in (killed, out_of_memory, no_data, leave, hang)}


def train(arguments: Json, progress: Progress) -> Json:
    training = arguments["training"]
    with Path(os.environ["ATTEMPTS"]).open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "training": training}) + "\n")
    wanted = json.loads(os.environ["FITS"])
    if any(training[name] != value for name, value in wanted.items()):
        ENDS[os.environ["END"]](progress)
    progress({"step": training["max_steps"]})
    return {
        "num_examples": 10,
        "num_tokens": 70,
        "train_loss_first": 2.0,
        "train_loss_last": 1.5,
        "measured_peak_bytes": 4096,
        "train_s": 0.5,
    }


if __name__ == "__main__":
    serve({"train": train})
