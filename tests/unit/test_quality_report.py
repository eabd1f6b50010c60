"""The page of results claims no more than its records allow."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
from benchmarks.quality.charts import ticks
from benchmarks.quality.comparison import (
    COMPARED,
    Comparison,
    Grid,
    compare_listed,
    gap_closures,
    word_for,
    word_for_default,
)
from benchmarks.quality.methods import MAIN
from benchmarks.quality.report import page
from benchmarks.quality.statistics import Interval
from benchmarks.quality.tuning import TUNING_SEED

LAYERS = {"sev": (3, 6), "mod": (4, 12)}
FLOOR = 400 << 20


def record(method, seed, loss, *, budgets="sev", rate=0.01, base=4.0, **others):
    """A made-up line of the results."""
    return {
        "method": method,
        "budgets": budgets,
        "seed": seed,
        "learning_rate": rate,
        "domain": "headers",
        "model": "small",
        "shape": {
            "num_layers": 12,
            "num_rounds": 8,
            "clients_per_round": 4,
            "max_steps": 8,
            "batch_size": 8,
            "seq_length": 64,
            "rank": 4,
        },
        "loss_base": base,
        "loss": loss,
        "submodel_losses": {"3": {"plain": 5.5, "bridged": 3.5, "planned": method != "full"}},
        "bytes_up": 2_000_000,
        "layer_tokens": 4_000_000.0,
        "tasks": 32,
        "left_out": 0,
        "peak_bytes": FLOOR + (3 << 20),
        "mean_components": 8.0,
        "coverage": [1] * 12,
        "seconds": 36.0,
        "commit": "abc1234",
        "machine": "x86_64",
        **others,
    }


def runs(losses, *, seeds=6, budgets="sev"):
    """Records of methods whose losses move together from seed to seed."""
    return [
        record(method, seed, loss + 0.01 * seed, budgets=budgets)
        for method, loss in losses.items()
        for seed in range(seeds)
    ]


def page_of(records, others=()):
    return page(
        records, budget_layers=LAYERS, floor_bytes=FLOOR, image_dir="results", others=others
    )


def text_of(records, *others):
    return page_of(records, others)[0]


def row_of(text, name, section="## 2."):
    """Cells of the first row of a section's tables that begins with a name."""
    part = text[text.index(section) :]
    line = next(line for line in part.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# What is compared


def test_what_is_claimed_was_listed_and_is_a_main_method():
    assert COMPARED == {
        "sev": ("paper", "fedra", "depth"),
        "mod": ("paper", "fedra", "depth", "exclusive"),
    }
    assert {name for names in COMPARED.values() for name in names} <= set(MAIN) - {"default"}


def test_gap_closure_is_taken_seed_by_seed():
    records = [
        record("full", 0, 2.0),
        record("full", 1, 3.0),
        record("default", 0, 3.0),  # 1 of 2
        record("default", 1, 3.25),  # 0.75 of 1
        record("default", 2, 3.0),  # no run of full
    ]
    grid = Grid.of(records)
    assert gap_closures(grid, "sev", "default") == pytest.approx({0: 50.0, 1: 75.0})
    row = row_of(text_of(records), "**default**")
    # Mean 62.5, half width t(1, 0.975) x 12.5 = 12.706 x 12.5 = 158.8.
    assert row[2] == "62.5 [−96.3, 221.3]"
    assert "gap closure of 2 seeds" in row[-1]


def test_a_seed_on_which_full_tuning_gains_nothing_has_no_gap_closure():
    grid = Grid.of([record("full", 0, 4.0), record("default", 0, 3.0)])
    assert gap_closures(grid, "sev", "default") == {}


def test_differences_are_paired_on_common_seeds():
    records = [record("default", s, 3.0 + s) for s in (0, 1, 2)]
    records += [record("fedra", s, 3.5 + s) for s in (1, 2, 3)]
    comparison = compare_listed(Grid.of(records), "sev")["fedra"]
    assert comparison.difference == Interval(0.5, 0.5, 0.5, 2)
    assert comparison.p == 0.5


def test_a_run_at_a_rate_that_was_not_chosen_is_not_used():
    tuning = [
        record("full", TUNING_SEED, loss, rate=rate)
        for rate, loss in ((3.2e-3, 3.0), (8e-3, 2.0), (2e-2, 3.0))
    ]
    grid = Grid.of([*tuning, record("full", 0, 2.0, rate=8e-3), record("full", 0, 1.0, rate=2e-2)])
    assert grid.values("sev", "full", "loss") == {0: 2.0}
    assert grid.num_unused == 1


def test_records_of_another_shape_are_refused():
    other = record("full", 0, 3.0)
    other["shape"] = {**other["shape"], "num_rounds": 20}
    with pytest.raises(ValueError, match="one model, domain and shape"):
        Grid.of([record("full", 0, 3.0), other])


# Words


@pytest.mark.parametrize(
    ("interval", "p", "word"),
    [
        (Interval(-0.1, -0.2, -0.05, 6), 0.03, "helps"),
        (Interval(0.1, 0.05, 0.2, 6), 0.03, "hurts"),
        (Interval(0.1, -0.05, 0.2, 6), 0.2, "no difference seen"),
        (Interval(0.1, 0.05, 0.2, 6), 0.0625, "unclear"),
        (Interval(0.1, -0.05, 0.2, 6), 0.03, "unclear"),
        (Interval(0.1, 0.09, 0.11, 5), 0.0625, "too few seeds to say (n = 5)"),
    ],
)
def test_a_word_needs_both_the_test_and_the_interval(interval, p, word):
    assert word_for(Comparison(interval, p)) == word


def test_the_default_is_called_better_only_after_correction():
    interval = Interval(0.1, 0.05, 0.2, 10)
    assert word_for_default(Comparison(interval, 0.002, 0.03)) == "default better"
    assert word_for_default(Comparison(interval, 0.002, 0.06)) == "not established"
    behind = Interval(-0.1, -0.2, -0.05, 10)
    assert word_for_default(Comparison(behind, 0.002, 0.03)) == "default worse"
    assert word_for_default(Comparison(interval, 0.002, None)) == "not listed"


def test_six_seeds_cannot_establish_anything_of_three_listed_and_the_page_says_so():
    text = text_of(runs({"full": 2.0, "default": 3.0, "fedra": 3.9}))
    fedra = row_of(text, "`fedra`")
    assert fedra[4:8] == ["0.0312", "0.0938", "6", "not established"]
    assert "default better than none; default worse than none" in text
    assert "nothing here could be significant" in text


def test_enough_seeds_establish_what_is_there_in_both_directions():
    # Twelve seeds: p = 2 / 4096, far below 0.05 after any number of comparisons up to 50.
    losses = {"full": 2.0, "default": 3.0, "fedra": 3.5, "paper": 2.9, "bi": 2.8}
    text = text_of(runs(losses, seeds=12))
    assert "default better than `fedra`; default worse than `paper`" in text
    # `bi` was not listed: nothing is established about it, however clear.
    assert row_of(text, "`bi`")[5:8] == ["–", "12", "not listed"]
    assert "aside: `bi`, `paper`." in text
    assert row_of(text, "`fedra`")[7] == "better"
    assert "nothing here could be significant" not in text


def test_rows_are_sorted_by_loss_with_no_tuning_among_them():
    text = text_of(runs({"fedra": 4.5, "default": 3.0, "full": 2.0, "bi": 2.9}))
    part = text[text.index("## 2.") : text.index("### `mod`")]
    rows = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")]
    assert rows == ["method", "*full*", "`bi`", "**default**", "*no tuning*", "`fedra`"]


def test_a_method_worse_than_no_tuning_is_marked():
    text = text_of(runs({"full": 2.0, "default": 3.0, "fedra": 4.5}))
    assert "⚠ worse than no tuning" in row_of(text, "`fedra`")[-1]
    assert "⚠" not in row_of(text, "**default**")[-1]
    assert "mean loss above that of no tuning: `fedra`." in text


def test_a_diverged_run_is_shown_and_not_averaged_away():
    records = runs({"full": 2.0, "default": 3.0, "fedra": 3.5})
    records[-1]["loss"] = math.nan
    fedra = row_of(text_of(records), "`fedra`")
    assert fedra[1] == "diverged"
    assert fedra[7] == "not established"
    assert "⚠" in fedra[-1]


def test_missing_methods_and_seeds_are_named_with_their_n():
    records = [*runs({"full": 2.0, "default": 3.0}), record("fedra", 0, 3.5)]
    text = text_of(records)
    fedra = row_of(text, "`fedra`")
    assert fedra[3] == "+0.5000 [–]"
    assert fedra[6] == "1"
    assert "other seeds than the default" in fedra[-1]
    assert "Not run yet (n = 0): `paper`, `depth`;" in text


def test_a_page_without_any_result_says_so():
    text = text_of([record("full", TUNING_SEED, 3.0, rate=8e-3)])
    assert "0 results and 1 for tuning" in text
    assert "the default was not run; nothing is compared" in text


def test_no_records_at_all_are_an_error():
    with pytest.raises(ValueError, match="no records yet"):
        text_of([])


def test_an_ablation_is_compared_with_the_default_on_the_same_seeds():
    records = runs({"full": 2.0, "default": 3.0, "coverage = off": 3.2})
    row = row_of(text_of(records), "coverage = off", section="## 5.")
    assert row[2:6] == ["+0.2000 [+0.2000, +0.2000]", "0.0312", "6", "hurts"]


def test_a_bridge_is_compared_with_the_bridge_and_not_with_the_default():
    records = runs({"default": 3.0, "bridge": 3.3, "bridge = full": 3.2})
    row = row_of(text_of(records), "bridge = full", section="## 6.")
    assert row[2] == "−0.1000 [−0.1000, −0.1000]"
    assert row[5] == "helps"


def test_costs_are_in_their_units_and_relative_to_the_default():
    records = runs({"full": 2.0, "default": 3.0, "fedra": 3.5})
    for each in records:
        each["loss"] = round(each["loss"] - 0.01 * each["seed"], 6)
        if each["method"] == "fedra":
            each["bytes_up"] = 1_000_000
    text = text_of(records)
    # 25 % of the gap for 1 MB and 4 M layer-tokens; the default 50 % for 2 MB and 4 M.
    fedra = row_of(text, "`fedra`", section="## 4.")
    assert fedra[2:8] == ["1.00", "25.0", "1.00", "4.000", "6.2", "0.50"]
    assert row_of(text, "`fedra`", section="Memory: ")[2] == "3.0"


def test_a_size_that_was_never_planned_is_marked():
    text = text_of(runs({"full": 2.0, "default": 3.0}))
    assert row_of(text, "`full`", section="## 3.")[5] == "**never planned this size**"
    assert row_of(text, "`default`", section="## 3.")[5] == "planned in 6 of 6"


def test_a_rate_at_the_edge_of_what_was_tried_is_marked():
    rates = ((3.2e-3, 3.0), (8e-3, 2.9), (2e-2, 2.8), (5e-2, 2.7), (0.125, 2.6))
    inside = ((3.2e-3, 3.0), (8e-3, 2.8), (2e-2, 2.9))
    records = [record("last", TUNING_SEED, loss, rate=rate) for rate, loss in rates]
    records += [record("bi", TUNING_SEED, loss, rate=rate) for rate, loss in inside]
    text = text_of(records)
    assert row_of(text, "`last`", section="## 1.")[1::2] == ["0.125", "⚠ at the edge"]
    assert row_of(text, "`bi`", section="## 1.")[1::2] == ["0.008", ""]


def test_runs_that_did_not_see_the_same_evaluation_are_reported():
    records = [record("default", 0, 3.0), record("fedra", 0, 3.0, base=4.1)]
    assert "The loss without tuning differs between methods in `sev`, seed 0" in text_of(records)


def test_the_images_are_xml_with_a_title_a_description_and_nothing_outside():
    records = runs({"full": 2.0, "default": 3.0, "fedra": 4.5, "coverage = off": 3.2})
    # Two seeds far apart: an interval that leaves the axis.
    records += [record("bi", 0, 2.5), record("bi", 1, 3.9)]
    images = page_of(records)[1]
    assert set(images) == {"gap-closure.svg", "ablations.svg"}
    for svg in images.values():
        root = ElementTree.fromstring(svg)
        kinds = {element.tag.split("}")[1] for element in root}
        assert {"title", "desc", "circle"} <= kinds
        for line in root.iter("{http://www.w3.org/2000/svg}line"):
            assert 0 <= float(line.get("x1")) <= float(line.get("x2")) <= float(root.get("width"))
    assert "polygon" in images["gap-closure.svg"]


@pytest.mark.parametrize("span", [(-0.03, 0.06), (-60.0, 104.0), (0.0, 1.0), (-1.0, 9.0)])
def test_an_axis_has_a_few_round_numbers(span):
    found = ticks(*span)
    assert 4 <= len(found) <= 11
    assert all(span[0] <= tick <= span[1] for tick in found)


# Another base model


def elsewhere(records):
    """The same records of another base model and text."""
    shape = {**records[0]["shape"], "num_layers": 5}
    return [{**r, "model": "tiny", "domain": "turns", "shape": shape} for r in records]


def test_another_base_model_has_a_table_of_what_was_run_with_it():
    losses = {"full": 2.0, "default": 3.0, "bi": 3.5, "coverage = off": 3.2}
    others = [*runs(losses, seeds=3), record("fedra", 1, 4.25), record("fedra", 2, 4.5)]
    # The default's losses are 3.01 and 3.02 with seeds 1 and 2.
    text = text_of(runs({"full": 2.0, "default": 3.0}), elsewhere(others))
    part = text[text.index("## 7.") : text.index("## 8.")]
    assert "### `tiny`, `turns`" in part
    assert "5 layers, 8 rounds of 8 steps. Runs: 14 results and 0 for tuning." in part
    rows = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")]
    assert rows == [
        "method", "*full*", "**default**", "`coverage = off`", "`bi`", "*no tuning*", "`fedra`",
    ]  # fmt: skip
    # Mean of 1.24 and 1.48; half width t(1, 0.975) x 0.12 = 12.706 x 0.12 = 1.525.
    fedra = row_of(part, "`fedra`", section="### ")
    assert fedra[3:6] == ["+1.3600 [−0.1647, +2.8847]", "0.5", "2"]
    assert fedra[6].startswith("⚠ worse than no tuning; other seeds than the default")
    # Differences of half a nat on three seeds: two of eight patterns.
    assert row_of(part, "`bi`", section="### ")[3:6] == ["+0.5000 [+0.5000, +0.5000]", "0.25", "3"]
    assert row_of(part, "**default**", section="### ")[3:6] == ["–", "–", "3"]
    assert row_of(part, "*no tuning*", section="### ")[5:] == ["3", "reference"]
    assert "#### `mod`" not in part


def test_one_seed_of_another_base_model_gets_no_p():
    others = [record("default", 0, 3.0), record("paper", 0, 3.5)]
    text = text_of(runs({"default": 3.0}), elsewhere(others))
    paper = row_of(text, "`paper`", section="## 7.")
    assert paper[2:6] == ["–", "+0.5000 [–]", "–", "1"]


def test_another_base_model_has_its_own_tuned_rates():
    tuned = [
        record("default", TUNING_SEED, loss, rate=rate)
        for rate, loss in ((3.2e-3, 2.9), (8e-3, 2.8), (2e-2, 3.0))
    ]
    at_edge = [
        record("fedra", TUNING_SEED, 3.0 - rate, rate=rate)
        for rate in (3.2e-3, 8e-3, 2e-2, 5e-2, 0.125)
    ]
    unused = [record("default", 0, 2.0, rate=2e-2), record("default", 0, 3.0, rate=8e-3)]
    text = text_of(runs({"default": 3.0}), elsewhere([*tuned, *at_edge, *unused]))
    assert "- Learning rates: `fedra` 0.125 ⚠, `default` 0.008." in text
    assert row_of(text, "**default**", section="## 7.")[1] == "3.000"


def test_several_base_models_have_a_section_each_and_are_never_mixed():
    first = elsewhere([record("default", 0, 3.0)])
    second = [{**record("default", 0, 2.5), "model": "huge"}]
    text = text_of(runs({"default": 3.0}), first, second)
    assert text.index("### `tiny`, `turns`") < text.index("### `huge`, `headers`")
    with pytest.raises(ValueError, match="one model, domain and shape"):
        text_of(runs({"default": 3.0}), [*first, *second])


def test_without_another_base_model_the_page_says_nothing_of_one():
    text = text_of(runs({"default": 3.0}))
    assert "Other base models" not in text
    assert "## 7. What the numbers do not say" in text
