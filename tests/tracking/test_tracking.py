"""Loggers: one W&B run each, kept apart, with no text unless it may leave; CSV files."""

import csv
import json
import math
import os
from pathlib import Path

import pytest
import wandb
from lark_command import SMALL, lark
from omegaconf import OmegaConf
from wandb.proto import wandb_internal_pb2
from wandb_file import media, read_wandb, records

from lark.common.cache import read_json
from lark.common.errors import LarkError
from lark.scoring import progress
from lark.scoring.passes import Statistics
from lark.scoring.progress import PassProgress
from lark.scoring.statistics_pass import StatisticsModule
from lark.tracking import tracking
from lark.tracking.tracking import Csv, Wandb

TITLES = ("selector-lark-seed0", "baseline-random-seed0")


def log_two(tracker: Wandb | Csv, folder: Path) -> None:
    text = folder / "samples-eval.jsonl"
    text.write_text("a confidential trajectory")
    for title in TITLES:
        config = {"arm": title, "task": {"limit": 3}}
        logger = tracker.open(title=title, group="sweep", job_type="selector", config=config, folder=folder)
        print("a confidential trajectory")
        for step in range(3):
            logger.log_metrics({"train/loss": 2.0 - step}, step=step)
        logger.log_metrics({"evaluation/eval/avg@4": 0.25})
        tracker.summarise(logger, {"decisions/engine": "vllm"})
        tracker.summarise(logger, {"decisions/lr": 0.5, "decisions/ceiling": math.nan})
        logger.save()
        tracker.keep_texts(logger, title, {text.name: text})
        tracker.finish()


def wandb_files(folder: Path) -> list[Path]:
    wandb.teardown()  # its service may still be writing
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def x_axes(path: Path) -> dict[str, str]:
    """What the metrics of each pattern are plotted against; empty: nothing."""
    found = map(wandb_internal_pb2.Record.FromString, records(path.read_bytes()))  # type: ignore[attr-defined]
    return {one.metric.glob_name: one.metric.step_metric for one in found if one.metric.glob_name}


@pytest.mark.parametrize("text", [False, True])
def test_consecutive_wandb_runs_stay_apart_and_text_stays_unless_it_may_leave(text: bool, tmp_path: Path) -> None:
    log_two(Wandb(name="offline", mode="offline", text=text), tmp_path)
    by_step = dict.fromkeys(("train/*", "held_out/*", "evaluation/*"), "trainer/global_step")
    once = dict.fromkeys(("selection/*", "diagnostics/*", "comparison/*", "cost/*"), "")
    axes = {"scoring/*": "scoring/trajectories", **by_step, **once}
    assert [x_axes(path) for path in wandb_files(tmp_path)] == [axes, axes]
    runs = {run.name: run for run in map(read_wandb, wandb_files(tmp_path))}
    assert set(runs) == set(TITLES)
    for name, run in runs.items():
        assert (run.group, run.job_type, run.config["arm"]) == ("sweep", "selector", name)
        assert run.config["task"] == {"limit": 3}
        assert run.series("train/loss") == [2.0, 1.0, 0.0]
        assert run.series("trainer/global_step")[:3] == [0, 1, 2]
        assert run.series("evaluation/eval/avg@4") == [0.25]
        assert (run.summary["decisions/engine"], run.summary["decisions/lr"]) == ("vllm", 0.5)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert (b"a confidential trajectory" in everything) == text
    assert (b"samples-eval.jsonl" in everything) == text


def test_tables_and_datasets(tmp_path: Path) -> None:
    tracker = Wandb(name="offline", mode="offline")
    logger = tracker.open(title="one", group="sweep", job_type="selector", config={}, folder=tmp_path)
    tracker.log_table(logger, "tables/teachers", [{"teacher": "a", "share": 0.25}, {"teacher": "b", "share": None}])
    (tmp_path / "selection.json").write_text('{"rule": "lark"}')
    ids = {"problem_id": "p", "candidate_id": "c", "teacher": "t", "correct": None, "rule": "lark", "score": 2.0}
    row = {"messages": [{"content": "secret"}], "weight": 1.5, "meta": {**ids, "share": 0.5, "answer": "secret"}}
    (tmp_path / "selection.jsonl").write_text(json.dumps(row) + "\n")
    tracker.keep_selection(logger, "choice", tmp_path, {"tokens": 9})
    tracker.finish()
    assert "WANDB_DATA_DIR" not in os.environ
    (path,) = wandb_files(tmp_path)
    run = read_wandb(path)
    table = media(run, "tables/teachers")
    assert (table["columns"], table["data"]) == (["teacher", "share"], [["a", 0.25], ["b", None]])
    files = run.artifacts["dataset/choice"]
    assert files.keys() == {"selection.json", "selection.jsonl"}
    assert json.loads(files["selection.jsonl"].read_text()) == {"weight": 1.5, "meta": {**ids, "share": 0.5}}
    assert all(file.is_relative_to(run.folder) for file in files.values())


@pytest.mark.parametrize(
    ("mode", "variable", "resolved"),
    [
        ("online", "offline", "online"),
        ("auto", "offline", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "disabled", "disabled"),
    ],
)
def test_mode(mode: str, variable: str, resolved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    assert Wandb(name="wandb", mode=mode).resolve_mode() == resolved


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(LarkError, match=r"logger\.mode"):
        Wandb(name="wandb", mode="on")


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No key, no mode, and a home folder of its own; W&B's server is a port at which nobody listens."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    return monkeypatch


def test_auto_is_offline_without_a_key(apart: pytest.MonkeyPatch) -> None:
    tracker = Wandb(name="wandb")
    assert tracker.resolve_mode() == "offline"
    assert "wandb login" in tracker.describe()


@pytest.mark.parametrize("key", ["a" * 40, "no key"])
def test_auto_goes_on_offline_where_the_server_or_the_key_fails(
    key: str, apart: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apart.setenv("WANDB_API_KEY", key)
    apart.setattr(tracking, "CONNECT_SECONDS", 1)
    log_two(Wandb(name="wandb"), tmp_path)
    assert {run.name for run in map(read_wandb, wandb_files(tmp_path))} == set(TITLES)
    (warning,) = (line for line in caplog.messages if "wandb sync" in line)
    assert "offline" in warning and "\n" not in warning


def test_online_that_was_asked_for_fails_in_a_sentence(apart: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apart.setenv("WANDB_API_KEY", "a" * 40)
    apart.setattr(tracking, "CONNECT_SECONDS", 1)
    with pytest.raises(LarkError, match="logger=offline"):
        log_two(Wandb(name="wandb", mode="online"), tmp_path)


def test_disabled_writes_nothing(apart: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apart.setenv("WANDB_MODE", "disabled")
    tracker = Wandb(name="offline", mode="offline", text=True)
    log_two(tracker, tmp_path)
    logger = tracker.open(title="one", group="sweep", job_type="selector", config={}, folder=tmp_path)
    tracker.log_table(logger, "tables/teachers", [{"teacher": "a"}])
    tracker.keep_selection(logger, "choice", tmp_path, {})
    tracker.finish()
    wandb.teardown()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["samples-eval.jsonl"]
    assert not list((tmp_path / "home").rglob("*wandb*"))


def test_variables_of_a_sweep_agent_do_not_merge_the_arms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb.teardown()  # what it has read of the environment
    monkeypatch.setenv("WANDB_RUN_ID", "agent")
    monkeypatch.setenv("WANDB_RESUME", "allow")
    log_two(Wandb(name="offline", mode="offline"), tmp_path)
    assert len({path.stem for path in wandb_files(tmp_path)}) == len(TITLES)


def test_csv(tmp_path: Path) -> None:
    log_two(Csv(name="csv", text=True), tmp_path)
    files = sorted(tmp_path.rglob("metrics.csv"))
    assert len(files) == 2
    for path in files:
        rows = list(csv.DictReader(path.open()))
        assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == [2.0, 1.0, 0.0]
        assert any(row["evaluation/eval/avg@4"] == "0.25" for row in rows)
        kept = OmegaConf.load(path.with_name("hparams.yaml"))
        assert (kept.arm, kept.job_type, kept.summary["decisions/engine"]) == (path.parents[1].name, "selector", "vllm")
        assert kept.summary["decisions/lr"] == 0.5


# ---- passes of the student


def test_a_pass_in_wandb(make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(probe={"batch_tokens": 300}, trainer={"callbacks": [PassProgress("statistics")]})
    data.prepare_data()
    done, step = [0], PassProgress.on_predict_batch_end

    def counted(self, trainer, pl_module, outputs, batch, *rest):
        done.append(done[-1] + len(batch))
        step(self, trainer, pl_module, outputs, batch, *rest)

    monkeypatch.setattr(PassProgress, "on_predict_batch_end", counted)
    monkeypatch.setattr(progress, "LOGGER_SECONDS", -1.0)
    tracker = Wandb(name="offline", mode="offline")
    logger = tracker.open(title="statistics-small", group="sweep", job_type="scoring", config={}, folder=tmp_path)
    data.run_pass(Statistics(), cached=False, experiment_logger=logger)
    tracker.finish()
    (path,) = wandb_files(tmp_path)
    run, figures = read_wandb(path), read_json(data.statistics_folder / "manifest.json")["throughput"]
    assert len(done) > 4 and run.series("scoring/trajectories") == [*done[1:], done[-1]]
    for name in ("trajectories_per_s", "tokens_per_s"):
        series = run.series(f"scoring/{name}")
        assert len(series) == len(done) and min(series) > 0
        assert series[-1] == pytest.approx(figures[name])
    left = run.series("scoring/seconds_left")
    assert left[0] > 1e-6 > left[-2] >= left[-1] == 0


def test_a_pass_that_runs_is_a_run_and_one_from_the_cache_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*SMALL, f"paths.logs={tmp_path}", "logger=offline", "stop_after=statistics")

    def fails(*_: object) -> None:
        raise LarkError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(StatisticsModule, "measure", fails)
        assert lark(*words, f"hydra.run.dir={tmp_path}/failed").code == 1
    assert wandb.run is None, "the next run would become part of this one"
    for name in ("fresh", "cached"):
        assert lark(*words, f"hydra.run.dir={tmp_path}/{name}").code == 0
    runs = {run.group: run for run in map(read_wandb, wandb_files(tmp_path))}
    assert runs.keys() == {"failed", "fresh"}
    for run in runs.values():
        assert (run.name, run.job_type) == ("statistics-tiny", "scoring")
        assert run.config["pass"] == "statistics" and run.config["task"]["name"] == "arithmetic"
    (manifest,) = tmp_path.glob("cache/statistics/*/manifest.json")
    assert runs["fresh"].config["hash"] == manifest.parent.name
    assert runs["fresh"].series("scoring/trajectories")[-1] == read_json(manifest)["rows"]
    assert runs["failed"].series("scoring/trajectories") == []
