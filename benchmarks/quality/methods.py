"""The methods of the grid, each a profile and a few options of the real system."""

from dataclasses import dataclass, field
from typing import Any

Options = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        profile: of the coordinator.
        options: on top of it.
        unlimited: devices have memory for everything: what could be had at best.
        tuned_as: takes its learning rate from this method's tuning; its own if empty.
    """

    profile: str = "default"
    options: Options = field(default_factory=dict)
    unlimited: bool = False
    tuned_as: str = ""


def _variant(tuned_as: str = "default", **tables: dict[str, Any]) -> Method:
    return Method(options=tables, tuned_as=tuned_as)


# What is compared; every one with a learning rate of its own.
MAIN: dict[str, Method] = {
    "full": Method("full", unlimited=True),
    "exclusive": Method("exclusive", tuned_as="full"),
    "fedra": Method("fedra"),
    "depth": Method("depth"),
    "last": Method("last"),
    "even": Method("even"),
    "bi": Method("bi"),
    "random-groups": Method("random-groups"),
    "paper": Method("paper"),
    "paper-plus": Method("paper-plus", tuned_as="paper"),
    "hetlora": Method("hetlora"),
    "flexlora": Method("flexlora"),
    "default": Method(),
    "default-plus": _variant(plan={"granularity": "component"}),
    "streamed": _variant("full", plan={"streaming": True}),
    # The default without what only this project has: a bridge instead of the correction, nothing.
    "bridge": Method(
        options={"plan": {"correction": False, "bridge": "lowrank", "bridge_rank": 32}}
    ),
    "no-correction": Method(options={"plan": {"correction": False}}),
}

# What is claimed, listed before anything ran: the default is better than each of these.
LISTED: dict[str, tuple[str, ...]] = {
    "sev": ("paper", "fedra", "depth"),
    "mod": ("paper", "fedra", "depth", "exclusive"),
}
# All seeds: the default, what it is listed against, and what could be had at best. Then the rest,
# with fewer seeds, since time is short on two cores.
PRIMARY = ("full", "default", "paper", "fedra", "depth", "exclusive")
SECONDARY = ("bi", "no-correction", "bridge", "default-plus")
OTHERS = ("last", "even", "random-groups", "paper-plus", "hetlora", "flexlora", "streamed")
FIRST_ABLATIONS = (
    "correction with a public bridge", "selection = sample", "coverage = off", "grouping = none",
    "grouping = random", "importance = bi", "importance = random", "fedra with correction",
    "aggregation = anchor", "aggregation = svd", "aggregation = rolora",
)  # fmt: skip

# One option of the default changed at a time.
ABLATIONS: dict[str, Method] = {
    "correction with a public bridge": _variant(plan={"bridge": "full"}),
    "correction with a local bridge": _variant(plan={"bridge": "full", "bridge_data": "local"}),
    "selection = sample": _variant(plan={"selection": "sample"}),
    "coverage = off": _variant(plan={"coverage": "off"}),
    "coverage = hard": _variant(plan={"coverage": "hard"}),
    "grouping = none": _variant(plan={"grouping": "none"}),
    "grouping = contiguous": _variant(plan={"grouping": "contiguous"}),
    "grouping = random": _variant(plan={"grouping": "random"}),
    "grouping = shuffled": _variant(plan={"grouping": "shuffled"}),
    "importance = bi": _variant(plan={"importance": "bi"}),
    "importance = random": _variant(plan={"importance": "random"}),
    "statistics = cohort": _variant(plan={"statistics": "cohort"}),
    "protect nothing": _variant(plan={"protect": []}),
    "fedra with correction": Method("fedra", {"plan": {"correction": True}}, tuned_as="default"),
    "aggregation = anchor": _variant(aggregation={"method": "anchor"}),
    "anchor with error feedback": _variant(
        aggregation={"method": "anchor", "error_feedback": True}
    ),
    "aggregation = svd": _variant(aggregation={"method": "svd"}),
    "aggregation = rolora": _variant(aggregation={"method": "rolora"}),
    "aggregation = ffa": _variant(aggregation={"method": "ffa"}),
    "server optimizer = momentum": _variant(aggregation={"server_optimizer": "momentum"}),
    "server optimizer = fedadam": _variant(
        aggregation={"server_optimizer": "fedadam", "server_learning_rate": 0.01}
    ),
    # Time for about four layers of the demo's model at the 100 MB/s of a disk nobody measured.
    "four layers streamed": _variant(plan={"streaming": True, "stream_seconds": 0.033}),
    "fedprox, mu = 0.1": _variant(training={"proximal_mu": 0.1}),
    "lora.r = 8, twice the upload": _variant(lora={"r": 8, "lora_alpha": 16}),
}

# Bridges without correction, for the ladder of bridges.
BRIDGES: dict[str, Method] = {
    "bridge = scale": _variant("bridge", plan={"correction": False, "bridge": "scale"}),
    "bridge = full": _variant("bridge", plan={"correction": False, "bridge": "full"}),
    "bridge = full, local": _variant(
        "bridge", plan={"correction": False, "bridge": "full", "bridge_data": "local"}
    ),
    "fedra with a bridge": Method(
        "fedra", {"plan": {"bridge": "lowrank", "bridge_rank": 32}}, tuned_as="bridge"
    ),
}

ALL: dict[str, Method] = {**MAIN, **ABLATIONS, **BRIDGES}
