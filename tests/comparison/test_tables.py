"""What is printed and written of a comparison: complete, narrow enough, and with no name read as markup."""

import csv
import io
import json
import math
import re

import pytest
from summaries import accuracies, arm, run

from lark.comparison.comparison import Comparison, compare
from lark.comparison.tables import LEGEND, WIDTH, number, print_runs, stop_rates, texts

SEEDS = (0, 1, 2)


def sweep(*, sets=("eval",), baselines=("random", "rsr"), budgets=(2,), seeds=SEEDS, problems=40, **more):
    """The selector ahead by a quarter on every problem."""
    return [
        run(
            selector=arm(
                "lark",
                f"a{budget}{seed}",
                {name: accuracies([0.5] * problems)["eval"] for name in sets},
                cost={"forward_tokens": 12345678, "backward_tokens": 0, "seconds": 76.5},
                held_out_loss=1.5,
            ),
            baseline=arm(rule, f"{rule}{budget}{seed}", {name: accuracies([0.25] * problems)["eval"] for name in sets}),
            seed=seed,
            settings={"budget": budget, "sft.lr": 1e-4},
            **more,
        )
        for seed in seeds
        for budget in budgets
        for rule in baselines
    ]


def printed(capsys: pytest.CaptureFixture[str], comparison: Comparison) -> str:
    print_runs(comparison)
    return capsys.readouterr().out


def row(text: str, label: str) -> list[str]:
    """The cells of all rows of this label: a wide table is printed in parts."""
    parts = re.findall(rf"^ ?{re.escape(label)} +([+-]?\d.*)$", text, re.MULTILINE)
    return [cell for part in parts for cell in part.split()]


def test_every_figure_is_there(capsys) -> None:
    out = printed(capsys, compare(sweep()))
    assert row(out, "before training") == ["3", "2.000", "2.500", "0.0%", "10.0%"]
    sizes = ["3", "123,456", "98,765,432", "100,346"]
    assert row(out, "lark") == [*sizes, "1.500", "2.500", "12,345,678", "76.5", "50.0%", "60.0%"]
    assert row(out, "rsr") == [*sizes, "2.000", "2.500", "0", "0.0", "25.0%", "35.0%"]
    assert row(out, "lark - rsr") == [
        *("3", "-0.500", "+0.000"),
        *("+25.0", "[+25.0,", "+25.0]", "<.001", "<.001", "40", "0.0"),
    ]
    assert "selector - baseline" in out
    assert " ".join(LEGEND.split()) in " ".join(out.split())
    assert "lower is better" in LEGEND
    assert "seed variance" not in out
    assert "backward" not in out


def test_columns_that_are_not_always_there(capsys) -> None:
    runs = sweep()
    for one in runs:
        one["arms"]["selector"] |= {"cost": {"forward_tokens": 5, "backward_tokens": 7, "seconds": 1.0}}
    out = printed(capsys, compare(runs))
    assert "backward" in out
    assert row(out, "lark")[-5:-2] == ["5", "7", "1.0"]
    assert row(out, "rsr")[-5:-2] == ["0", "0", "0.0"]


@pytest.mark.parametrize("sets", [("eval",), ("eval", "shifted"), ("aime24", "aime25", "amc23", "math500", "gpqa")])
@pytest.mark.parametrize("budgets", [(2,), (1, 2)])
def test_tables_fit_a_log_file(sets, budgets, capsys) -> None:
    runs = sweep(sets=sets, budgets=budgets, baselines=("teacher_matched_random", "all"))
    out = printed(capsys, compare(runs))
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "…" not in out
    for name in sets:
        assert out.count("[+25.0, +25.0]") == 2 * len(budgets) * len(sets)
        assert f"{name}" in out
    assert "(unmatched)" in out


def test_a_label_longer_than_the_page_is_folded_not_cut(capsys) -> None:
    name = "a_rule_of_the_user_s_own_with_a_name_that_goes_on_and_on_and_on_" * 2
    out = printed(capsys, compare(sweep(baselines=(name,), seeds=(0,))))
    assert max(map(len, out.splitlines())) <= WIDTH
    firsts = [line[1:41].strip() for line in out.splitlines()]
    assert name in "".join(firsts)


def test_the_grid_and_its_marks(capsys) -> None:
    runs = [*sweep(task="sums"), *sweep(task="words", baselines=("rsr",))]
    behind = run(
        selector=arm("lark", "x", accuracies([0.0, 0.5, 0.25])),
        baseline=arm("rsr", "y", accuracies([0.25, 0.25, 0.25])),
        task="tie",
    )
    out = printed(capsys, compare([*runs, behind]))
    grid = out[out.index("the interval excludes 0") :]
    assert row(grid, "lark - random") == ["+25.0", "(of", "1)", "1/0/0", "+25.0*"]
    assert row(grid, "lark - rsr") == ["+16.7", "2/1/0", "+25.0*", "+25.0*", "+0.0"]
    assert "tie · tiny, eval: seed variance not estimated; too few problems" in " ".join(out.split())


def test_notes(capsys) -> None:
    runs = sweep(seeds=(0,))
    runs[1]["arms"]["baseline"]["per_problem"]["eval"]["7"] = None
    runs[1]["arms"]["selector"]["metrics"]["eval"]["stop"] = 0.25
    for one in runs:
        one["arms"]["selector"] = runs[1]["arms"]["selector"]  # the same arm has the same figures
    out = " ".join(printed(capsys, compare(runs)).split())
    assert "eval, lark - random: seed variance not estimated" in out
    note = "eval, lark - rsr: seed variance not estimated; left out, as not both have it: 1 problem"
    assert note in out
    assert "eval: for 1 of 4 students only 25% of the samples end by themselves" in out
    again = " ".join(printed(capsys, compare([*runs, *sweep(seeds=(0,), problems=30)])).split())
    assert "runs of the same settings have different students" in again


def test_two_names_of_one_choice_are_told(capsys) -> None:
    same = arm("longest", "a", accuracies([0.5] * 40))
    out = printed(capsys, compare([run(selector=arm("lark", "a", accuracies([0.5] * 40)), baseline=same)]))
    assert row(out, "lark - longest")[3:6] == ["+0.0", "[+0.0,", "+0.0]"]
    assert "eval: seed variance not estimated; no problem was answered differently" in out


def test_names_are_no_markup(capsys) -> None:
    runs = sweep(baselines=("[bold]x[/bold]", ":smile:"), sets=("[red]a_b",), task="[i]t", model="m[/]")
    out = printed(capsys, compare(runs))
    for name in ("[bold]x[/bold]", ":smile:", "[red]a_b", "[i]t · m[/]"):
        assert name in out


def test_what_rounds_to_0_has_no_minus(capsys) -> None:
    """A hair less accurate, and its loss a hair below; of the interval's ends, too."""
    values = [0.5] * 40
    for hair, loss in ((1e-6, 2.0), (-1e-6, 1.9999)):
        behind = arm("lark", "a", accuracies([value + hair for value in values]), held_out_loss=loss)
        comparison = compare([run(selector=behind, baseline=arm("rsr", "b", accuracies(values)), task=t) for t in "uv"])
        out = printed(capsys, comparison)
        assert row(out, "lark - rsr")[1:6] == ["+0.000", "+0.000", "+0.0", "[+0.0,", "+0.0]"]
        assert "-0.0" not in out + texts(comparison)["comparison.tex"]
    assert [number(x, "{:.1f}") for x in (-0.04, -0.0, 0.04, -0.06, math.nan, None)] == [
        "0.0",
        "0.0",
        "0.0",
        "-0.1",
        "",
        "",
    ]
    assert [number(x, "{:+.1f}") for x in (-0.04, 0.04, -0.06)] == ["+0.0", "+0.0", "-0.1"]


# ---- files


def test_csv_parses_back_to_the_figures() -> None:
    runs = sweep(sets=("eval", "a,b"), baselines=('the "best", mine',))
    comparison = compare(runs)
    contents = texts(comparison)
    arms = {one["arm"]: one for one in csv.DictReader(io.StringIO(contents["arms.csv"]))}
    assert set(arms) == {"before training", "lark", 'the "best", mine'}
    lark = {key: float(arms["lark"][key]) for key in ("seeds", "trajectories", "a,b avg@4 (%)", "seconds", "lr")}
    assert lark == pytest.approx({"seeds": 3, "trajectories": 123456, "a,b avg@4 (%)": 50, "seconds": 76.5, "lr": 1e-4})
    differences = list(csv.DictReader(io.StringIO(contents["differences.csv"])))
    assert [one["set"] for one in differences] == ["eval", "a,b"]
    assert all(one["selector"] == "lark" and one["baseline"] == 'the "best", mine' for one in differences)
    (group,) = comparison.groups
    found = group.differences[0].sets["eval"]
    for key, value in {
        "difference (points)": 25,
        "low (points)": 25,
        "high (points)": 25,
        "p (Holm)": found.p_holm,
        "problems": 40,
        "held-out loss (nats/token)": -0.5,
    }.items():
        assert float(differences[0][key]) == pytest.approx(value), key


def test_pairs_without_an_evaluation_set_are_in_the_csv_too() -> None:
    without = run(selector=arm("lark", "a", {}), baseline=arm("rsr", "b", {}))
    (only,) = csv.DictReader(io.StringIO(texts(compare([without]))["differences.csv"]))
    assert (only["selector"], only["baseline"], float(only["held-out loss (nats/token)"])) == ("lark", "rsr", 0)


def test_json_is_strict_and_complete() -> None:
    one_problem = run(selector=arm("lark", "a", accuracies([1.0])), baseline=arm("rsr", "b", accuracies([0.0])))
    failed = {"status": "failed", "error": 'a "quoted" error', "folder": "x"}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(texts(compare([one_problem, failed]))["comparison.json"], parse_constant=refuse)
    (difference,) = content["groups"][0]["differences"]
    interval = difference["sets"]["eval"]["interval"]
    assert (interval["estimate"], interval["low"], interval["problems"]) == (1.0, None, 1)
    assert [one["label"] for one in content["groups"][0]["arms"]] == ["before training", "rsr", "lark"]
    assert content["failed"] == [["x", 'a "quoted" error']]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]


def test_latex_is_booktabs_with_every_character_escaped() -> None:
    runs = sweep(baselines=(r"50%_$a & b#{c}\d~e^f <g>|h",), task="a\nb", seeds=(0,))
    text = texts(compare(runs))["comparison.tex"]
    tabulars = re.findall(r"\\begin\{tabular\}\{(l+r+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tabulars) == 2
    for columns, body in tabulars:
        lines = body.splitlines()
        assert (lines[0], lines[2], lines[-1]) == (r"\toprule", r"\midrule", r"\bottomrule")
        for line in (lines[1], *lines[3:-1]):
            assert line.endswith(r" \\")
            assert len(cells(line)) == len(columns)
    header, first = tabulars[1][1].splitlines()[1], tabulars[1][1].splitlines()[3]
    assert cells(header)[:4] == ["selector - baseline", "seeds", "held-out loss", "mean over training"]
    assert cells(header)[4:] == ["eval avg@4", "p", "Holm", "problems", "detectable"]
    escaped = (
        r"lark - 50\%\_\$a \& b\#\{c\}\textbackslash d\textasciitilde e\textasciicircum f "
        r"\textless{}g\textgreater{}\textbar{}h"
    )
    assert " ".join(cells(first)[0].split()) == escaped
    assert cells(first)[4] == "+25.0 [+25.0, +25.0]"
    assert cells(first)[5] == r"\textless{}.001"
    assert all(name in tabulars[1][1] for name in ("problems", "detectable")) and "trajectories" in tabulars[0][1]
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert comments == ["% a b · tiny: student", "% a b · tiny: selector - baseline"]


@pytest.mark.parametrize("name", ["[1em] rule", "* rule", " [x]"])
def test_latex_takes_no_label_for_an_argument_of_the_line_above(name: str) -> None:
    selector = arm(name, "a", accuracies([0.5] * 40))
    text = texts(compare([run(selector=selector, baseline=arm("rsr", "b", accuracies([0.5] * 40)))]))["comparison.tex"]
    of_rule = [line for line in text.splitlines() if name in line]
    assert len(of_rule) == 2
    assert all(line.startswith("{}" + name) for line in of_rule)


def test_a_set_s_hyphen_is_no_division_of_its_name() -> None:
    text = texts(compare(sweep(sets=("pre-",))))["comparison.tex"]
    assert "pre- avg@4" in text


def test_stop_rates_are_said_where_a_student_does_not_always_stop() -> None:
    assert stop_rates({"before": 1.0, "selector": 1.0}, before=1.0) == ""
    near = stop_rates({"before": 0.97, "baseline": 1.0, "selector": 0.9}, before=0.97)
    assert near == "stopped by themselves: before 97.0%, baseline 100.0%, selector 90.0%"
    fallen = stop_rates({"before": 0.97, "baseline": 0.98, "selector": 0.71}, before=0.97)
    assert "Training has made selector stop less often: raise task.max_new_tokens" in fallen
    assert "model.end_token" in fallen
    many = stop_rates({str(i): i / 10 for i in range(11)}, before=0.95)
    assert many.startswith("stopped by themselves: 0 0.0%, 1 10.0%") and "5 50.0%; the other 5 students" in many
    assert "Training has made 9 of 11 stop less often" in many


def test_stop_rates_of_runs(capsys) -> None:
    runs = sweep(baselines=("random",), seeds=(0,))
    runs[0]["arms"]["selector"]["metrics"]["eval"]["stop"] = 0.6
    comparison = compare(runs)
    out = " ".join(printed(capsys, comparison).split())
    assert "eval: stopped by themselves: before 90.0%, " in out
    assert "lark 60.0%" in out and "random 90.0%" in out and "Training has made lark stop less often" in out
    arms = {arm["arm"]: arm for arm in csv.DictReader(io.StringIO(texts(comparison)["arms.csv"]))}
    assert {name: float(arm["eval stop (%)"]) for name, arm in arms.items()} == pytest.approx(
        {"before training": 90.0, "lark": 60.0, "random": 90.0}
    )
