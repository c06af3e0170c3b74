"""The table from summary.json: complete, within 100 columns, and sane where figures are missing."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from lark import report
from lark.cache import write_json
from lark.inference import paired_difference, smallest_detectable_difference
from lark.report import WIDTH, print_comparison, read_summaries


def summary(*, sets=("eval",), baseline="random", problems=20, **more):
    """What a run writes, with the selector 10 points ahead on every set."""
    accuracy = {"before": 0.25, "baseline": 0.5, "selector": 0.6}
    arms = {
        name: {
            "rule": {"before": "before", "baseline": baseline, "selector": "lark_length"}[name],
            "matched": baseline != "all" or name != "baseline",
            "trajectories": 123456,
            "tokens": 98765432,
            "effective_sample_size": 100345.6,
            "held_out_loss": 2.5 - value,
            "metrics": {of_set: {"avg@4": value, "pass@4": value + 0.1, "stop": 0.9, "boxed": 0.9} for of_set in sets},
        }
        for name, value in accuracy.items()
    }
    interval = paired_difference(np.full((1, problems), 0.6), np.full((1, problems), 0.5))
    difference = vars(interval) | {"smallest_detectable": smallest_detectable_difference(interval.standard_error)}
    return {
        "status": "finished",
        "task": "arithmetic",
        "model": "tiny",
        "seed": 0,
        "difference_of": ["selector", "baseline"],
        "arms": arms,
        "sets": {name: {"metrics": ["avg@4", "pass@4"], "difference": difference} for name in sets},
        **more,
    }


def written(tmp_path: Path, name: str, content: dict) -> Path:
    write_json(tmp_path / name / "summary.json", content)
    return tmp_path / name


def main(monkeypatch, capsys, *folders: Path) -> tuple[str, str, int]:
    monkeypatch.setattr("sys.argv", ["lark.report", *map(str, folders)])
    try:
        report.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        print(stop.code, file=sys.stderr)
    return (*capsys.readouterr(), code)


def test_every_figure_is_in_the_table(capsys):
    print_comparison(summary())
    out = capsys.readouterr().out
    labels = ("before training", "baseline: random", "selector: lark_length", "selector - baseline")
    rows = {label: line.split() for line in out.splitlines() for label in labels if line.strip().startswith(label)}
    assert rows["before training"][-3:] == ["2.250", "25.0%", "35.0%"]
    assert rows["baseline: random"][-6:] == ["123,456", "98,765,432", "100,346", "2.000", "50.0%", "60.0%"]
    assert rows["selector: lark_length"][-6:] == ["123,456", "98,765,432", "100,346", "1.900", "60.0%", "70.0%"]
    assert rows["selector - baseline"][-2:] == ["-0.100", "+10.0"]
    assert "[+10.0, +10.0]" in out
    assert "eval: 95% interval excludes 0 (20 problems; smallest detectable difference 0.0" in out


@pytest.mark.parametrize("sets", [("eval",), ("eval", "shifted"), ("aime24", "aime25", "amc23", "math500", "gpqa")])
def test_tables_fit_a_log_file(sets, capsys):
    print_comparison(summary(sets=sets, baseline="all"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "interval" not in line]
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert "…" not in text
    for name in sets:
        assert name in text
    assert "(unmatched)" in " ".join(text.split())
    assert text.count("[+10.0, +10.0]") == len(sets)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.2, "excludes 0"),
        (-0.2, -0.01, "excludes 0"),
        (-0.1, 0.2, "not told apart"),
        (0.0, 0.2, "not told apart"),
        (0.0, 0.0, "no problem was answered differently"),
        (-0.1, 0.2, "too few problems"),
    ],
)
def test_reading(low, high, words, capsys):
    content = summary()
    content["sets"]["eval"]["difference"] |= {"low": low, "high": high}
    print_comparison(content)
    assert words in capsys.readouterr().out


def test_one_problem_has_no_interval_in_memory_and_on_disk(tmp_path, monkeypatch, capsys):
    content = summary(problems=1)
    assert math.isnan(content["sets"]["eval"]["difference"]["low"])
    print_comparison(content)
    in_memory = capsys.readouterr().out
    assert "no interval (1 problems; one problem, no interval)" in in_memory
    assert "nan" not in in_memory
    assert main(monkeypatch, capsys, written(tmp_path, "a", content)) == (in_memory, "", 0)


def test_without_evaluation_or_held_out_loss_the_selections_are_still_compared(capsys):
    content = summary(sets=())
    for arm in content["arms"].values():
        arm["held_out_loss"] = None
    print_comparison(content)
    out = capsys.readouterr().out
    assert "selector: lark_length" in out
    assert "nan" not in out


def test_jobs_come_in_their_order_with_all_differences_and_failures_last(tmp_path, monkeypatch, capsys):
    for job, rule in enumerate(["random", "longest", *["rsr"] * 9]):
        written(tmp_path, str(job), summary(baseline=rule, seed=job))
    written(tmp_path, "11", {"status": "failed", "error": "budget=0 is no number"})
    written(tmp_path, "12", {"status": "finished", "stopped_after": "selection"})
    assert [Path(s["folder"]).name for s in read_summaries([tmp_path])] == [str(n) for n in range(13)]
    out, err, code = main(monkeypatch, capsys, tmp_path)
    assert out.count("before training") == 11
    (line,) = (line for line in out.splitlines() if line.strip().startswith("lark_length - longest"))
    assert line.split()[3:] == ["arithmetic", "tiny", "1", "+10.0", "[+10.0,", "+10.0]"]
    assert f"{tmp_path / '12'}: stopped after selection" in out
    assert err == f"failed: {tmp_path / '11'}: budget=0 is no number\n"
    assert code == 0


def test_no_summary_is_a_sentence(tmp_path, monkeypatch, capsys):
    out, err, code = main(monkeypatch, capsys, tmp_path / "nothing")
    assert (out, code) == ("", 1)
    assert (
        err
        == f"lark: no summary.json in or below {tmp_path / 'nothing'}; name the folder of a finished run or multirun\n"
    )


def test_a_summary_is_plain_json(tmp_path):
    folder = written(tmp_path, "a", summary(problems=1))
    assert json.loads((folder / "summary.json").read_text())["sets"]["eval"]["difference"]["low"] is None


@pytest.mark.parametrize(("figure", "said"), [("stop", "end by themselves"), ("boxed", "box their answer"), (None, "")])
def test_bad_form_is_said_beside_a_low_accuracy(
    figure: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = summary()
    if figure:
        one["arms"]["selector"]["metrics"]["eval"][figure] = 0.1
    print_comparison(one)
    noted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval, ")]
    assert len(noted) == (figure is not None)
    assert all("eval, selector: only 10%" in line and said in line for line in noted)
