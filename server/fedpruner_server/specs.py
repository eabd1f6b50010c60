"""ModelSpec and plans <-> JSON: for the torch jobs, the journal and remembered facts."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from fedpruner_common.adapters import LoraTarget
from fedpruner_common.budget import MemoryProfile
from fedpruner_common.components import ComponentId
from fedpruner_common.manifest import FileInfo
from fedpruner_common.spec import ModelSpec
from fedpruner_common.task import BridgeKind, BridgeSettings
from fedpruner_server.core.planning import ClientPlan
from fedpruner_server.method import TaskPlan

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


def choices_to_json(plan: ClientPlan) -> Json:
    """Why a client's plan is what it is, as JSON values: enough to replay it."""
    return {
        family.value: [asdict(choice) for choice in choices]
        for family, choices in plan.choices.items()
    }


def plan_to_json(plan: TaskPlan) -> Json:
    """A client's plan as JSON values."""
    return {
        "components": [str(component) for component in plan.components],
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "bridge": asdict(plan.bridge),
        "bridge_file": asdict(plan.bridge_file) if plan.bridge_file else None,
        "streamed": list(plan.streamed),
        "model_peak_bytes": plan.model_peak_bytes,
        "floor_bytes": plan.floor_bytes,
    }


def plan_from_json(data: Json) -> TaskPlan:
    """The plan that `plan_to_json` wrote."""
    bridge = data["bridge"]
    return TaskPlan(
        components=tuple(map(ComponentId.parse, data["components"])),
        predicted_peak_bytes=data["predicted_peak_bytes"],
        bridge=BridgeSettings(**{**bridge, "kind": BridgeKind(bridge["kind"])}),
        bridge_file=FileInfo(**data["bridge_file"]) if data["bridge_file"] else None,
        streamed=tuple(data["streamed"]),
        model_peak_bytes=data["model_peak_bytes"],
        floor_bytes=data["floor_bytes"],
    )
