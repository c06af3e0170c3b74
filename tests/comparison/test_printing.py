"""Printed tables: narrow enough for a log file, nothing cut, no name read as markup."""

import pytest
from summaries import accuracies, arm, run, sweep

from lark.comparison.comparison import compare
from lark.comparison.printing import WIDTH, print_run, print_runs

SETS = [("eval",), ("eval", "shifted"), ("aime24", "aime25", "amc23", "math500", "gpqa")]


def one_run(*, sets=("eval",), baseline="random", **more):
    of_sets = [{name: accuracies([value] * 40)["eval"] for name in sets} for value in (0.5, 0.25)]
    return run(selector=arm("lark", "a", of_sets[0]), baseline=arm(baseline, "b", of_sets[1]), **more)


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("budgets", [(2,), (1, 2)])
def test_a_comparison_fits_a_log_file(sets, budgets, capsys) -> None:
    print_runs(compare(sweep(sets=sets, budgets=budgets, baselines=("teacher_matched_random", "all"))))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH and "…" not in out
    assert out.count("[+14.0, +31.6]") == 2 * len(budgets) * len(sets)
    assert "(unmatched)" in out and "run seed=" not in out


@pytest.mark.parametrize("sets", SETS)
def test_the_table_of_a_run_fits_a_log_file(sets, capsys) -> None:
    print_run(one_run(sets=sets, baseline="all"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH and "…" not in out
    assert out.count("[+14.0, +31.6]") == len(sets)
    assert "(unmatched)" in " ".join(out.split()) and "lark is better than all (+25.0)" in out


def test_a_label_longer_than_the_page_is_folded_not_cut(capsys) -> None:
    name = "a_rule_of_the_user_s_own_with_a_name_that_goes_on_and_on_and_on_" * 2
    print_runs(compare(sweep(baselines=(name,), seeds=(0,))))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert name in "".join(line[1:41].strip() for line in lines)


def test_names_are_no_markup(capsys) -> None:
    names = ("[bold]x[/bold]", ":smile:")
    print_runs(compare(sweep(baselines=names, sets=("[red]a_b",), task="[i]t", model="m[/]")))
    print_run(one_run(sets=("[red]a_b",), baseline="[b]rule[/b]"))
    out = capsys.readouterr().out
    for name in (*names, "[red]a_b", "[i]t · m[/]", "baseline: [b]rule[/b]"):
        assert name in out
