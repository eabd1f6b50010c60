"""ModelSpec and Statistics <-> JSON: how the torch jobs hand their findings to the coordinator."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from fedpruner_common.adapters import LoraTarget
from fedpruner_common.budget import MemoryProfile
from fedpruner_common.components import ComponentId
from fedpruner_common.spec import ModelSpec
from fedpruner_server.core.statistics import Family, FamilyStatistics, Statistics

Json = dict[str, Any]


def _by_component(values: Mapping[ComponentId, Any]) -> Json:
    return {str(component): value for component, value in values.items()}


def _component_keys(values: Json) -> dict[ComponentId, Any]:
    return {ComponentId.parse(key): value for key, value in values.items()}


def spec_to_json(spec: ModelSpec) -> Json:
    """A spec as JSON values."""
    memory = {
        field.name: _by_component(value) if isinstance(value, Mapping) else value
        for field in fields(spec.memory)
        for value in [getattr(spec.memory, field.name)]
    }
    targets = {c: [asdict(target) for target in t] for c, t in spec.lora_targets.items()}
    return {
        "num_layers": spec.num_layers,
        "shared_tensors": list(spec.shared_tensors),
        "component_tensors": _by_component({c: list(n) for c, n in spec.component_tensors.items()}),
        "lora_targets": _by_component(targets),
        "fan_in_fan_out": spec.fan_in_fan_out,
        "memory": memory,
    }


def spec_from_json(data: Json) -> ModelSpec:
    """The spec that `spec_to_json` wrote."""
    memory: Json = {
        name: _component_keys(value) if isinstance(value, dict) else value
        for name, value in data["memory"].items()
    }
    tensors = _component_keys(data["component_tensors"])
    targets = _component_keys(data["lora_targets"])
    return ModelSpec(
        num_layers=data["num_layers"],
        shared_tensors=tuple(data["shared_tensors"]),
        component_tensors={component: tuple(names) for component, names in tensors.items()},
        lora_targets={c: tuple(LoraTarget(**t) for t in items) for c, items in targets.items()},
        fan_in_fan_out=data["fan_in_fan_out"],
        memory=MemoryProfile(**memory),
    )


def statistics_to_json(statistics: Statistics) -> Json:
    """Statistics as JSON values."""
    families = {
        family.value: {
            "similarity": np.asarray(item.similarity).tolist(),
            "importance": list(item.importance),
        }
        for family, item in statistics.families.items()
    }
    return {"families": families, "source": statistics.source, "score": statistics.score}


def statistics_from_json(data: Json) -> Statistics:
    """The statistics that `statistics_to_json` wrote."""
    families = {
        Family(name): FamilyStatistics(np.array(item["similarity"]), tuple(item["importance"]))
        for name, item in data["families"].items()
    }
    return Statistics(families, data["source"], data["score"])
