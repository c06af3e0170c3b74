"""The table of one run; the comparison of several, at a sweep's end and from disk; the command line."""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from summaries import accuracies, arm, run

from lark import report
from lark.common.cache import write_json
from lark.comparison.tables import WIDTH
from lark.report import ComparisonCallback, print_comparison, read_summaries

FILES = {"arms.csv", "differences.csv", "comparison.tex", "comparison.json"}


def summary(*, sets=("eval",), baseline="random", problems=20, seed=0, **more):
    """What a run writes, with the selector 10 points ahead on every set."""

    def of(rule: str, accuracy: float):
        values = {name: accuracies([accuracy] * problems)["eval"] for name in sets}
        return arm(rule, f"{rule}{seed}", values, held_out_loss=2.5 - accuracy)

    before, first, second = of("before", 0.25), of(baseline, 0.5), of("lark_length", 0.6)
    return run(selector=second, baseline=first, before=before, seed=seed, **more)


FAILED = {"status": "failed", "error": "budget=0 is no number"}
STOPPED = {"status": "finished", "stopped_after": "selection"}


def written(tmp_path: Path, name: str, content: dict) -> Path:
    write_json(tmp_path / name / "summary.json", content)
    return tmp_path / name


def sweep(tmp_path: Path) -> Path:
    """Two rules, three seeds, of which one run failed and one was stopped."""
    jobs = [summary(baseline=rule, seed=seed) for rule in ("random", "longest") for seed in (0, 1, 2)]
    for job, content in enumerate([*jobs, FAILED, STOPPED]):
        written(tmp_path, str(job), content)
    return tmp_path


def main(monkeypatch, capsys, *words: object) -> tuple[str, str, int]:
    monkeypatch.setattr("sys.argv", ["lark.report", *map(str, words)])
    try:
        report.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        print(stop.code, file=sys.stderr)
    return (*capsys.readouterr(), code)


def at_the_end_of(folder: Path, capsys) -> tuple[str, str, int]:
    """What Hydra's last call at the end of a multirun does."""
    code = 0
    try:
        ComparisonCallback().on_multirun_end(SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=folder))))
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        code = stop.code
    return (*capsys.readouterr(), code)


# ---- one run


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
    for one in content["arms"].values():
        one["held_out_loss"] = None
    print_comparison(content)
    out = capsys.readouterr().out
    assert "selector: lark_length" in out
    assert "nan" not in out


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


def test_names_are_no_markup(capsys) -> None:
    print_comparison(summary(baseline="[b]rule[/b]", sets=("[i]set",), task="[red]task"))
    out = capsys.readouterr().out
    for name in ("baseline: [b]rule[/b]", "[i]set\n", "[red]task", "[i]set: 95% interval"):
        assert name.rstrip("\n") in out


def test_a_summary_is_plain_json(tmp_path):
    folder = written(tmp_path, "a", summary(problems=1))
    assert json.loads((folder / "summary.json").read_text())["sets"]["eval"]["difference"]["low"] is None


# ---- several runs


def test_jobs_come_in_their_order(tmp_path) -> None:
    for job in range(12):
        written(tmp_path, str(job), FAILED)
    assert [Path(one["folder"]).name for one in read_summaries([tmp_path])] == [str(job) for job in range(12)]


def test_a_run_named_in_several_ways_is_read_once(tmp_path, monkeypatch) -> None:
    folder = written(tmp_path / "runs", "a", summary())
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    ways = [folder, Path("runs"), Path("runs/../runs/a"), Path("link")]
    assert len(read_summaries(ways)) == 1
    assert [one["folder"] for one in read_summaries([Path("runs")])] == [str(Path("runs/a"))]


def test_several_runs_are_one_comparison(tmp_path, monkeypatch, capsys):
    out, err, code = main(monkeypatch, capsys, sweep(tmp_path))
    assert "selector: lark_length" not in out  # no run's own table
    assert out.count("before training") == 1
    for rule in ("random", "longest"):
        (line,) = (line for line in out.splitlines() if line.strip().startswith(f"lark_length - {rule} "))
        assert line.split()[3:7] == ["3", "-0.100", "+0.000", "+10.0"]
    assert f"{tmp_path / '7'}: stopped after selection" in out
    assert err == f"failed: {tmp_path / '6'}: budget=0 is no number\n"
    assert code == 0
    assert not FILES & {path.name for path in tmp_path.rglob("*")}


def test_folders_of_several_sweeps_are_pooled(tmp_path, monkeypatch, capsys):
    for seed in (0, 1, 2):
        written(tmp_path / f"sweep{seed}", "0", summary(seed=seed))
    folders = sorted(tmp_path.iterdir())
    out, _, _ = main(monkeypatch, capsys, *folders)
    (line,) = (line for line in out.splitlines() if line.strip().startswith("lark_length - random "))
    assert line.split()[3] == "3"


def test_of_many_failed_runs_the_last_few_are_named_and_the_others_counted(tmp_path, capsys):
    for job in range(14):
        written(tmp_path, f"{job:02}", {"status": "failed", "error": f"no {job}"})
    written(tmp_path, "99", summary())
    _, err, code = at_the_end_of(tmp_path, capsys)
    assert code == 1 and err.count("failed: ") == 11
    assert "no 13" in err and "no 3\n" not in err and "failed: 4 further runs, which --page and --output name" in err


def test_the_end_of_a_sweep_prints_and_writes_the_comparison_only(tmp_path, monkeypatch, capsys):
    printed, _, _ = main(monkeypatch, capsys, sweep(tmp_path))
    out, err, code = at_the_end_of(tmp_path, capsys)
    assert code == 1  # a job failed
    assert err == f"failed: {tmp_path / '6'}: budget=0 is no number\n"
    *table, files, page = out.splitlines()
    assert "\n".join(table) in printed
    assert files.startswith(f"comparison  {tmp_path}: ")
    assert all(name in files for name in FILES)
    assert page == f"page        {tmp_path / 'report.html'}"
    written_now = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written_now == FILES | {"report.html", "plotly.min.js"}
    assert json.loads((tmp_path / "comparison.json").read_text())["failed"][0][1] == "budget=0 is no number"
    (tmp_path / "6" / "summary.json").unlink()
    assert at_the_end_of(tmp_path, capsys)[1:] == ("", 0)


@pytest.mark.parametrize("others", [[], [FAILED], [STOPPED]])
def test_there_is_nothing_to_compare_in_a_sweep_of_one_finished_run(others, tmp_path, capsys):
    for job, content in enumerate([summary(), *others]):
        written(tmp_path, str(job), content)
    out, err, code = at_the_end_of(tmp_path, capsys)
    assert out == ""
    assert err.count("failed: ") == code == others.count(FAILED)
    assert not FILES & {path.name for path in tmp_path.iterdir()}


# ---- the command line


@pytest.mark.parametrize("form", ["csv", "latex", "json"])
def test_a_format_is_all_that_stdout_gets(form, tmp_path, monkeypatch, capsys):
    out, err, code = main(monkeypatch, capsys, sweep(tmp_path / "jobs"), "--format", form)
    assert code == 0
    assert "failed: " in err and "stopped after" in err
    if form == "json":
        assert json.loads(out)["runs"] == 6
    elif form == "latex":
        assert out.count(r"\begin{tabular}") == out.count(r"\bottomrule") == 2
    else:
        arms, differences = (list(csv.DictReader(io.StringIO(part))) for part in out.split("\n\n"))
        assert [one["arm"] for one in arms] == ["before training", "random", "lark_length", "longest"]
        assert [float(one["difference (points)"]) for one in differences] == pytest.approx([10, 10])


def test_output_gets_every_format(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "folder"
    sweep(tmp_path / "jobs")
    out, _, code = main(monkeypatch, capsys, tmp_path / "jobs", "--output", folder)
    assert code == 0 and "lark_length - random" in out
    assert {path.name for path in folder.iterdir()} == FILES
    for form, names in report.FORMATS.items():
        out, err, _ = main(monkeypatch, capsys, tmp_path / "jobs", "--format", form, "--output", folder)
        assert out == "\n".join((folder / name).read_text() for name in names)
        assert f"comparison  {folder}: " in err


def test_a_single_run_can_be_written_too(tmp_path, monkeypatch, capsys):
    out, _, code = main(monkeypatch, capsys, written(tmp_path, "a", summary()), "--output", tmp_path / "out")
    assert code == 0 and "selector: lark_length" in out
    assert (tmp_path / "out" / "arms.csv").read_text().count("\n") == 4


def test_no_summary_is_a_sentence(tmp_path, monkeypatch, capsys):
    out, err, code = main(monkeypatch, capsys, tmp_path / "nothing")
    assert (out, code) == ("", 1)
    assert (
        err
        == f"lark: no summary.json in or below {tmp_path / 'nothing'}; name the folder of a finished run or multirun\n"
    )


NAMES_IN_A_RUN = {"before", "baseline", "selector", "eval", "avg@4", "pass@4"}


def places(content: dict, name: str = "") -> list[str]:
    """The dotted names of all that any summary has: its arms, sets and metrics are a run's own."""
    found = []
    for key, value in content.items():
        if key not in NAMES_IN_A_RUN:
            found.append(f"{name}{key}")
        if isinstance(value, dict) and key not in ("settings", "per_problem"):
            found += places(value, f"{name}{key}.")
    return found


@pytest.mark.parametrize("runs", [1, 2])
def test_a_summary_of_another_version_is_a_sentence_or_does_without(runs, tmp_path, monkeypatch, capsys) -> None:
    """Whatever it lacks."""
    refused = set()
    for place in places(summary()):
        contents = [summary(seed=seed) for seed in range(runs)]
        *parts, key = place.split(".")
        part = contents[0]
        for name in parts:
            part = part[name]
        del part[key]
        folders = [written(tmp_path, str(seed), content) for seed, content in enumerate(contents)]
        _, err, code = main(monkeypatch, capsys, *folders)
        if code:
            refused.add(place)
            assert err == (
                f"lark: {folders[0] / 'summary.json'} has no {place}, as another version of lark wrote it; "
                "run it again, or leave its folder out\n"
            )
    assert {"settings", "arms.before.cost", "arms.selector.curve", "sets.eval.difference.low"} <= refused
    assert "arms.selector.held_out_loss_correct" not in refused


def test_nothing_to_write_and_nowhere_to_write_are_sentences(tmp_path, monkeypatch, capsys):
    failed = written(tmp_path, "a", FAILED)
    out, err, code = main(monkeypatch, capsys, failed, "--format", "csv")
    assert (out, code) == ("", 1)
    assert "failed: " in err and f"lark: no run in or below {failed} came to its end" in err
    (tmp_path / "file").touch()
    done = main(monkeypatch, capsys, written(tmp_path, "b", summary()), "--output", tmp_path / "file" / "x")
    assert done[2] == 1 and f"lark: --output={tmp_path / 'file' / 'x'} cannot be written" in done[1]


def test_the_callback_costs_a_run_no_heavy_import() -> None:
    code = "import sys, lark.report; print(sorted({'numpy', 'scipy', 'pandas', 'rich', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
