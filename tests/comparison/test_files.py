"""The comparison's files: CSV and JSON parse back to the figures, LaTeX escapes every character."""

import csv
import io
import json
import re

import pytest
from summaries import accuracies, arm, run, sweep

from lark.comparison.comparison import compare
from lark.comparison.files import render_files


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_parses_back_to_the_figures() -> None:
    comparison = compare(sweep(sets=("eval", "a,b"), baselines=('the "best", mine',)))
    files = render_files(comparison)
    arms = {one["arm"]: one for one in read_csv(files["arms.csv"])}
    assert set(arms) == {"before training", "lark", 'the "best", mine'}
    expected = {"seeds": 3, "trajectories": 123456, "a,b avg@4 (%)": 50, "seconds": 76.5, "lr": 1e-4}
    assert {key: float(arms["lark"][key]) for key in expected} == pytest.approx(expected)
    differences = read_csv(files["differences.csv"])
    assert [one["set"] for one in differences] == ["eval", "a,b"]
    assert all(one["selector"] == "lark" and one["baseline"] == 'the "best", mine' for one in differences)
    p_holm = comparison.groups[0].differences[0].sets["eval"].p_holm
    expected = {"difference (points)": 25, "low (points)": 13.987837, "p (Holm)": p_holm, "problems": 40}
    expected |= {"held-out loss (nats/token)": -0.5}
    assert {key: float(differences[0][key]) for key in expected} == pytest.approx(expected)


def test_pairs_without_an_evaluation_set_are_in_the_csv_too() -> None:
    without = run(selector=arm("lark", "a", {}), baseline=arm("rsr", "b", {}))
    (only,) = read_csv(render_files(compare([without]))["differences.csv"])
    assert (only["selector"], only["baseline"], float(only["held-out loss (nats/token)"])) == ("lark", "rsr", 0)


def test_json_is_strict_and_complete() -> None:
    one_problem = run(selector=arm("lark", "a", accuracies([1.0])), baseline=arm("rsr", "b", accuracies([0.0])))
    failed = {"status": "failed", "error": 'a "quoted" error', "folder": "x"}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(render_files(compare([one_problem, failed]))["comparison.json"], parse_constant=refuse)
    interval = content["groups"][0]["differences"][0]["sets"]["eval"]["interval"]
    assert (interval["estimate"], interval["low"], interval["problems"]) == (1.0, None, 1)
    assert [one["label"] for one in content["groups"][0]["arms"]] == ["before training", "rsr", "lark"]
    assert content["failed"] == [["x", 'a "quoted" error']]


def split_row(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]


def test_latex_is_booktabs_with_every_character_escaped() -> None:
    runs = sweep(baselines=(r"50%_$a & b#{c}\d~e^f <g>|h",), sets=("pre-",), task="a\nb", seeds=(0,))
    text = render_files(compare(runs))["comparison.tex"]
    tabulars = re.findall(r"\\begin\{tabular\}\{(l+r+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tabulars) == 2
    for columns, body in tabulars:
        lines = body.splitlines()
        assert (lines[0], lines[2], lines[-1]) == (r"\toprule", r"\midrule", r"\bottomrule")
        assert all(line.endswith(r" \\") and len(split_row(line)) == len(columns) for line in (lines[1], *lines[3:-1]))
    header, first = tabulars[1][1].splitlines()[1], tabulars[1][1].splitlines()[3]
    assert split_row(header)[4:] == ["pre- avg@4", "p", "Holm", "problems", "detectable"]
    escaped = (
        r"lark - 50\%\_\$a \& b\#\{c\}\textbackslash d\textasciitilde e\textasciicircum f "
        r"\textless{}g\textgreater{}\textbar{}h"
    )
    assert " ".join(split_row(first)[0].split()) == escaped
    assert split_row(first)[4:6] == ["+25.0 [+14.0, +31.6]", r"\textless{}.001"]
    comments = [line for line in text.splitlines() if line.startswith("%")]
    assert comments == ["% a b · tiny: student", "% a b · tiny: selector - baseline"]


@pytest.mark.parametrize("name", ["[1em] rule", "* rule", " [x]"])
def test_latex_takes_no_label_for_an_argument_of_the_line_above(name: str) -> None:
    runs = [run(selector=arm(name, "a", accuracies([0.5] * 40)), baseline=arm("rsr", "b", accuracies([0.5] * 40)))]
    of_rule = [line for line in render_files(compare(runs))["comparison.tex"].splitlines() if name in line]
    assert len(of_rule) == 2
    assert all(line.startswith("{}" + name) for line in of_rule)
