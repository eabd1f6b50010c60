"""`python -m benchmarks.quality.report`: the page of results, from the records of the grid.

Every sentence on the page follows from the records; run it again when there are more of them.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.quality.charts import Series, chart, spoken
from benchmarks.quality.comparison import (
    COMPARED,
    LEVEL,
    BySeed,
    Comparison,
    Grid,
    compare,
    compare_listed,
    ends_worse,
    gap_closures,
    paired,
    word_for,
    word_for_default,
)
from benchmarks.quality.methods import ABLATIONS, ALL, BRIDGES, MAIN
from benchmarks.quality.statistics import smallest_p, t_interval
from benchmarks.quality.tuning import (
    FIRST_RATES,
    TUNING_SEED,
    Record,
    best_rates,
    tried_rates,
    tuned_methods,
)
from benchmarks.quality.words import counted, names, number, p_text, range_text, spread, table

ROOT = Path(__file__).parent.parent.parent
SETTINGS = ("sev", "mod")
# They have, or need, memory for the whole model.
UNLIMITED = ("full", "streamed", "hetlora", "flexlora")
WORSE = "⚠ worse than no tuning"


def section_summary(grid: Grid) -> list[str]:
    lines = ["## In short", ""]
    for budgets in SETTINGS:
        if not grid.values(budgets, "default", "loss"):
            lines += [f"- `{budgets}`: the default was not run; nothing is compared."]
            continue
        lines += [f"- `{budgets}`: {sentence}" for sentence in summary_sentences(grid, budgets)]
    return [*lines, ""]


def summary_sentences(grid: Grid, budgets: str) -> list[str]:
    """What the listed comparisons of one setting say."""
    gap = t_interval(list(gap_closures(grid, budgets, "default").values()))
    found = compare_listed(grid, budgets)
    everyone = {n: compare(grid, budgets, n, "default") for n in MAIN if n not in UNLIMITED}
    ahead = [n for n, c in everyone.items() if c.difference.num and c.difference.mean < 0]
    by_word = defaultdict(list)
    for name, comparison in found.items():
        by_word[word_for_default(comparison)].append(name)
    sentences = []
    if gap.num:
        closes = f"the default closes {spread(gap, '.1f')} % of the gap to full tuning"
        sentences.append(f"{closes} (n = {gap.num}).")
    else:
        sentences.append("no seed has both the default and `full`; no gap closure can be given.")
    sentences.append(
        f"lower mean loss than the default on the same seeds, {names(UNLIMITED)} aside: "
        f"{names(ahead)}."
    )
    sentences.append(
        f"established after correction (adjusted p < {LEVEL:g}): default better than "
        f"{names(by_word['default better'])}; default worse than "
        f"{names(by_word['default worse'])}; not established against "
        f"{names(by_word['not established'])}."
    )
    sentences += unreachable(found, len(COMPARED[budgets]))
    worse = [name for name in grid.by_loss(budgets, MAIN) if ends_worse(grid, budgets, name)]
    sentences.append(f"mean loss above that of no tuning: {names(worse)}.")
    return sentences


def unreachable(found: Mapping[str, Comparison], num_listed: int) -> list[str]:
    """A warning where no result whatever could have been significant."""
    most = max((c.difference.num for c in found.values()), default=0)
    smallest = min(1.0, num_listed * smallest_p(most))
    if not found or smallest < LEVEL:
        return []
    needed = next(n for n in range(1, 99) if num_listed * smallest_p(n) < LEVEL)
    return [
        f"⚠ with {counted(most, 'seed')} the exact test gives p = {smallest_p(most):.3g} at best, "
        f"{smallest:.3g} after correction over {num_listed} comparisons: nothing here could be "
        f"significant at {LEVEL:g}, however large. {needed} seeds would be needed. The intervals "
        "are not corrected and rest on normality; they are no substitute."
    ]


def section_run(grid: Grid, budget_layers: Mapping[str, Sequence[int]]) -> list[str]:
    first = grid.all[0]
    shape, domain = first["shape"], first["domain"]
    layers, rounds = shape["num_layers"], shape["num_rounds"]
    seeds = {r["seed"] for r in grid.results}
    data = "" if domain == "headers" else " --data FILE --key KEY"
    command = f"python -m benchmarks.quality{data} --num-rounds {rounds}"
    if seeds:
        command += f" --first-seed {min(seeds)} --seeds {max(seeds) - min(seeds) + 1}"
    text = "C++ headers of the installed torch, one directory per client" * (domain == "headers")
    hours = sum(r["seconds"] for r in grid.all) / 3600
    lines = [
        "## 1. What was run",
        "",
        f"- Model: `{first['model']}`, {layers} layers. Domain: `{domain}`"
        + (f" ({text})." if text else "."),
        f"- Fleet: {counted(len(budget_layers['sev']), 'client')}, "
        f"{shape['clients_per_round']} per round, {rounds} rounds of {shape['max_steps']} steps, "
        f"batches of {shape['batch_size']} sequences of {shape['seq_length']} tokens, "
        f"LoRA rank {shape['rank']}.",
        *(
            f"- Budgets `{name}`: memory for {', '.join(map(str, sizes))} of 12 layers"
            + ("." if layers == 12 else f", scaled to {layers} layers.")
            for name, sizes in budget_layers.items()
        ),
        "- Same seed: same cohorts, batches, initial adapter and evaluation text for every method. "
        "The loss is that of the full model on held-out text of all clients, their mean, nats per "
        "token, after the last round; no checkpoint is picked.",
        f"- Runs: {runs_text(grid)}, {hours:.1f} hours of one process in all; "
        f"seeds {', '.join(map(str, sorted(seeds))) or 'none'}."
        + (
            f" Not used: {grid.num_unused}, repeated or at another rate." if grid.num_unused else ""
        ),
        f"- Command: `{command}`, then `python -m benchmarks.quality.report`.",
        f"- Commit: {tally(grid.all, 'commit')}. Machine: {tally(grid.all, 'machine')}.",
        # The commit is asked for when a run ends, the code was loaded when its process started.
        *(
            [
                "- ⚠ More than one commit. A run's is that of the checkout at its end; its "
                "code may be of an earlier one."
            ]
            if len({r["commit"] for r in grid.all}) > 1
            else []
        ),
        *inconsistencies(grid),
        "",
    ]
    return [*lines, *tuning_lines(grid)]


def runs_text(grid: Grid) -> str:
    num_tuning = sum(record["seed"] == TUNING_SEED for record in grid.all)
    return f"{len(grid.results)} results and {num_tuning} for tuning"


def tally(records: Iterable[Record], key: str) -> str:
    """The values of a key, with how many runs have each where there is more than one."""
    found = Counter(record[key] or "unknown" for record in records)
    if len(found) == 1:
        return f"`{next(iter(found))}`"
    return ", ".join(f"`{value}` ({counted(n, 'run')})" for value, n in found.most_common())


def inconsistencies(grid: Grid) -> list[str]:
    """Warnings where what should be the same for all methods is not."""
    bases: dict[tuple[str, int], set[float]] = defaultdict(set)
    for record in grid.all:
        bases[record["budgets"], record["seed"]].add(round(record["loss_base"], 6))
    odd = sorted(key for key, found in bases.items() if len(found) > 1)
    return [
        f"- ⚠ The loss without tuning differs between methods in `{budgets}`, seed {seed}: these "
        "runs did not see the same evaluation."
        for budgets, seed in odd
    ]


def tuning_lines(grid: Grid) -> list[str]:
    rates = best_rates(grid.all)
    rows, edges = [], []
    for method in sorted(tuned_methods()):
        tried = tried_rates(method, grid.all)
        if not tried:
            rows.append([f"`{method}`", "–", "not tuned yet", "–"])
            continue
        best = rates.get(method)
        at_edge = best in (min(tried), max(tried))
        if at_edge:
            edges.append(method)
        shares = [name for name in MAIN if MAIN[name].tuned_as == method]
        rows.append(
            [
                f"`{method}`" + (f" (and {names(shares)})" if shares else ""),
                f"{best:g}" if best is not None else "not finished",
                ", ".join(f"{rate:g}: {number(tried[rate], '.3f')}" for rate in sorted(tried)),
                "⚠ at the edge" if at_edge else "",
            ]
        )
    lines = [
        f"Learning rates: the best of those tried in `sev` with seed {TUNING_SEED}, which is used "
        "for nothing else; where the best was at an edge, the next one beyond it, twice at most. "
        f"They are a factor of {FIRST_RATES[1] / FIRST_RATES[0]:g} apart, so no rate is fine. "
        "`mod` uses the same rates. Rows of sections 5 and 6 have no rate of their own: they use "
        "that of the method they vary.",
        "",
        *table(["method", "rate used", "tried (rate: loss)", "remark"], rows),
    ]
    if edges:
        lines += [
            f"⚠ The best rate is the largest or smallest tried for {names(edges)}: a rate further "
            "out might be better, so the method may do better than shown.",
            "",
        ]
    return lines


def section_main(grid: Grid, budgets: str) -> list[str]:
    found = compare_listed(grid, budgets)
    lines = [f"### `{budgets}`", ""]
    rows = [(base_loss, row) for base_loss, row in [base_row(grid, budgets)] if row]
    for method in grid.by_loss(budgets, MAIN):
        losses = grid.values(budgets, method, "loss")
        comparison = found.get(method)
        if comparison is None and method != "default":
            comparison = compare(grid, budgets, method, "default")
        rows.append((mean(losses.values()), main_row(grid, budgets, method, comparison)))
    if not rows:
        return [*lines, "No runs yet.", ""]
    header = [
        "method", "loss", "gap closure, %", "loss − default", "p", "p, Holm", "n",
        "the default is", "remark",
    ]  # fmt: skip
    lines += table(header, in_order(rows))
    return [*lines, *(f"- {sentence}" for sentence in main_notes(grid, budgets, found)), ""]


def in_order(rows: Iterable[tuple[float, list[str]]]) -> list[list[str]]:
    """Rows by their losses, those that are not finite last."""
    return [row for _, row in sorted(rows, key=lambda pair: (not math.isfinite(pair[0]), pair[0]))]


def main_notes(grid: Grid, budgets: str, found: Mapping[str, Comparison]) -> list[str]:
    """What must be known to read a table of methods."""
    listed = COMPARED[budgets]
    notes = [
        f"Holm's correction is over the {len(listed)} comparisons listed before the runs: the "
        f"default against {names(listed)}. The p of the others is uncorrected."
    ]
    notes += unreachable(found, len(listed))
    missing = [m for m in ("default", *listed) if not grid.of_method(budgets, m)]
    if missing:
        notes.append(
            f"Not run yet (n = 0): {names(missing)}; listed, so the correction counts them."
        )
    if budgets == "sev":
        notes.append(
            "`exclusive` (only devices that hold the whole model) is not run here: no device does, "
            "so it stays at the loss of no tuning."
        )
    left = [m for m in MAIN if m not in listed and not grid.of_method(budgets, m)]
    left = [m for m in left if m != "exclusive"]
    if left:
        notes.append(f"Not run in this setting: {names(left)}.")
    return notes


def base_row(grid: Grid, budgets: str) -> tuple[float, list[str]]:
    """No tuning, as a row; an empty one without runs."""
    bases = grid.bases(budgets)
    if not bases:
        return math.inf, []
    against = t_interval(paired(bases, grid.values(budgets, "default", "loss")))
    loss = mean(bases.values())
    cells = [number(loss, ".3f"), "0", spread(against, "+.4f"), "–", "–", str(len(bases)), "–"]
    return loss, ["*no tuning*", *cells, "reference"]


def main_row(grid: Grid, budgets: str, method: str, comparison: Comparison | None) -> list[str]:
    return [
        *loss_cells(grid, budgets, method),
        spread(comparison.difference, "+.4f") if comparison else "–",
        p_text(comparison.p if comparison else None),
        p_text(comparison.adjusted if comparison else None),
        str(len(grid.of_method(budgets, method))),
        word_for_default(comparison).removeprefix("default ") if comparison else "–",
        remarks(grid, budgets, method),
    ]


def loss_cells(grid: Grid, budgets: str, method: str) -> list[str]:
    """Name, mean loss and gap closure."""
    losses = grid.values(budgets, method, "loss").values()
    gaps = t_interval(list(gap_closures(grid, budgets, method).values()))
    return [
        {"full": "*full*", "default": "**default**"}.get(method, f"`{method}`"),
        number(mean(losses), ".3f"),
        "100" if method == "full" and gaps.num else spread(gaps, ".1f"),
    ]


def remarks(grid: Grid, budgets: str, method: str) -> str:
    """What sets a method's row apart from the others."""
    seeds = grid.of_method(budgets, method).keys()
    num_gaps = len(gap_closures(grid, budgets, method))
    found = []
    if method == "full":
        found.append("reference: memory for everything")
    if ends_worse(grid, budgets, method):
        found.append(WORSE)
    if seeds != grid.of_method(budgets, "default").keys():
        found.append("other seeds than the default")
    if num_gaps != len(seeds):
        found.append(f"gap closure of {counted(num_gaps, 'seed')}")
    return "; ".join(found)


def section_submodels(grid: Grid, budgets: str) -> list[str]:
    """Losses of what a device would use itself."""
    lines = []
    runs = {name: grid.of_method(budgets, name) for name in grid.by_loss(budgets, MAIN)}
    sizes = {int(s) for by in runs.values() for r in by.values() for s in r["submodel_losses"]}
    for size in sorted(sizes):
        rows = [
            submodel_row(method, list(by_seed.values()), str(size))
            for method, by_seed in runs.items()
        ]
        header = ["method", "plain", "bridged", "bridged − plain", "n", "size", "above no tuning"]
        lines += [f"### `{budgets}`, {size} of 12 layers", "", *table(header, in_order(rows))]
    return lines


def submodel_row(method: str, runs: Sequence[Record], size: str) -> tuple[float, list[str]]:
    """Its mean loss with bridges, and the row."""
    found = [run["submodel_losses"][size] for run in runs]
    plain, bridged = (mean(f[key] for f in found) for key in ("plain", "bridged"))
    base = mean(run["loss_base"] for run in runs)
    gain = t_interval([f["bridged"] - f["plain"] for f in found])
    planned = sum(f["planned"] for f in found)
    note = f"planned in {planned} of {len(found)}" if planned else "**never planned this size**"
    row = [f"`{method}`", number(plain, ".3f"), number(bridged, ".3f")]
    row += [spread(gain, "+.3f"), str(len(found)), note]
    return bridged, [*row, "⚠" if not bridged <= base else ""]


def section_costs(grid: Grid, budgets: str) -> list[str]:
    """What each method uploads and computes, and what that bought."""
    methods = grid.by_loss(budgets, MAIN)
    largest = [mean(grid.values(budgets, m, "layer_tokens").values()) for m in methods]
    unit, unit_name = (1e9, "G") if max(largest, default=0) >= 1e9 else (1e6, "M")
    rows = [cost_row(grid, budgets, method, unit) for method in methods]
    header = [
        "method", "loss", "MB up", "gap %/MB", "× default", f"{unit_name} layer-tokens",
        f"gap %/{unit_name}", "× default", "tasks", "left out", "n",
    ]  # fmt: skip
    return [f"### `{budgets}`", "", *table(header, rows)] if rows else []


def cost_row(grid: Grid, budgets: str, method: str, unit: float) -> list[str]:
    runs = grid.of_method(budgets, method).values()
    num_mb = mean(run["bytes_up"] for run in runs) / 1e6
    num_layer_tokens = mean(run["layer_tokens"] for run in runs) / unit
    row = [f"`{method}`", number(mean(run["loss"] for run in runs), ".3f")]
    row += [f"{num_mb:.2f}", *rates_of(grid, budgets, method, "bytes_up", 1e6)]
    row += [f"{num_layer_tokens:.3f}", *rates_of(grid, budgets, method, "layer_tokens", unit)]
    row += [range_text(run["tasks"] for run in runs), range_text(run["left_out"] for run in runs)]
    return [*row, str(len(runs))]


def rates_of(grid: Grid, budgets: str, method: str, key: str, unit: float) -> list[str]:
    """Gap closure per unit of a cost, and how that compares with the default's."""
    these, those = (per_unit(grid, budgets, name, key, unit) for name in (method, "default"))
    if not these:
        return ["–", "–"]
    shared = these.keys() & those.keys()
    reference = mean(those[seed] for seed in shared) if shared else 0.0
    if not reference > 0:
        return [number(mean(these.values()), ".1f"), "–"]
    ratio = mean(these[seed] for seed in shared) / reference
    return [number(mean(these.values()), ".1f"), number(ratio, ".2f")]


def per_unit(grid: Grid, budgets: str, method: str, key: str, unit: float) -> BySeed:
    """Gap closure in per cent per unit of a cost, by seed; without seeds that cost nothing."""
    costs = grid.values(budgets, method, key)
    gaps = gap_closures(grid, budgets, method)
    return {seed: gap * unit / costs[seed] for seed, gap in gaps.items() if costs[seed] > 0}


def section_memory(grid: Grid, budgets: str, floor_bytes: int) -> list[str]:
    rows = []
    for method in grid.by_loss(budgets, MAIN):
        runs = grid.of_method(budgets, method).values()
        above = max(run["peak_bytes"] for run in runs) - floor_bytes
        components = mean(run["mean_components"] for run in runs)
        trained = [sum(count > 0 for count in run["coverage"]) for run in runs]
        row = [f"`{method}`", number(mean(run["loss"] for run in runs), ".3f")]
        row += [f"{max(above, 0) / (1 << 20):.1f}", f"{components / 2:.2f}"]
        row += [range_text(trained), str(len(runs))]
        rows.append(row)
    header = ["method", "loss", "peak above the floor, MiB", "layers per task", "trained", "n"]
    return [f"### `{budgets}`", "", *table(header, rows)] if rows else []


def section_variants(grid: Grid, methods: Iterable[str], reference: str) -> list[str]:
    """Each variant against what it varies."""
    lines = []
    methods = list(methods)
    for budgets in SETTINGS:
        found = grid.by_loss(budgets, methods)
        if not found:
            continue
        rows = [variant_row(grid, budgets, method, reference) for method in found]
        header = ["change", "loss", f"loss − {reference}", "p", "n", "the change", "remark"]
        lines += [f"### `{budgets}`", "", *table(header, rows)]
        missing = [name for name in methods if name not in found]
        if missing:
            lines += [f"Not run yet (n = 0): {', '.join(missing)}.", ""]
    return lines or ["No runs yet.", ""]


def variant_row(grid: Grid, budgets: str, method: str, reference: str) -> list[str]:
    comparison = compare(grid, budgets, method, reference)
    num = comparison.difference.num
    return [
        method,
        number(mean(grid.values(budgets, method, "loss").values()), ".3f"),
        spread(comparison.difference, "+.4f"),
        p_text(comparison.p) if num else "–",
        str(num),
        word_for(comparison) if num else f"no `{reference}` run",
        WORSE if ends_worse(grid, budgets, method) else "",
    ]


def gap_series(grid: Grid) -> list[Series]:
    found = []
    for budgets in SETTINGS:
        gaps = {m: gap_closures(grid, budgets, m) for m in MAIN if m != "full"}
        values = {m: t_interval(list(by_seed.values())) for m, by_seed in gaps.items() if by_seed}
        if values:
            found.append(Series(budgets, values, ".0f"))
    return found


def ablation_series(grid: Grid) -> list[Series]:
    found = []
    for budgets in SETTINGS:
        made = {m: compare(grid, budgets, m, "default").difference for m in ABLATIONS}
        values = {m: interval for m, interval in made.items() if interval.num}
        if values:
            found.append(Series(budgets, values, "+.3f"))
    return found


def gap_chart(series: Sequence[Series]) -> str:
    return chart(
        "Gap closure by method",
        "share of full tuning's gain, %; whiskers: 95 % t-interval over seeds",
        series,
        lines=((0.0, "no tuning"), (100.0, "full")),
        best_first=lambda value: -value,
    )


def ablation_chart(series: Sequence[Series]) -> str:
    return chart(
        "Change of the default, one option at a time",
        "loss − default, nats per token, lower is better; whiskers: 95 % t-interval over seeds",
        series,
        lines=((0.0, "default"),),
        best_first=lambda value: value,
    )


def section_others(others: Sequence[Grid]) -> list[str]:
    """A short table for each other base model or text and setting; nothing without any."""
    if not others:
        return []
    lines = [
        "## 7. Other base models and text",
        "",
        "The grid again, or part of it, with learning rates tuned anew as in section 1 and layers "
        "scaled to the model. Every row is compared with the default there, as in section 2, but "
        "nothing was listed before and p is not corrected: these are leads. p needs two seeds, and "
        "n of them cannot bring it below 2 / 2ⁿ. ⚠ marks a rate at the edge of those tried.",
        "",
    ]
    for grid in others:
        first, shape = grid.all[0], grid.all[0]["shape"]
        rates = [
            f"`{name}` {rate:g}" + (" ⚠" if rate in (min(tried), max(tried)) else "")
            for name, rate in best_rates(grid.all).items()
            for tried in [tried_rates(name, grid.all)]
        ]
        lines += [
            f"### `{first['model']}`, `{first['domain']}`",
            "",
            f"- {shape['num_layers']} layers, {shape['num_rounds']} rounds of "
            f"{shape['max_steps']} steps. Runs: {runs_text(grid)}.",
            f"- Learning rates: {', '.join(rates) or 'not tuned yet'}.",
            *inconsistencies(grid),
            "",
            *(line for budgets in SETTINGS for line in other_table(grid, budgets)),
        ]
    return lines


def other_table(grid: Grid, budgets: str) -> list[str]:
    """What was run in a setting, each against the default; nothing without runs."""
    base_loss, base = base_row(grid, budgets)
    if not base:
        return []
    name, loss, gap, difference, p, _, num, _, remark = base
    rows = [(base_loss, [name, loss, gap, difference, p, num, remark])]
    for method in grid.by_loss(budgets, ALL):
        losses = grid.values(budgets, method, "loss")
        versus = compare(grid, budgets, method, "default")
        cells = loss_cells(grid, budgets, method)
        cells.append("–" if method == "default" else spread(versus.difference, "+.4f"))
        has_p = method != "default" and versus.difference.num >= 2
        cells.append(p_text(versus.p if has_p else None))
        row = [*cells, str(len(losses)), remarks(grid, budgets, method)]
        rows.append((mean(losses.values()), row))
    header = ["method", "loss", "gap closure, %", "loss − default", "p", "n", "remark"]
    return [f"#### `{budgets}`", "", *table(header, in_order(rows))]


def limits(grid: Grid, others: Sequence[Grid]) -> list[str]:
    shape = grid.all[0]["shape"]
    counts = {len(by_seed) for g in (grid, *others) for by_seed in g.runs.values()} or {0}
    rounds, steps = shape["num_rounds"], shape["max_steps"]
    one = "Sections 1 to 6: one" if others else "One"
    return [
        f"## {8 if others else 7}. What the numbers do not say",
        "",
        f"- {one} small model of {shape['num_layers']} layers, pretrained once. Large models have "
        "more redundant layers; neither sizes nor signs of differences carry over by themselves.",
        f"- {one} domain (`{grid.all[0]['domain']}`), one split of it between clients.",
        f"- Few seeds: {range_text(counts)} per row. They vary sampling, batches and the initial "
        "adapter, not the pretrained model, the text or the held-out part.",
        f"- Short runs: {rounds} rounds of {steps} steps. What is ahead early need not be ahead "
        "at the end of a long run.",
        "- Learning rates come from one tuning seed and one setting; no other option was tuned.",
        "- Losses only: no downstream task. Simulated devices: no lost clients, no network.",
        "- Memory is the prediction that plans are made with, not a measurement; "
        "`python -m benchmarks.memory` compares the two.",
        "",
    ]


def page(
    records: Sequence[Record],
    *,
    budget_layers: Mapping[str, Sequence[int]],
    floor_bytes: int,
    image_dir: str,
    others: Sequence[Sequence[Record]] = (),
) -> tuple[str, dict[str, str]]:
    """The page in Markdown, and its images: file name -> SVG.

    Args:
        records: of one domain, tuning included; at least one.
        budget_layers: setting -> layers that each device has memory for.
        floor_bytes: memory of a process before any model, included in `peak_bytes`.
        image_dir: of the images, as the page refers to it.
        others: the records of each other base model or text; at least one in each.

    Raises:
        ValueError: the records do not belong together, or there are none.
    """
    if not records:
        raise ValueError("no records yet: run python -m benchmarks.quality first")
    grid, other_grids = Grid.of(records), [Grid.of(those) for those in others]
    gaps, ablations = gap_series(grid), ablation_series(grid)
    images = {"gap-closure.svg": gap_chart(gaps), "ablations.svg": ablation_chart(ablations)}
    gap_text = spoken("Gap closure by method, per cent, mean and 95 % interval", gaps)
    ablation_text = spoken(
        "Loss minus the default's for each ablation, nats per token, mean and 95 % interval",
        ablations,
    )
    other_profiles = [name for name, method in ABLATIONS.items() if method.profile != "default"]
    floor = f"{floor_bytes / (1 << 20):.0f} MiB"
    lines = [
        "# Results",
        "",
        "Made by `python -m benchmarks.quality.report` from the records in `benchmarks/results`; "
        "the words follow from the numbers.",
        "",
        "How to read it: differences are paired, one per seed, row minus reference, in nats per "
        "token; below zero the row is better. Brackets hold the 95 % t-interval over seeds, "
        "`[–]` where one seed gives none. p is from the exact two-sided sign-flip test. Gap "
        "closure is (no tuning − method) / (no tuning − full) per seed; `full` has memory for "
        "everything on every device and is out of reach of the fleet. Rows are sorted by loss.",
        "",
        *section_summary(grid),
        *section_run(grid, budget_layers),
        "## 2. Methods, at equal memory",
        "",
        "Every method except `full` gets the same budgets, so these are the tables of equal "
        "memory.",
        "",
        f"![{gap_text}]({image_dir}/gap-closure.svg)",
        "",
        *(line for budgets in SETTINGS for line in section_main(grid, budgets)),
        "## 3. Submodels, as a device would use them",
        "",
        "Loss of the submodel of a size with the final adapter: `plain`, dropped layers skipped; "
        "`bridged`, with bridges fitted on public text, whatever the method trained with. The "
        "submodel is the last of that size that was planned; a method that never planned the size "
        "gets layers spread evenly over the depth, so its row is not comparable with those that "
        "did. ⚠ marks a bridged mean above the *full* model's loss without tuning; the untuned "
        "submodel was not measured.",
        "",
        *(line for budgets in SETTINGS for line in section_submodels(grid, budgets)),
        "## 4. Upload, compute and memory",
        "",
        "Means per run, over all clients and rounds. Upload is adapter bytes (1 MB = 10⁶ bytes). "
        "Layer-tokens are layers times tokens trained on devices; the forward of a sweep counts a "
        "third of a layer's training. Not counted: the coordinator's work, devices' measuring of "
        "layer statistics, downloads. Gap closure per unit is an average over the whole run and "
        "not what one more MB would bring; no run was stopped at equal upload or compute. "
        "`× default` is the ratio to the default's on the seeds both have.",
        "",
        *(line for budgets in SETTINGS for line in section_costs(grid, budgets)),
        f"Memory: the largest peak of any task that the plans predict, less the {floor} that every "
        "process is taken to need before any model. `layers per task` counts two components as a "
        "layer; `trained` is how many layers were trained by anyone in a run.",
        "",
        *(line for budgets in SETTINGS for line in section_memory(grid, budgets, floor_bytes)),
        "## 5. Ablations",
        "",
        "One option of the default changed at a time, at the default's learning rate: part of a "
        f"difference may be the rate's. More than one differs in: {names(other_profiles)}.",
        "",
        f"`helps` and `hurts` say what the change does; they need p < {LEVEL:g} and an interval "
        "without zero. `unclear` is one without the other, `no difference seen` neither: the "
        "difference may still be as large as the interval's ends. p is not corrected here: of the "
        f"{len(ABLATIONS)} rows, {len(ABLATIONS) * LEVEL:.1f} would fall below {LEVEL:g} by chance "
        "alone if no change did anything. These are leads.",
        "",
        f"![{ablation_text}]({image_dir}/ablations.svg)",
        "",
        *section_variants(grid, ABLATIONS, "default"),
        "## 6. Bridges without correction",
        "",
        "Each against `bridge`, at its learning rate; read as section 5.",
        "",
        *section_variants(grid, BRIDGES, "bridge"),
        *section_others(other_grids),
        *limits(grid, other_grids),
    ]
    return "\n".join(lines).rstrip("\n") + "\n", images


def records_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    # Slow to import, and only the command needs it.
    from benchmarks.quality.grid import BUDGETS
    from fedpruner_simulate.fleet import FLOOR_BYTES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--domain", default="headers", help="what the page is about; the others get a section"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    arguments = parser.parse_args()
    results = ROOT / "benchmarks" / "results"
    path = results / f"quality-{arguments.domain}.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run python -m benchmarks.quality first")
    others = [other for other in sorted(results.glob("quality-*.jsonl")) if other != path]
    output: Path = arguments.output
    image_dir = output.with_suffix("")
    text, images = page(
        records_of(path),
        budget_layers=BUDGETS,
        floor_bytes=FLOOR_BYTES,
        image_dir=image_dir.name,
        others=[found for other in others if (found := records_of(other))],
    )
    image_dir.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    for name, svg in images.items():
        (image_dir / name).write_text(svg)


if __name__ == "__main__":
    main()
