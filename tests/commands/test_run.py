"""One command from the pool to the comparison, in small: what it leaves, reuses, replays, and how it fails."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from lark_command import SMALL, Done, lark

from lark.evaluation.verdicts import read_answers

ROLES = ("baseline", "selector")
ROWS = ("before training", "baseline: random", "selector: lark", "selector - baseline")
RULES = """
import numpy as np

def constant(candidates):
    return np.zeros(len(candidates))

def first_two_unknown(candidates):
    return np.where(candidates["candidate_id"].astype(int) < 2, np.nan, candidates["loss"])

def unknown(candidates):
    return np.full(len(candidates), np.nan)

def defective(candidates):
    return 1 / 0
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the module: whatever the runs share is computed once."""
    return tmp_path_factory.mktemp("logs")


def small(logs: Path, name: str, *words: object) -> Done:
    return lark(*SMALL, f"paths.logs={logs}", f"hydra.run.dir={logs / 'runs' / name}", *words)


@pytest.fixture(scope="module")
def first(logs: Path) -> Done:
    done = small(logs, "first", "logger=offline")
    assert done.code == 0, done.err
    return done


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own."""
    (tmp_path / "my_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_rules", None)
    return "my_rules"


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def figures(folder: Path) -> dict:
    """What of a summary must not depend on caches."""
    content = summary(folder)
    del content["cost"]
    for arm in content["arms"].values():
        del arm["action"]
    return content


def actions(folder: Path) -> dict[str, str]:
    return {name: arm["action"] for name, arm in summary(folder)["arms"].items()}


# ---- one run


def test_it_prints_a_line_a_stage_and_the_table(first: Done) -> None:
    for word in ("LARK ", "pool ", "example ", "scoring ", "selected ", "training ", *ROWS, "report "):
        assert f"\n{word}" in f"\n{first.out}".replace("\n ", "\n"), word
    assert len(first.out.splitlines()) < 50
    noise = [line for line in first.err.splitlines() if not line.startswith("! ")]
    assert not noise  # no progress lines, no library chatter: this run is over in seconds
    assert "statistics: scoring" in first.log and "recipe: " in first.log


def test_run_folder(first: Done) -> None:
    folder = first.folder
    names = {path.name for path in folder.iterdir()}
    assert names >= {"replay.yaml", "plan.json", "statistics.parquet", "summary.json", "before", "baseline", "selector"}
    plan = json.loads((folder / "plan.json").read_text())
    assert [value for key, value in plan.items() if key.startswith("statistics")] == ["run"]
    assert {name: arm["action"] for name, arm in plan["arms"].items()} == actions(folder)
    assert actions(folder) == {"before": "evaluate", "baseline": "train", "selector": "train"}
    for name, arm in plan["arms"].items():
        assert (folder / name / "samples" / "eval").resolve().parent == folder.parents[1] / "samples"
        if name != "before":
            assert (folder / name / "trained.json").resolve().parent == folder.parents[1] / "arms" / arm["hash"]


def test_arm_folders(first: Done) -> None:
    for name in ("baseline", "selector"):
        arm = first.folder / name
        expected = {"selection.jsonl", "selection.json", "metrics.json", "loss.csv", "checkpoint", "trained.json"}
        assert {path.name for path in arm.iterdir()} >= expected | {"samples"}
        assert not list(arm.glob("*partial*"))
        assert (arm / "checkpoint" / "model.safetensors").is_file()
        with (arm / "loss.csv").open() as file:
            assert [float(row["step"]) for row in csv.DictReader(file)] == [0, 1, 2, 3]
        assert json.loads((arm / "trained.json").read_text())["identity"]["steps"] == 3
        figures = json.loads((arm / "metrics.json").read_text())
        for of_set in ("eval", "shifted"):
            answers = read_answers(arm / "samples" / of_set, figures["answers"][of_set]["verdicts"])
            assert len(answers) == 6 * 2
            assert figures["metrics"][of_set]["avg@2"] == pytest.approx(np.mean([one["correct"] for one in answers]))


def test_selections_match(first: Done) -> None:
    """The baseline takes of each problem as many rows as the selector, with equal weights."""
    taken = {}
    for name in ("baseline", "selector"):
        rows = [json.loads(line) for line in (first.folder / name / "selection.jsonl").read_text().splitlines()]
        record = json.loads((first.folder / name / "selection.json").read_text())
        weights = np.array([row["weight"] for row in rows])
        assert weights.mean() == pytest.approx(1)
        assert record["counts"]["chosen"] == len(rows) == summary(first.folder)["arms"][name]["trajectories"]
        assert record["effective_sample_size"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
        taken[name] = sorted(row["meta"]["problem_id"] for row in rows)
        if name == "baseline":
            assert set(weights) == {1.0}
    assert taken["baseline"] == taken["selector"]


def test_statistics(first: Done) -> None:
    table = pq.read_table(first.folder / "statistics.parquet")
    assert {"problem_id", "candidate_id", "teacher", "num_tokens", "loss", "brier", "entropy"} <= set(
        table.column_names
    )
    assert {"sum_surprisal", "sum_brier", "sum_entropy", "lark", "random"} <= set(table.column_names)
    columns = {name: np.array(table[name].to_pylist()) for name in ("loss", "brier", "num_tokens", "lark")}
    for mean in (("loss", "sum_surprisal"), ("brier", "sum_brier")):
        total = np.array(table[mean[1]].to_pylist())
        np.testing.assert_allclose(columns[mean[0]], total / columns["num_tokens"], rtol=1e-6)
    problem = np.array(table["problem_id"].to_pylist())
    may_be_chosen = np.isfinite(columns["lark"])  # not known to be wrong
    for one in set(problem[may_be_chosen]):  # sum_k g_k = rho_bar
        of_problem = (problem == one) & may_be_chosen
        loss, brier, gain = (columns[name][of_problem] for name in ("loss", "brier", "lark"))
        assert gain.sum() == pytest.approx(brier.sum() / loss.sum())


def test_summary(first: Done) -> None:
    content = summary(first.folder)
    assert content["status"] == "finished"
    for of_set, spec in content["sets"].items():
        a, b = (content["arms"][name]["per_problem"][of_set] for name in content["difference_of"])
        assert len(a) == 6
        assert spec["difference"]["estimate"] == pytest.approx(np.mean([a[key] - b[key] for key in a]))
        for arm in content["arms"].values():
            assert arm["metrics"][of_set]["avg@2"] == pytest.approx(np.mean(list(arm["per_problem"][of_set].values())))
    start = {arm["curve"][0]["held_out/loss"] for arm in content["arms"].values()}
    assert len(start) == 1  # the same student, the same rows


# ---- again


def test_the_second_run_computes_nothing(first: Done, logs: Path) -> None:
    trained = {path: path.stat().st_mtime_ns for path in (logs / "arms").rglob("*.safetensors")}
    done = small(logs, "second", "logger=offline")
    assert done.code == 0
    assert "found in the cache" in done.out
    assert set(actions(done.folder).values()) == {"reuse"}
    assert "reuse" in [
        value for key, value in json.loads((done.folder / "plan.json").read_text()).items() if "statistics" in key
    ]
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert figures(done.folder) == figures(first.folder)


def test_replay(first: Done) -> None:
    done = lark("--config-path", first.folder, "--config-name", "replay")
    assert done.code == 0, done.err
    assert done.folder.name.startswith("first-replay-")
    assert figures(done.folder) == figures(first.folder)
    changed = lark(
        "--config-path", first.folder, "--config-name", "replay", "budget=1", "seed=1", "stop_after=selection"
    )
    assert changed.code == 0, changed.err
    for name in ("selector", "baseline"):  # what hangs on a setting follows it
        chosen = (changed.folder / name / "selection.jsonl").read_text().splitlines()
        assert len(chosen) == summary(first.folder)["arms"][name]["trajectories"] / 2
    assert figures(done.folder) == figures(first.folder), "its folder is its own"
    again = lark("--config-path", os.path.relpath(first.folder), "--config-name", "replay")
    assert again.code == 0, again.err
    assert figures(again.folder) == figures(first.folder)
    refused = lark("--config-path", first.folder, "--config-name", "replay", "selector=longest")
    assert_sentence(refused, "a replay keeps its groups", "selector.<name>=...", "longest")


@pytest.mark.slow
def test_report_prints_the_same_table(first: Done) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lark.report", first.folder], capture_output=True, text=True, check=True
    )
    table = done.stdout.strip()
    assert table
    assert table in first.out


def test_the_seed_matters(first: Done, logs: Path) -> None:
    done = small(logs, "seed", "seed=1", "stop_after=selection")
    assert done.code == 0
    one, other = (path / "baseline" / "selection.jsonl" for path in (first.folder, done.folder))
    assert one.read_text() != other.read_text()


@pytest.mark.parametrize(
    ("stop", "there", "not_there"),
    [
        ("statistics", ["statistics.parquet"], ["selector", "baseline"]),
        ("selection", ["selector/selection.jsonl", "baseline/selection.json"], ["selector/checkpoint", "before"]),
        ("training", ["selector/checkpoint", "baseline/loss.csv"], ["samples", "before"]),
    ],
)
def test_stop_after(stop: str, there: list[str], not_there: list[str], first: Done, logs: Path) -> None:
    # another learning rate: arms of the first run would be evaluated already
    done = small(logs, f"stop-{stop}", f"stop_after={stop}", "sft.lr=2e-4")
    assert done.code == 0, done.err
    assert summary(done.folder) == {"status": "finished", "stopped_after": stop}
    assert all((done.folder / name).exists() for name in there)
    assert not any((done.folder / name).exists() for name in not_there)


def test_no_baseline(first: Done, logs: Path) -> None:
    done = small(logs, "alone", "baseline=none")
    content = summary(done.folder)
    assert actions(done.folder) == {"before": "reuse", "selector": "reuse"}
    assert content["difference_of"] == ["selector", "before"]
    assert "selector - before" in done.out
    a, b = (np.mean(list(content["arms"][name]["per_problem"]["eval"].values())) for name in ("selector", "before"))
    assert content["sets"]["eval"]["difference"]["estimate"] == pytest.approx(a - b)


@pytest.mark.slow
def test_two_rules_that_choose_alike_are_one_arm(first: Done, logs: Path) -> None:
    words = ["selector=longest", "baseline=longest", "sft.lr=1.5e-4"]
    done = small(logs, "twins", *words)
    assert done.code == 0, done.err
    assert "! selector and baseline chose the same rows" in done.err
    assert actions(done.folder) == {"before": "reuse", "baseline": "reuse", "selector": "train"}
    again = small(logs, "twins-more", *words, "evaluation.samples=3")  # the arm is there, its evaluation is another
    assert again.code == 0, again.err
    arms = summary(again.folder)["arms"]
    assert arms["selector"]["metrics"] == arms["baseline"]["metrics"] and "avg@3" in arms["selector"]["metrics"]["eval"]


@pytest.mark.slow
def test_a_baseline_with_as_many_tokens(first: Done, logs: Path) -> None:
    words = ["baseline=longest", "stop_after=selection"]
    tokens = {}
    for match in ("trajectories", "tokens"):
        done = small(logs, f"match-{match}", *words, f"match={match}")
        records = {name: json.loads((done.folder / name / "selection.json").read_text()) for name in ROLES}
        tokens[match] = {name: record["tokens"] for name, record in records.items()}
        assert records["baseline"]["policy"]["match"] == match
    assert tokens["trajectories"]["baseline"] > 1.1 * tokens["tokens"]["selector"]
    assert tokens["tokens"]["baseline"] == pytest.approx(tokens["tokens"]["selector"], abs=60)  # half a trajectory
    difference = tokens["tokens"]["baseline"] - tokens["tokens"]["selector"]
    assert records["baseline"]["policy"]["tokens_minus_selector"] == difference
    assert records["baseline"]["matched"] is True


@pytest.mark.slow
def test_the_choice_of_another_student(first: Done, logs: Path) -> None:
    done = small(logs, "scorer", "probe.model=tiny_b", "stop_after=selection")
    assert done.code == 0, done.err
    own, theirs = ((first.folder, done.folder)[i] / "selector" / "selection.jsonl" for i in (0, 1))
    assert own.read_text() != theirs.read_text()
    words = ["model=tiny_b", "stop_after=selection"]
    other = small(logs, "other-student", *words)
    assert (other.folder / "selector" / "selection.jsonl").read_text() == theirs.read_text()


@pytest.mark.slow
def test_a_rule_in_the_working_folder(first: Done, logs: Path, tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").write_text(RULES)
    words = [*SMALL, f"paths.logs={logs}", f"hydra.run.dir={logs / 'runs' / 'custom'}", "stop_after=selection"]
    done = subprocess.run(
        [sys.executable, "-m", "lark.run", *words, "selector=custom", "selector.score=my_rules:first_two_unknown"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = (logs / "runs" / "custom" / "selector" / "selection.jsonl").read_text().splitlines()
    assert all(int(json.loads(line)["meta"]["candidate_id"]) >= 2 for line in rows)
    record = json.loads((logs / "runs" / "custom" / "selector" / "selection.json").read_text())
    candidates = pq.read_table(first.folder / "statistics.parquet")["candidate_id"].to_pylist()
    assert record["counts"]["dropped_without_score"] == candidates.count("0") + candidates.count("1") > 0
    assert "custom" in pq.read_schema(logs / "runs" / "custom" / "statistics.parquet").names


# ---- multirun


@pytest.mark.slow
def test_multirun_shares_arms_goes_on_after_a_failure_and_goes_on_again(logs: Path, first: Done) -> None:
    words = ["-m", *SMALL, f"paths.logs={logs}", "sft.lr=1e-4", "baseline=random,longest", "budget=2,0"]
    done = lark(*words)
    assert done.code == 1
    (folder,) = (logs / "multiruns").iterdir()
    jobs = {job.name: summary(job) for job in folder.iterdir() if (job / "summary.json").exists()}
    assert {name: job["status"] for name, job in jobs.items()} == {
        "0": "finished",
        "1": "failed",
        "2": "finished",
        "3": "failed",
    }
    assert actions(folder / "0")["selector"] == "train"
    assert actions(folder / "2") == {"before": "reuse", "baseline": "train", "selector": "reuse"}
    assert jobs["0"]["arms"]["selector"]["hash"] == jobs["2"]["arms"]["selector"]["hash"]
    assert "budget=0" in jobs["1"]["error"]
    assert "lark - longest" in done.out
    assert done.err.count("failed: ") == 2
    assert "Traceback" not in done.err
    again = lark(*words)
    assert [path.name for path in (logs / "multiruns").iterdir()] == [folder.name]
    assert again.code == 1
    assert set(actions(folder / "0").values()) == {"reuse"}


@pytest.mark.slow
def test_a_defective_rule_fails_its_job_only(logs: Path, rules: str, first: Done) -> None:
    scores = f"{rules}:defective,{rules}:constant"
    words = ["-m", *SMALL, f"paths.logs={logs}", "stop_after=selection", "selector=custom", f"selector.score={scores}"]
    sweep = logs / "defective"
    done = lark(*words, f"hydra.sweep.dir={sweep}")
    assert done.code == 1
    failed = summary(sweep / "0")
    assert (
        failed["status"] == "failed" and "raised ZeroDivisionError (my_rules.py, line 14): division" in failed["error"]
    )
    assert summary(sweep / "1")["status"] == "finished"
    assert "(my_rules.py, line 14)" in done.err and "Traceback" not in done.err


# ---- bad input


def assert_sentence(done: Done, *parts: str) -> None:
    assert done.code == 1
    assert done.err.startswith("lark: "), done.err
    for noise in ("Traceback", "Error executing job", "HYDRA_FULL_ERROR"):
        assert noise not in done.err
    for part in parts:
        assert part in done.err


def pool(folder: Path, *, problems: int = 12, candidates: int = 3, more: str = "") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "problem_id": problem,
            "candidate_id": candidate,
            "messages": [
                {"role": "user", "content": f"Compute {problem} + 1."},
                {"role": "assistant", "content": f"{'So ' * candidate}\\boxed{{{problem + 1}}}"},
            ],
            "answer": str(problem + 1),
        }
        for problem in range(problems)
        for candidate in range(candidates)
    ]
    path = folder / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return f"task.pool={path}"


def jsonl(logs: Path, name: str, *words: object) -> Done:
    small_pool = ["task=jsonl", "task.checker=number", "task.held_out=0", "stop_after=selection"]
    return small(logs, name, *small_pool, *words)


NO_ASSISTANT = json.dumps({"problem_id": "x", "candidate_id": "0", "messages": [{"role": "user", "content": "?"}]})


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ('{"problem_id": 3, "cand', ["pool.jsonl, line 37", "broken JSON"]),
        (NO_ASSISTANT + "\n", ["pool.jsonl, line 37, messages", "assistant"]),
    ],
)
def test_faulty_rows(more: str, parts: list[str], logs: Path, tmp_path: Path) -> None:
    where = pool(tmp_path, more=more)
    assert_sentence(jsonl(logs, "faulty", where), where, "task.on_error=drop", *parts)
    dropped = jsonl(logs, "faulty", where, "task.on_error=drop")
    assert dropped.code == 0, dropped.err
    assert "36 trajectories of 12 problems" in dropped.out


def test_missing_and_empty_files(logs: Path, tmp_path: Path) -> None:
    assert_sentence(jsonl(logs, "missing", "task.pool=/nowhere.jsonl"), "task.pool=/nowhere.jsonl", "does not exist")
    (tmp_path / "empty.jsonl").touch()
    assert_sentence(jsonl(logs, "empty", f"task.pool={tmp_path / 'empty.jsonl'}"), "empty.jsonl", "no row")
    done = jsonl(logs, "no-eval", pool(tmp_path), "task.eval=/nowhere.jsonl")
    assert_sentence(done, "task.eval=/nowhere.jsonl", "does not exist")
    assert "scoring" not in done.out  # found before anything is scored


def test_one_candidate_a_problem_is_legal_and_counted(logs: Path, tmp_path: Path) -> None:
    done = jsonl(logs, "one", pool(tmp_path, candidates=1))
    assert done.code == 0, done.err
    assert "12 problems with one candidate" in done.log
    assert "chose the same rows with the same weights" in done.err
    rows = [json.loads(line) for line in (done.folder / "selector" / "selection.jsonl").read_text().splitlines()]
    assert [row["weight"] for row in rows] == [1.0] * 12


def test_a_budget_above_the_candidates_gives_the_prior(logs: Path, tmp_path: Path) -> None:
    done = jsonl(logs, "budget", pool(tmp_path), "budget=9")
    assert done.code == 0, done.err
    assert "! budget=9 takes every candidate of every problem" in done.err
    rows = [json.loads(line) for line in (done.folder / "selector" / "selection.jsonl").read_text().splitlines()]
    assert [row["weight"] for row in rows] == pytest.approx([1.0] * 36)
    record = json.loads((done.folder / "selector" / "selection.json").read_text())
    assert record["policy"]["problems_within_budget"] == 12


def test_scores_that_are_no_numbers(first: Done, logs: Path, rules: str) -> None:
    """A rule without a single score chooses nothing; what was computed before stays."""
    rows = pq.read_metadata(first.folder / "statistics.parquet").num_rows
    words = ["selector=custom", f"selector.score={rules}:unknown", "filter=null"]
    done = small(logs, "nan", *words)
    assert_sentence(done, "selector custom chose nothing", f"{rows} without a score")
    assert summary(done.folder)["status"] == "failed"
    assert (done.folder / "statistics.parquet").is_file()
    assert summary(first.folder)["status"] == "finished"
    assert "found in the cache" in small(logs, "after-nan", "stop_after=selection").out


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "logs"
    assert_sentence(lark(*SMALL, f"paths.logs={place}"), f"{place}", "set paths.logs")
    done = lark(*SMALL, f"paths.logs={tmp_path / 'logs'}", f"paths.cache={place}")
    assert_sentence(done, f"paths.cache={place}", "set paths.cache")


def test_a_trainer_says_where_not_what(logs: Path) -> None:
    assert_sentence(small(logs, "hasty", "+trainer.max_time=00:00:00:10"), "trainer.max_time=00:00:00:10", "set in sft")


def test_devices_that_are_not_there(logs: Path) -> None:
    done = small(logs, "devices", "trainer.accelerator=cpu", "trainer.devices=x")
    assert_sentence(done, "trainer.devices=x", "set trainer=auto")


@pytest.mark.slow
def test_a_model_not_to_be_had_as_a_user_sees_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lark.run", "model=smollm2", f"paths.logs={tmp_path / 'logs'}", "logger=csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert_sentence(
        Done(code=done.returncode, out=done.stdout, err=done.stderr), "model=smollm2", "model.path=", "SmolLM2-135M"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_full_error_on_request(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lark.run", "seed=abc", f"paths.logs={tmp_path}", "logger=csv"],
        capture_output=True,
        text=True,
        env=os.environ | {"HYDRA_FULL_ERROR": "1"},
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
