"""Loggers: one W&B run each, kept apart, with no text unless it may leave; CSV files."""

import csv
from pathlib import Path

import pytest
import wandb
from wandb_file import read_wandb

from lark.tracking import Csv, Wandb


def log_two(tracker: Wandb | Csv, folder: Path) -> None:
    text = folder / "samples-eval.jsonl"
    text.write_text("a confidential trajectory")
    for title in ("selector-lark-seed0", "baseline-random-seed0"):
        config = {"arm": title, "task": {"limit": 3}}
        logger = tracker.open(title=title, group="sweep", job_type="selector", config=config, folder=folder)
        print("a confidential trajectory")
        for step in range(3):
            logger.log_metrics({"train/loss": 2.0 - step}, step=step)
        logger.log_metrics({"evaluation/eval/avg@4": 0.25})
        logger.save()
        tracker.keep(logger, title, [text])
        tracker.finish()


def wandb_files(folder: Path) -> list[Path]:
    wandb.teardown()  # its service may still be writing
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_consecutive_wandb_runs_stay_apart(tmp_path: Path) -> None:
    log_two(Wandb(name="offline", mode="offline"), tmp_path)
    runs = {run.name: run for run in map(read_wandb, wandb_files(tmp_path))}
    assert set(runs) == {"selector-lark-seed0", "baseline-random-seed0"}
    for name, run in runs.items():
        assert (run.group, run.job_type) == ("sweep", "selector")
        assert run.config["arm"] == name
        assert run.config["task"] == {"limit": 3}
        assert run.series("train/loss") == [2.0, 1.0, 0.0]
        assert run.series("trainer/global_step")[:3] == [0, 1, 2]
        assert run.series("evaluation/eval/avg@4") == [0.25]


@pytest.mark.parametrize("text", [False, True])
def test_text_stays_unless_it_may_leave(text: bool, tmp_path: Path) -> None:
    log_two(Wandb(name="offline", mode="offline", text=text), tmp_path)
    assert len(wandb_files(tmp_path)) == 2
    everything = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert b"a confidential trajectory" not in everything
    assert (b"samples-eval.jsonl" in everything) == text


@pytest.mark.parametrize(("mode", "variable", "offline"), [("online", "offline", False), ("auto", "offline", True)])
def test_mode(mode: str, variable: str, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    assert Wandb(name="wandb", mode=mode).offline == offline


def test_auto_is_offline_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tracker = Wandb(name="wandb")
    assert tracker.offline
    assert tracker.describe() == "W&B offline (no API key; `wandb login` once to upload)"


def test_csv(tmp_path: Path) -> None:
    log_two(Csv(name="csv", text=True), tmp_path)
    files = sorted(tmp_path.rglob("metrics.csv"))
    assert len(files) == 2
    for path in files:
        rows = list(csv.DictReader(path.open()))
        assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == [2.0, 1.0, 0.0]
        assert any(row["evaluation/eval/avg@4"] == "0.25" for row in rows)
        assert "job_type: selector" in path.with_name("hparams.yaml").read_text()
