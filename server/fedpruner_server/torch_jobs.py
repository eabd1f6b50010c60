"""The coordinator's child process: everything that needs torch, one job at a time.

Run as `python -m fedpruner_server.torch_jobs`; `fedpruner_common.child` speaks to it.
"""

from fedpruner_common import malloc

malloc.set_for_training()

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from fedpruner_common.child import Json, Progress, serve
from fedpruner_common.components import ComponentId
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.statistics import Granularity, statistics_to_json
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind
from fedpruner_server import specs
from fedpruner_server.bridge import BridgeFitter
from fedpruner_server.config import LoraOptions, TrainingOptions
from fedpruner_server.describe import describe
from fedpruner_server.evaluate import Evaluator
from fedpruner_server.merge import merge
from fedpruner_server.probe import probe

_evaluators: dict[str, Evaluator] = {}
_fitters: dict[str, BridgeFitter] = {}


def _describe(arguments: Json, _: Progress) -> Json:
    tensors = {
        t["name"]: TensorInfo(**{**t, "shape": tuple(t["shape"])}) for t in arguments["tensors"]
    }
    spec = describe(
        Path(arguments["model"]),
        tensors,
        lora=LoraOptions(**arguments["lora"]),
        training=TrainingOptions(**arguments["training"]),
    )
    return specs.spec_to_json(spec)


def _probe(arguments: Json, _: Progress) -> Json:
    statistics = probe(
        Path(arguments["model"]),
        [Path(path) for path in arguments["calibration"]],
        granularity=Granularity(arguments["granularity"]),
        score=arguments["score"],
        max_seq_length=arguments["max_seq_length"],
        num_sequences=arguments["num_sequences"],
        seed=arguments["seed"],
        rms_rows=arguments["rms_rows"],
        adapter_dir=Path(arguments["adapter"]) if arguments["adapter"] else None,
    )
    return statistics_to_json(statistics)


def _evaluate(arguments: Json, _: Progress) -> Json:
    adapter = arguments.pop("adapter")
    key = repr(sorted(arguments.items()))
    if key not in _evaluators:
        _evaluators[key] = Evaluator(
            Path(arguments["model"]),
            [Path(path) for path in arguments["files"]],
            max_seq_length=arguments["max_seq_length"],
            max_sequences=arguments["max_sequences"],
        )
    return {"losses": _evaluators[key].losses(Path(adapter) if adapter else None)}


def _fit_bridges(arguments: Json, _: Progress) -> Json:
    which = {key: arguments[key] for key in ("model", "calibration", "max_seq_length")}
    key = repr(sorted(which.items()))
    if key not in _fitters:
        _fitters[key] = BridgeFitter(
            Path(arguments["model"]),
            [Path(path) for path in arguments["calibration"]],
            max_seq_length=arguments["max_seq_length"],
            num_sequences=arguments["num_sequences"],
        )
    submodels = [
        Submodel.of(arguments["num_layers"], map(ComponentId.parse, components))
        for components in arguments["submodels"]
    ]
    _fitters[key].fit(
        submodels,
        [Path(path) for path in arguments["paths"]],
        kind=BridgeKind(arguments["kind"]),
        rank=arguments["rank"],
        adapter_dir=Path(arguments["adapter"]) if arguments["adapter"] else None,
    )
    return {}


def _merge(arguments: Json, _: Progress) -> Json:
    merge(Path(arguments["model"]), Path(arguments["adapter"]), Path(arguments["output"]))
    return {}


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if num_threads := int(os.environ.get("FEDPRUNER_NUM_THREADS", "0")):
        torch.set_num_threads(num_threads)
    serve(
        {
            "describe": _describe,
            "probe": _probe,
            "fit_bridges": _fit_bridges,
            "evaluate": _evaluate,
            "merge": _merge,
        }
    )


if __name__ == "__main__":
    main()
