"""What the records of a grid say: the runs that count, and each method against another."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.quality.methods import ALL, LISTED
from benchmarks.quality.statistics import Interval, holm, sign_flip_p, smallest_p, t_interval
from benchmarks.quality.tuning import TUNING_SEED, Record, best_rates

LEVEL = 0.05  # of a claim
# What the default is compared with, listed before any run: Holm's correction is over these.
COMPARED = LISTED
BySeed = dict[int, float]


@dataclass(frozen=True)
class Grid:
    """The records of one domain that are results.

    Attributes:
        all: every record, tuning included.
        runs: (budgets, method) -> seed -> record.
        num_unused: records that are neither tuning nor used: repeated, or at a rate not chosen.
    """

    all: tuple[Record, ...]
    runs: Mapping[tuple[str, str], Mapping[int, Record]]
    num_unused: int

    @staticmethod
    def of(records: Sequence[Record]) -> "Grid":
        """The last record for each setting, method and seed, at the method's tuned rate.

        Raises:
            ValueError: the records are of different models, domains or shapes.
        """
        kinds = {json.dumps([r["model"], r["domain"], r["shape"]]) for r in records}
        if len(kinds) > 1:
            raise ValueError(f"records of one model, domain and shape expected: {sorted(kinds)}")
        rates = best_rates(records)
        runs: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
        results = [r for r in records if r["seed"] != TUNING_SEED]
        for record in results:
            rate = rates.get(tuned_as(record["method"]), record["learning_rate"])
            if record["learning_rate"] == rate:
                runs[record["budgets"], record["method"]][record["seed"]] = record
        return Grid(tuple(records), dict(runs), len(results) - sum(map(len, runs.values())))

    @property
    def results(self) -> list[Record]:
        """The records of `runs`."""
        return [record for by_seed in self.runs.values() for record in by_seed.values()]

    def of_method(self, budgets: str, method: str) -> Mapping[int, Record]:
        """Seed -> record; empty when it was not run."""
        return self.runs.get((budgets, method), {})

    def values(self, budgets: str, method: str, key: str) -> BySeed:
        """One number of each of a method's runs."""
        return {seed: run[key] for seed, run in self.of_method(budgets, method).items()}

    def bases(self, budgets: str) -> BySeed:
        """Loss without tuning, for every seed that any method was run with."""
        return {r["seed"]: r["loss_base"] for r in self.results if r["budgets"] == budgets}

    def by_loss(self, budgets: str, methods: Iterable[str]) -> list[str]:
        """Those of the methods that were run, the lowest mean loss first; diverged ones last."""
        found = {
            name: mean(losses.values())
            for name in methods
            if (losses := self.values(budgets, name, "loss"))
        }
        return sorted(found, key=lambda name: (not math.isfinite(found[name]), found[name]))


@dataclass(frozen=True)
class Comparison:
    """A method against another on the seeds that both have.

    Attributes:
        difference: its loss minus the other's, nats per token; below zero it is better.
        p: exact, two-sided, for this comparison alone.
        adjusted: the same after Holm's correction; None where there is none.
    """

    difference: Interval
    p: float
    adjusted: float | None = None


def tuned_as(method: str) -> str:
    """The method whose tuning gave this one its learning rate."""
    return (method in ALL and ALL[method].tuned_as) or method


def paired(these: BySeed, those: BySeed) -> list[float]:
    """Differences on the seeds that both have."""
    return [these[seed] - those[seed] for seed in sorted(these.keys() & those.keys())]


def compare(grid: Grid, budgets: str, method: str, reference: str) -> Comparison:
    """A method against a reference, uncorrected."""
    these, those = (grid.values(budgets, name, "loss") for name in (method, reference))
    differences = paired(these, those)
    return Comparison(t_interval(differences), sign_flip_p(differences))


def compare_listed(grid: Grid, budgets: str) -> dict[str, Comparison]:
    """The default against each method that was listed, those without a common seed left out."""
    found = {name: compare(grid, budgets, name, "default") for name in COMPARED[budgets]}
    made = {name: c for name, c in found.items() if c.difference.num}
    adjusted = holm([c.p for c in made.values()], num_comparisons=len(COMPARED[budgets]))
    return {
        name: Comparison(c.difference, c.p, p)
        for (name, c), p in zip(made.items(), adjusted, strict=True)
    }


def gap_closures(grid: Grid, budgets: str, method: str) -> BySeed:
    """Per cent of what tuning with memory for everything gains, by seed.

    A seed without a run of `full`, or on which `full` gained nothing, is left out.
    """
    full = grid.values(budgets, "full", "loss")
    return {
        seed: 100 * (run["loss_base"] - run["loss"]) / (run["loss_base"] - full[seed])
        for seed, run in grid.of_method(budgets, method).items()
        if seed in full and run["loss_base"] > full[seed]
    }


def ends_worse(grid: Grid, budgets: str, method: str) -> bool:
    """Whether its mean loss is not below that of no tuning on the same seeds."""
    runs = grid.of_method(budgets, method).values()
    return not mean(run["loss"] - run["loss_base"] for run in runs) <= 0


def word_for(comparison: Comparison) -> str:
    """What one comparison says, without a correction for the others."""
    num = comparison.difference.num
    if smallest_p(num) >= LEVEL:
        return f"too few seeds to say (n = {num})"
    if (comparison.p < LEVEL) != comparison.difference.excludes_zero:
        return "unclear"
    if comparison.p >= LEVEL:
        return "no difference seen"
    return "helps" if comparison.difference.mean < 0 else "hurts"


def word_for_default(comparison: Comparison) -> str:
    """What a listed comparison says of the default, after the correction."""
    if comparison.adjusted is None:
        return "not listed"
    if comparison.adjusted >= LEVEL:
        return "not established"
    if not comparison.difference.excludes_zero:
        return "not established"
    return "default better" if comparison.difference.mean > 0 else "default worse"
