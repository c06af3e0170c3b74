"""Gather what the page shows from run folders: by task and model the comparison and its runs, and their pools."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.cache import read_json
from lark.comparison.comparison import Comparison, Group, compare
from lark.comparison.labels import Figures, label_arms
from lark.page.disagreements import Disagreement, read_disagreements
from lark.page.pool_sample import PoolSample, read_sample

ROLES = ("selector", "baseline")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Hold what one label's arms chose from a pool: by seed, ascending, the role and the run's sample."""

    label: str
    by_seed: Mapping[int, tuple[str, PoolSample]]

    @property
    def scores(self) -> list[float | None]:
        """Scores of the first seed, [n]."""
        role, sample = next(iter(self.by_seed.values()))
        return list(sample.scores[role])

    @property
    def weights(self) -> list[float]:
        """Weights of the first seed, [n]."""
        role, sample = next(iter(self.by_seed.values()))
        return list(sample.weights[role])


@dataclass(frozen=True, kw_only=True)
class PoolContents:
    """Hold one pool as one student reads it, with every choice made from it."""

    name: str
    sample: PoolSample
    """The first run's: its texts and columns are every run's."""
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Hold what a run's diagnostics left. rows: diagnostics-candidates.csv, empty below diagnostics=full."""

    label: str
    """The selector's."""
    seed: int
    found: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class GroupContents:
    """Hold what the runs of one task and model came to."""

    task: str
    model: str
    compared: Group | None
    """None where every run was stopped before its comparison."""
    curves: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
    """Held-out loss curves by label and seed: of trained students, those that were a run's selector first."""
    teacher_shares: Mapping[str, Mapping[str, float]]
    """Shares of each label's weight, from the whole selections: means over seeds."""
    pools: tuple[PoolContents, ...]
    diagnoses: tuple[Diagnosis, ...]
    """One for each selector's label, of its first seed."""
    disagreements: tuple[Disagreement, ...]
    """Of the first run that has any."""
    left_out: tuple[str, ...]
    """What is not shown, in sentences."""

    @property
    def title(self) -> str:
        """Name the group."""
        return f"{self.task} · {self.model}"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Hold all that a page shows. runs: a line each, as text: folder, task, model, seed, rules, status."""

    comparison: Comparison
    groups: tuple[GroupContents, ...]
    runs: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class _Run:
    summary: Mapping[str, Any]
    """What is known of a run that was stopped comes from its sample."""
    finished: bool
    sample: PoolSample | None
    folder: Path
    labels: dict[str, str] = field(default_factory=dict)


def gather(summaries: Sequence[Mapping[str, Any]]) -> Contents:
    """Gather contents from summaries, as `read_summaries` reads them, and from what lies in their folders."""
    runs = [_read_run(summary) for summary in summaries]
    groups: dict[tuple[str, str], list[_Run]] = {}
    for run in runs:
        if "task" in run.summary:
            groups.setdefault((run.summary["task"], run.summary["model"]), []).append(run)
    comparison = compare(summaries)
    compared = {(group.task, group.model): group for group in comparison.groups}
    return Contents(
        comparison=comparison,
        groups=tuple(_gather_group(key, of_group, compared.get(key)) for key, of_group in groups.items()),
        runs=tuple(_describe_run(run.summary) for run in runs),
    )


def _read_run(summary: Mapping[str, Any]) -> _Run:
    folder = Path(summary["folder"])
    sample, finished = read_sample(folder), "arms" in summary
    if not finished and sample is not None:
        facts, arms = sample.facts, {}
        for role, arm in facts["arms"].items():
            trained = folder / role / "trained.json"  # of a run that was stopped after training
            curve = read_json(trained)["curve"] if trained.is_file() else []
            arms[role] = {**arm, "selection": arm["record"], "per_problem": {}, "curve": curve}
        summary = {**summary, **{key: facts[key] for key in ("task", "model", "seed", "settings")}, "arms": arms}
    return _Run(summary=summary, finished=finished, sample=sample, folder=folder)


def _describe_run(summary: Mapping[str, Any]) -> dict[str, str]:
    rules = [arm["rule"] for role in ROLES if (arm := summary.get("arms", {}).get(role))]
    status = summary["status"]
    if "stopped_after" in summary:
        status = f"stopped after {summary['stopped_after']}, as it was told to"
    if status == "failed":
        status = f"failed: {summary['error']}"
    line = {key: str(summary.get(key, "")) for key in ("folder", "task", "model", "seed")}
    return line | {"rules": " against ".join(rules), "status": status}


def _gather_group(key: tuple[str, str], runs: Sequence[_Run], compared: Group | None) -> GroupContents:
    finished = [run for run in runs if run.finished]
    shown = finished or [run for run in runs if "selector" in run.summary["arms"]]
    labelled = label_arms([run.summary for run in shown])
    for run, labels in zip(shown, labelled.runs, strict=True):
        run.labels.update(labels)
    left_out = [
        f"{run.folder} was stopped after {run.summary['stopped_after']} and is shown on a page of its own only: "
        f"python -m lark.report {run.folder} --page {run.folder / 'report.html'}"
        for run in runs
        if finished and not run.finished and "stopped_after" in run.summary
    ]
    of_pools = shown or runs
    if missing := sum(run.sample is None for run in of_pools):
        left_out.append(
            f"{missing} of {len(of_pools)} runs left no candidates.jsonl.gz, as an older version wrote them; run them "
            "again to see their candidates."
        )
    trained = dict.fromkeys(labels[role] for role in ROLES for labels in labelled.runs if role in labels)
    records = {label: records for label in trained if (records := _list_records(labelled.arms[label]))}
    return GroupContents(
        task=key[0],
        model=key[1],
        compared=compared,
        curves={label: {s: arm.get("curve", []) for s, arm in labelled.arms[label].items()} for label in trained},
        teacher_shares={label: _average_shares(of_label) for label, of_label in records.items()},
        pools=_gather_pools(f"{key[0]} · {key[1]}", of_pools),
        diagnoses=_read_diagnoses(shown),
        disagreements=next(filter(None, (read_disagreements(r.folder, r.summary, r.labels) for r in finished)), ()),
        left_out=tuple(left_out),
    )


def _list_records(arms: Mapping[int, Figures]) -> list[Mapping[str, Any]]:
    """List the records of the selections that a label's arms were trained on, or would be."""
    return [record for arm in arms.values() if "teacher_share" in (record := arm.get("selection") or {})]


def _average_shares(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record["teacher_share"])
    return {name: float(np.mean([record["teacher_share"].get(name, 0.0) for record in records])) for name in names}


def _gather_pools(name: str, runs: Sequence[_Run]) -> tuple[PoolContents, ...]:
    by_pool: dict[str, list[tuple[_Run, PoolSample]]] = {}
    for run in runs:
        if run.sample is not None:
            by_pool.setdefault(run.sample.facts["pool"], []).append((run, run.sample))
    pools = []
    for number, of_pool in enumerate(by_pool.values(), 1):
        by_label: dict[str, dict[int, tuple[str, PoolSample]]] = {}
        for run, sample in of_pool:
            for role in ROLES:
                if role in run.labels and role in sample.weights:
                    by_label.setdefault(run.labels[role], {})[run.summary["seed"]] = (role, sample)
        choices = [Choice(label=label, by_seed=dict(sorted(of.items()))) for label, of in by_label.items()]
        first, sample = of_pool[0]
        named = name if len(by_pool) == 1 else f"{name} · pool {number} ({first.folder.name})"
        pools.append(PoolContents(name=named, sample=sample, choices=tuple(choices)))
    return tuple(pools)


def _read_diagnoses(runs: Sequence[_Run]) -> tuple[Diagnosis, ...]:
    """Read for each selector the diagnosis of its first seed, or of the first that has candidates' rows."""
    found: dict[str, Diagnosis] = {}
    for run in sorted(runs, key=lambda run: run.summary["seed"]):
        path, label = run.folder / "diagnostics.json", run.labels["selector"]
        if not path.is_file() or (label in found and found[label].rows):
            continue
        rows = _read_rows(path.with_name("diagnostics-candidates.csv"))
        if label not in found or rows:
            found[label] = Diagnosis(label=label, seed=run.summary["seed"], found=read_json(path), rows=rows)
    return tuple(found.values())


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
