"""python -m lark.report and the end of a sweep: what goes to stdout, to stderr and to files, and the exit code."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from summaries import accuracies, arm, run

from lark import report
from lark.common.cache import write_json

FILES = {"arms.csv", "differences.csv", "comparison.tex", "comparison.json"}
FAILED = {"status": "failed", "error": "budget=0 is not a number"}
STOPPED = {"status": "finished", "stopped_after": "selection"}


def summary(*, baseline="random", problems=20, seed=0, **more):
    """What a run writes, with the selector 10 points ahead."""

    def of(rule: str, accuracy: float):
        return arm(rule, f"{rule}{seed}", accuracies([accuracy] * problems), held_out_loss=2.5 - accuracy)

    before, first, second = of("before", 0.25), of(baseline, 0.5), of("lark_length", 0.6)
    return run(selector=second, baseline=first, before=before, seed=seed, **more)


def write_run(folder: Path, content: dict) -> Path:
    write_json(folder / "summary.json", content)
    return folder


def write_jobs(folder: Path) -> Path:
    """Two rules, three seeds, of which one run failed and one was stopped."""
    jobs = [summary(baseline=rule, seed=seed) for rule in ("random", "longest") for seed in (0, 1, 2)]
    for job, content in enumerate([*jobs, FAILED, STOPPED]):
        write_run(folder / str(job), content)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line; stdout, stderr and exit code."""

    def called(*words: object) -> tuple[str, str, int]:
        monkeypatch.setattr("sys.argv", ["lark.report", *map(str, words)])
        code = 0
        try:
            report.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print(stop.code, file=sys.stderr)
        return (*capsys.readouterr(), code)

    return called


@pytest.fixture
def end_sweep(capsys):
    """Do what Hydra does last at the end of a multirun; stdout, stderr and exit code."""

    def ended(folder: Path) -> tuple[str, str, int]:
        code = 0
        config = SimpleNamespace(
            hydra=SimpleNamespace(sweep=SimpleNamespace(dir=folder)), paths=SimpleNamespace(logs=folder)
        )
        try:
            report.ComparisonCallback().on_multirun_end(config)
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        return (*capsys.readouterr(), code)

    return ended


# ---- the command line


def test_one_run_is_its_own_table(tmp_path, call):
    out, err, code = call(write_run(tmp_path / "a", summary(problems=1)))
    assert "selector: lark_length" in out and "not told apart" in out and "nan" not in out
    assert (err, code) == ("", 0)


def test_several_runs_are_one_comparison(tmp_path, call):
    out, err, code = call(write_jobs(tmp_path))
    assert "selector: lark_length" not in out  # no run's own table
    assert out.count("before training") == 1
    for rule in ("random", "longest"):
        (line,) = (line for line in out.splitlines() if line.strip().startswith(f"lark_length - {rule} "))
        assert line.split()[3:7] == ["3", "-0.100", "+0.000", "+10.0"]
    assert f"{tmp_path / '7'}: stopped after selection" in out
    assert err == f"failed: {tmp_path / '6'}: {FAILED['error']}\n"
    assert code == 0
    assert not FILES & {path.name for path in tmp_path.rglob("*")}


def test_folders_of_several_sweeps_are_pooled(tmp_path, call):
    folders = [write_run(tmp_path / f"sweep{seed}" / "0", summary(seed=seed)).parent for seed in (0, 1, 2)]
    out, _, _ = call(*folders)
    (line,) = (line for line in out.splitlines() if line.strip().startswith("lark_length - random "))
    assert line.split()[3] == "3"


def test_the_best_of_several_rates(tmp_path, call):
    for job, lr in enumerate((1e-4, 1e-5)):
        content = summary(settings={"sft.lr": lr})
        for name in ("baseline", "selector"):
            content["arms"][name] |= {"lr": lr, "hash": f"{name}{lr}", "held_out_loss": lr}
        write_run(tmp_path / str(job), content)
    out, _, code = call(tmp_path, "--best-lr")
    assert code == 0 and "selector: lark_length" in out  # the two are one run
    assert "sft.lr=1e-05 has the lowest held-out loss of 1e-05, 0.0001" in " ".join(out.split())


@pytest.mark.parametrize("form", ["csv", "latex", "json"])
def test_a_format_is_all_that_stdout_gets(form, tmp_path, call):
    out, err, code = call(write_jobs(tmp_path / "jobs"), "--format", form)
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


def test_output_gets_every_format(tmp_path, call):
    folder = tmp_path / "new" / "folder"
    write_jobs(tmp_path / "jobs")
    out, _, code = call(tmp_path / "jobs", "--output", folder)
    assert code == 0 and "lark_length - random" in out
    assert {path.name for path in folder.iterdir()} == FILES
    for form, names in report.FORMATS.items():
        out, err, _ = call(tmp_path / "jobs", "--format", form, "--output", folder)
        assert out == "\n".join((folder / name).read_text() for name in names)
        assert f"comparison  {folder}: " in err


def test_the_page_is_written_beside_any_format(tmp_path, call):
    path = tmp_path / "new" / "page.html"
    out, err, _ = call(write_jobs(tmp_path / "jobs"), "--format", "json", "--page", path)
    assert json.loads(out)["runs"] == 6
    assert err.endswith(f"page        {path}\n")
    assert path.is_file() and (path.parent / "plotly.min.js").is_file()


def test_what_a_user_can_mend_is_a_sentence(tmp_path, call):
    out, err, code = call(tmp_path / "nothing")
    assert (out, code, err.count("\n")) == ("", 1, 1) and str(tmp_path / "nothing") in err
    failed = write_run(tmp_path / "a", FAILED)
    out, err, code = call(failed, "--format", "csv")
    assert (out, code) == ("", 1) and "failed: " in err and f"lark: no run in or below {failed}" in err
    (tmp_path / "file").touch()
    _, err, code = call(write_run(tmp_path / "b", summary()), "--output", tmp_path / "file" / "x")
    assert code == 1 and f"lark: --output={tmp_path / 'file' / 'x'}" in err


# ---- the end of a sweep


def test_the_end_of_a_sweep_prints_and_writes_the_comparison_only(tmp_path, call, end_sweep):
    printed, _, _ = call(write_jobs(tmp_path))
    out, err, code = end_sweep(tmp_path)
    assert code == 1  # a job failed
    assert err == f"failed: {tmp_path / '6'}: {FAILED['error']}\n"
    *table, files, page = out.splitlines()
    assert "\n".join(table) in printed
    assert files.startswith(f"comparison  {tmp_path}: ") and all(name in files for name in FILES)
    assert page == f"page        {tmp_path / 'report.html'}"
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == FILES | {"report.html", "plotly.min.js"}
    (tmp_path / "6" / "summary.json").unlink()
    assert end_sweep(tmp_path)[1:] == ("", 0)


def test_of_many_failed_runs_the_last_few_are_named_and_the_others_counted(tmp_path, end_sweep):
    for job in range(14):
        write_run(tmp_path / f"{job:02}", {"status": "failed", "error": f"no {job}"})
    write_run(tmp_path / "99", summary())
    _, err, code = end_sweep(tmp_path)
    assert code == 1 and err.count("failed: ") == 11
    assert "no 13" in err and "no 3\n" not in err and "failed: 4 further runs" in err


@pytest.mark.parametrize("others", [[], [FAILED], [STOPPED]])
def test_there_is_nothing_to_compare_in_a_sweep_of_one_finished_run(others, tmp_path, end_sweep):
    for job, content in enumerate([summary(), *others]):
        write_run(tmp_path / str(job), content)
    out, err, code = end_sweep(tmp_path)
    assert out == ""
    assert err.count("failed: ") == code == others.count(FAILED)
    assert not FILES & {path.name for path in tmp_path.iterdir()}


def test_the_callback_costs_a_run_no_heavy_import() -> None:
    code = "import sys, lark.report; print(sorted({'numpy', 'scipy', 'pandas', 'rich', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
