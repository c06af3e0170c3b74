"""What a run leaves in W&B's files, read back from offline runs: the same names for every rule and task, nothing of the
pool's texts, all of the page's names.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from lark_command import lark
from lark_process import TWO_RANKS, finish, start
from pages import text_of
from wandb_file import WandbRun, media, read_wandb

from lark.common.cache import read_json
from lark.selection.candidates import Candidates
from lark.selection.policies import Chi2
from lark.selection.rule import Rule
from lark.selection.selection import Selection, select
from lark.tracking.logging_metrics import list_selection_metrics, list_trajectory_rows

TINY = ["task.limit=24", "task.eval_limit=4", "task.max_new_tokens=16", "sft.steps=3", "evaluation.samples=2"]
ARMS = ("before", "baseline", "selector")
SETS = {"eval", "shifted", "mine"}
BY_TIME = {"train/trained_tokens_per_s"}
"""Logged where there was time to measure them."""

Runs = dict[str, WandbRun]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def run_lark(folder: Path, name: str, *words: object, run: str = "run") -> Runs:
    """W&B's runs of the command, by job type; of a further run in the same folder by name."""
    logs = folder / name
    done = lark(*TINY, f"paths.logs={logs}", f"hydra.run.dir={logs}/{run}", "logger=offline", *words)
    assert done.code == 0, done.err
    runs = [read_wandb(path) for path in sorted(logs.glob("wandb/offline-run-*/run-*.wandb"))]
    return {one.job_type if run == "run" else one.name: one for one in runs if one.group == run}


@pytest.fixture(scope="module")
def one(folder: Path) -> Runs:
    return run_lark(folder, "one")


@pytest.fixture(scope="module")
def pool(one: Runs, folder: Path) -> list[dict]:
    """That of the first run."""
    (path,) = (folder / "one").rglob("pool.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def other(one: Runs, pool: list[dict], folder: Path) -> Runs:
    """Other rules, which ask no student, and another task: a file, without verdicts and teachers; texts may leave."""
    (kept := folder / "mine.jsonl").write_text(
        "".join(json.dumps(row | {"correct": None, "answer": None, "teacher": None}) + "\n" for row in pool[:120])
    )
    (evaluation,) = (folder / "one").rglob("tasks/*/eval.jsonl")
    task = ["task=jsonl", f"task.pool={kept}", f"task.eval={{mine: {evaluation}}}", "task.checker=number"]
    return run_lark(folder, "other", *task, "selector=shortest", "baseline=longest", "logger.text=true")


def fixed_names(found: Iterable[str]) -> set[str]:
    """But for those of evaluation sets and of diagnostics under their own path, and W&B's own."""
    of_set = re.compile(rf"(evaluation|comparison)/({'|'.join(SETS)})/")
    fixed = {of_set.sub(r"\1/<set>/", name) for name in found}
    free = re.compile(r"diagnostics/(?!(selector|baseline)/)")
    return {name for name in fixed if not name.startswith("_") and not free.match(name)} - BY_TIME


def read_table(run: WandbRun, name: str) -> list[dict]:
    table = media(run, f"tables/{name}")
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def read_selection(run: WandbRun) -> list[dict]:
    """The dataset artifact's lines."""
    (files,) = (files for name, files in run.artifacts.items() if name.startswith("dataset/"))
    return [json.loads(line) for line in files["selection.jsonl"].read_text().splitlines()]


def test_names_are_the_same_for_every_rule_and_task(one: Runs, other: Runs) -> None:
    assert one.keys() == {"scoring", *ARMS, "comparison"}
    assert other.keys() == {*ARMS, "comparison"}
    for job_type in other:
        histories = [{key for point in runs[job_type].history for key in point} for runs in (one, other)]
        only_there = {"held_out/loss_correct"}  # where something is known to be correct
        assert fixed_names(histories[0]) - only_there == fixed_names(histories[1]) - only_there
        assert fixed_names(one[job_type].summary) - only_there == fixed_names(other[job_type].summary) - only_there


def test_figures_are_those_of_the_summary(one: Runs, folder: Path) -> None:
    summary = read_json(folder / "one" / "run" / "summary.json")
    for role in ("selector", "baseline"):
        run, arm = one[role], summary["arms"][role]
        assert run.series("selection/trajectories") == [arm["trajectories"]]
        assert run.series("selection/effective_sample_size") == pytest.approx([arm["effective_sample_size"]])
        assert run.series("cost/forward_tokens") == [arm["cost"]["forward_tokens"]]
        (at_the_end,) = (point for point in run.history if "evaluation/accuracy" in point)
        assert at_the_end["evaluation/accuracy"] == pytest.approx(arm["metrics"]["eval"]["avg@2"])
        assert at_the_end["trainer/global_step"] == 3
        found = summary["diagnostics"][f"diagnostics/correlations/{arm['rule']}/loss/within"]
        assert one["comparison"].summary[f"diagnostics/{role}/score_with_loss"] == pytest.approx(found)
    comparison = one["comparison"]
    assert comparison.series("comparison/estimate") == [summary["sets"]["eval"]["difference"]["estimate"]]
    assert comparison.summary.items() >= summary["diagnostics"].items()


def test_the_comparison_is_a_table(one: Runs, folder: Path) -> None:
    summary = read_json(folder / "one" / "run" / "summary.json")
    rows = read_table(one["comparison"], "comparison")
    assert [(row["set"], row["arm"]) for row in rows] == [
        (name, arm) for name in summary["sets"] for arm in (*summary["arms"], "selector - baseline")
    ]
    for row in rows:
        if row["arm"] in summary["arms"]:
            arm = summary["arms"][row["arm"]]
            assert (row["rule"], row["tokens"]) == (arm["rule"], arm["tokens"])
            assert row["accuracy"] == arm["metrics"][row["set"]]["avg@2"]
            assert row["high"] == arm["intervals"][row["set"]]["high"]
        else:
            assert row["accuracy"] == summary["sets"][row["set"]]["difference"]["estimate"]


def test_decisions_are_those_of_the_manifests(one: Runs, other: Runs, folder: Path) -> None:
    run = one["selector"]
    arm = folder / "one" / "arms" / run.config["hash"]
    training, (manifest,) = read_json(arm / "trained.json")["training"], (folder / "one").rglob("cache/stat*/*/man*")
    for name in ("micro_batch_tokens", "halvings", "computed_tokens"):
        assert run.summary[f"decisions/{name}"] == training[name]
    assert run.summary["decisions/end_token"] == read_json(arm / "end_token.json")["token"]
    assert run.summary["decisions/dtype_scoring"] == run.summary["decisions/engine_dtype"] == "float32"
    assert (run.summary["decisions/action"], run.summary["decisions/statistics"]) == ("train", "run")
    tokens = read_json(manifest)["choices"]["tokens at a time"]
    assert run.summary["decisions/statistics_tokens_at_a_time"] == tokens
    assert one["scoring"].summary["decisions/tokens_at_a_time"] == tokens
    assert run.summary["decisions/pool_trajectories"] == 24 * 9
    assert other["selector"].summary["decisions/statistics"] == "not needed"
    assert other["selector"].summary["decisions/pool_trajectories"] == 120


def test_the_selection_is_a_dataset(one: Runs, other: Runs, folder: Path) -> None:
    for name, runs in (("one", one), ("other", other)):
        whole = folder / name / "run" / "selector" / "selection.jsonl"
        expected = [json.loads(line) for line in whole.read_text().splitlines()]
        if runs is one:
            for line in expected:
                del line["messages"], line["meta"]["answer"]
        assert read_selection(runs["selector"]) == expected


def test_no_text_leaves_unless_it_may(one: Runs, other: Runs, pool: list[dict], folder: Path) -> None:
    lines = {line for row in pool for message in row["messages"] for line in message["content"].splitlines()}
    texts = {line.encode() for line in lines if len(line) > 12}  # prompts, and lines that are no mere number
    found = {}
    for name in ("one", "other"):
        files = [path for path in (folder / name / "wandb").rglob("*") if path.is_file()]
        assert {"media", "staging"} <= {part for path in files for part in path.parts}
        everything = b"\n".join(path.read_bytes() for path in files)
        found[name] = sum(text in everything for text in texts)
    assert found["one"] == 0 and found["other"] > 20 and len(texts) > 100
    assert {"prompt", "trajectory"} <= read_table(other["selector"], "trajectories")[0].keys()
    assert any(name.startswith("arm/") for name in other["selector"].artifacts)


def test_a_run_that_ends_with_its_choice(one: Runs, folder: Path) -> None:
    """From the first run's caches: nothing is scored."""
    chosen = run_lark(folder, "one", "stop_after=selection", run="choice")
    assert chosen.keys() == {"selector-lark-seed0", "baseline-random-seed0"}
    run, first = chosen["selector-lark-seed0"], one["selector"]
    assert run.job_type == "selection" and run.summary["decisions/cache_hits"] == 1
    assert read_table(run, "trajectories") == read_table(first, "trajectories")
    assert [line["weight"] for line in read_selection(run)] == [line["weight"] for line in read_selection(first)]


def test_a_reused_arm_is_whole(one: Runs, folder: Path) -> None:
    again = run_lark(folder, "one", "baseline=none", run="again")
    assert sorted(run.job_type for run in again.values()) == ["comparison", "reused", "reused"]
    run, first = again["selector-lark-seed0"], one["selector"]
    missing = fixed_names(first.summary) - fixed_names(run.summary)
    assert missing == {name for name in fixed_names(first.summary) if name.startswith("train/")} | {"epoch"}
    for name in ("held_out/loss", "evaluation/accuracy", "selection/tokens", "cost/forward_tokens"):
        assert run.series(name) == pytest.approx(first.series(name)), name
    assert (run.summary["decisions/action"], run.summary["decisions/statistics"]) == ("reuse", "reuse")


def test_the_page_has_all_names(one: Runs) -> None:
    rows = [line.split("|")[1] for line in text_of("docs/wandb.md").splitlines() if line.startswith("| `")]
    told = [name for row in rows for name in re.findall("`(.*?)`", row)]
    logged: set[str] = set().union(*(fixed_names(run.summary) for run in one.values()))
    decided = {name.partition("/")[2] for name in logged if name.startswith("decisions/")}
    assert decided <= set(told)
    patterns = [re.compile(re.sub(r"<.*?>", "[^/]+", re.escape(name))) for name in told if "/" in name]
    measured = {name for name in logged if not name.startswith("decisions/")} - {"trainer/global_step", "epoch"}
    assert [name for name in measured if not any(one.fullmatch(name) for one in patterns)] == []
    simple = {name for name in told if "/" in name and "<" not in name}
    assert simple - measured <= BY_TIME
    assert math.isfinite(one["comparison"].summary["diagnostics/selector/score_with_length"])


@pytest.mark.slow
def test_one_run_an_arm_with_two_ranks(folder: Path) -> None:
    logs = folder / "ranks"
    words = (*TINY, *TWO_RANKS, "logger=offline", f"paths.logs={logs}", f"hydra.run.dir={logs}/run", "baseline=none")
    finish(start(*words, "stop_after=training"))
    runs = [read_wandb(path) for path in logs.glob("wandb/offline-run-*/run-*.wandb")]
    assert sorted(run.job_type for run in runs) == ["scoring", "selector"]
    (selector,) = (run for run in runs if run.job_type == "selector")
    assert selector.series("trainer/global_step")[0] == 0 and len(selector.series("train/loss")) == 3


# ---- rows and figures of a selection, by brute force

TEACHERS = ("a", "b", "c")


def make_candidates(problems: int = 40, *, loss: bool = True) -> Candidates:
    rng = np.random.default_rng(0)
    size = problems * len(TEACHERS)
    statistics = {"num_tokens": rng.integers(5, 50, size)} | ({"loss": rng.random(size)} if loss else {})
    columns = {"teacher": np.array(TEACHERS * problems, object), "correct": rng.choice([0.0, 1.0, np.nan], size)}
    return Candidates(
        problem_id=np.repeat([f"p{i}" for i in range(problems)], len(TEACHERS)).astype(object),
        candidate_id=np.array([str(i % len(TEACHERS)) for i in range(size)], object),
        row_N=10 + np.arange(size),
        statistics=statistics,
        read_column=lambda name, row_N: columns[name][row_N - 10],
    )


def choose(candidates: Candidates) -> Selection:
    """By a score that is random, and missing for every tenth candidate."""
    score_N = np.random.default_rng(1).random(len(candidates))
    score_N[::10] = np.nan
    rule = Rule(name="mine", score=lambda _: score_N, policy=Chi2(budget=2))  # type: ignore[arg-type]
    return select(rule, candidates, seed=0)


@pytest.mark.parametrize("limit", [200, 30, 4])
def test_rows_are_the_ends_of_every_teacher(limit: int) -> None:
    candidates = make_candidates()
    selection = choose(candidates)
    rows = list_trajectory_rows(candidates, selection, limit=limit)
    assert len(rows) <= limit and len({row["row"] for row in rows}) == len(rows)
    for teacher, count in Counter(row["teacher"] for row in rows).items():
        of_teacher = candidates["teacher"] == teacher
        scores = np.sort(selection.score_N[of_teacher & np.isfinite(selection.score_N)])
        best, worst = (
            [row["score"] for row in rows if (row["teacher"], row["end"]) == (teacher, end)]
            for end in ("best", "worst")
        )
        assert best == scores[::-1][: len(best)].tolist()
        assert sorted(worst) == scores[: len(worst)].tolist()
        assert count == len(best) + len(worst) <= len(scores)
    weight = dict(zip(selection.row.tolist(), selection.weight.tolist(), strict=True))
    assert [row["weight"] for row in rows] == [weight.get(row["row"], 0.0) for row in rows]
    assert {row["correct"] for row in rows} <= {True, False, None}


def test_figures_of_a_selection() -> None:
    candidates = make_candidates(loss=False)
    selection = choose(candidates)
    found = list_selection_metrics(selection, candidates)
    assert found["selection/trajectories"] == len(selection.row)
    correct = candidates["correct"][np.isin(candidates.row_N, selection.row)]
    assert found["selection/correct_share"] == pytest.approx(np.nanmean(correct))
    assert np.isnan(found["selection/score_with_loss"])
    assert {row["loss"] for row in list_trajectory_rows(candidates, selection)} == {None}
