"""Tables of text and their notes: every figure where it belongs, none with a sign that rounding took away."""

import math

import pytest
from summaries import accuracies, arm, run, sweep

from lark.comparison.comparison import compare
from lark.comparison.tables import (
    LEGEND,
    build_run_table,
    build_tables,
    describe_stop_rates,
    format_number,
    list_notes,
)


def row_of(table, label: str) -> list[str]:
    number = table.labels.index(label)
    return [cells[number] for _, cells, _ in table.list_columns()]


def notes_of(runs) -> list[str]:
    (group,) = compare(runs).groups
    return list(list_notes(group))


def test_every_figure_is_there() -> None:
    arms, differences = build_tables(compare(sweep()))
    assert row_of(arms, "before training") == ["0.0%", "10.0%", "2.000", "2.500", "", "", "", "", "", "3"]
    sizes = ["123,456", "98,765,432", "100,346"]
    assert row_of(arms, "lark") == ["50.0%", "60.0%", "1.500", "2.500", *sizes, "12,345,678", "76.5", "3"]
    assert row_of(arms, "rsr") == ["25.0%", "35.0%", "2.000", "2.500", *sizes, "0", "0.0", "3"]
    shown = [header for header, _, is_shown in arms.list_columns() if is_shown]
    assert shown == ["eval avg@4", "held-out loss", "trajectories", "trained tokens", "seconds"]
    figures = ["3", "-0.500", "+0.000", "+25.0 [+14.0, +31.6]", "<.001", "<.001", "40", ""]
    assert row_of(differences, "lark - rsr") == figures
    assert differences.header == "selector - baseline" and "lower is better" in LEGEND


def test_backward_tokens_have_a_column_where_a_rule_has_any() -> None:
    runs = sweep()
    for one in runs:
        one["arms"]["selector"] |= {"cost": {"forward_tokens": 5, "backward_tokens": 7, "seconds": 1.0}}
    arms, _ = build_tables(compare(runs))
    assert row_of(arms, "lark")[7:10] == ["5", "7", "1.0"] and row_of(arms, "rsr")[7:10] == ["0", "0", "0.0"]


def test_unmatched_arms_are_marked() -> None:
    arms, _ = build_tables(compare(sweep(baselines=("all",))))
    assert "all (unmatched)" in arms.labels


def test_the_table_of_one_run() -> None:
    selector, baseline = (
        arm("lark", "a", accuracies([0.6] * 20), held_out_loss=1.9),
        arm("random", "b", accuracies([0.5] * 20)),
    )
    before = arm("before", "c", accuracies([0.25] * 20), held_out_loss=2.25)
    (group,) = compare([run(selector=selector, baseline=baseline, before=before)]).groups
    table = build_run_table(group, seed=4)
    assert table.title == "arithmetic · tiny · seed 4"
    sizes = ["123,456", "98,765,432", "100,346"]
    assert row_of(table, "before training") == ["", "", "", "2.250", "25.0%", "35.0%"]
    assert row_of(table, "baseline: random") == [*sizes, "2.000", "50.0%", "60.0%"]
    assert row_of(table, "selector: lark") == [*sizes, "1.900", "60.0%", "70.0%"]
    assert row_of(table, "selector - baseline") == ["", "", "", "-0.100", "+10.0\n[-8.5, +25.2]", ""]


def test_the_table_of_one_run_without_a_baseline_or_an_evaluation() -> None:
    (group,) = compare([run(selector=arm("lark", "a", {}, held_out_loss=None))]).groups
    table = build_run_table(group, seed=0)
    assert table.labels == ["before training", "selector: lark", "selector - before"]
    assert row_of(table, "selector: lark")[-1] == row_of(table, "selector - before")[-1] == ""


def test_the_grid_and_its_marks() -> None:
    runs = [*sweep(task="sums"), *sweep(task="words", baselines=("rsr",))]
    tie = run(
        selector=arm("lark", "x", accuracies([0.0, 0.5, 0.25])),
        baseline=arm("rsr", "y", accuracies([0.25, 0.25, 0.25])),
        task="tie",
    )
    *_, grid = build_tables(compare([*runs, tie]))
    assert row_of(grid, "lark - random") == ["+25.0 (of 1)", "1/0/0", "+25.0*", "", ""]
    assert row_of(grid, "lark - rsr") == ["+16.7", "2/1/0", "+25.0*", "+25.0*", "+0.0 "]


def test_notes_say_what_is_left_out_and_which_samples_are_in_bad_form() -> None:
    runs = sweep(seeds=(0,))
    runs[1]["arms"]["baseline"]["per_problem"]["eval"]["7"] = None
    runs[1]["arms"]["selector"]["metrics"]["eval"]["answered"] = 0.1
    for one in runs:
        one["arms"]["selector"] = runs[1]["arms"]["selector"]  # the same arm has the same figures
    text = " ".join(notes_of(runs))
    assert "eval, lark - rsr: left out, as not both have it: 1 problem" in text
    assert "eval: for 1 of 4 students only 10% of the samples have an answer" in text
    assert "different students" in " ".join(notes_of([*runs, *sweep(seeds=(0,), problems=30)]))


def test_two_names_of_one_choice_are_told() -> None:
    same = [arm(rule, "a", accuracies([0.5] * 40)) for rule in ("lark", "longest")]
    assert "eval: no problem was answered differently" in notes_of([run(selector=same[0], baseline=same[1])])


def test_few_problems_are_told() -> None:
    runs = [run(selector=arm("lark", "a", accuracies([0, 1, 1])), baseline=arm("rsr", "b", accuracies([1, 0, 0])))]
    assert "too few problems" in notes_of(runs)[0]


@pytest.mark.parametrize(
    ("value", "text"), [(-0.04, "+0.0"), (-0.0, "+0.0"), (0.04, "+0.0"), (-0.06, "-0.1"), (math.nan, ""), (None, "")]
)
def test_what_rounds_to_0_has_no_minus(value: float | None, text: str) -> None:
    assert format_number(value, "{:+.1f}") == text


def test_stop_rates_are_told_where_a_student_does_not_always_stop() -> None:
    assert describe_stop_rates({"before": 1.0, "lark": 1.0}, before=1.0) == ""
    near = describe_stop_rates({"before": 0.97, "rsr": 1.0, "lark": 0.9}, before=0.97)
    assert near == "stopped by themselves: before 97.0%, rsr 100.0%, lark 90.0%"
    fallen = describe_stop_rates({"before": 0.97, "rsr": 0.98, "lark": 0.71}, before=0.97)
    assert "made lark stop less often" in fallen and "model.end_token" in fallen
    many = describe_stop_rates({str(i): i / 10 for i in range(11)}, before=0.95)
    assert "5 50.0%; the other 5 students" in many and "made 9 of 11 stop less often" in many
