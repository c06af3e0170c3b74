"""What the page shows, gathered from run folders: by task and model the comparison and its runs, and their pools."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lark.common.cache import read_json
from lark.comparison.comparison import Comparison, Group, compare
from lark.comparison.labels import Figures, label_arms
from lark.page.pool_sample import PoolSample, read_sample

ROLES = ("selector", "baseline")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one label's arms chose from a pool: by seed the role and the run's sample, in the order of the seeds."""

    label: str
    by_seed: Mapping[int, tuple[str, PoolSample]]

    @property
    def scores(self) -> list[float | None]:
        """[n], of its first seed."""
        role, sample = next(iter(self.by_seed.values()))
        return list(sample.scores[role])

    @property
    def weights(self) -> list[float]:
        """[n], of its first seed."""
        role, sample = next(iter(self.by_seed.values()))
        return list(sample.weights[role])


@dataclass(frozen=True, kw_only=True)
class PoolContents:
    """One pool as one student reads it, with every choice made from it."""

    name: str
    sample: PoolSample
    """Of the first run: its texts and columns are every run's."""
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What a run's diagnostics left. rows: diagnostics-candidates.csv, empty below diagnostics=full."""

    label: str
    """Of the selector."""
    seed: int
    found: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class GroupContents:
    """The runs of one task and model."""

    task: str
    model: str
    compared: Group | None
    """None where every run was stopped before its comparison."""
    curves: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
    """Held-out loss curves by label and seed: of trained students, those that were a run's selector first."""
    teacher_shares: Mapping[str, Mapping[str, float]]
    """Of each label's weight, from the whole selections: means over seeds."""
    effective: Mapping[str, tuple[float, float]]
    """Effective sample size and trajectories of each label, means over seeds."""
    pools: tuple[PoolContents, ...]
    diagnoses: tuple[Diagnosis, ...]
    """One for each selector's label, of its first seed."""
    left_out: tuple[str, ...]
    """What is not shown, in sentences."""


@dataclass(frozen=True, kw_only=True)
class RunLine:
    folder: str
    task: str
    model: str
    seed: str
    rules: str
    status: str


@dataclass(frozen=True, kw_only=True)
class Contents:
    comparison: Comparison
    groups: tuple[GroupContents, ...]
    runs: tuple[RunLine, ...]


@dataclass(frozen=True, kw_only=True)
class _Run:
    summary: Mapping[str, Any]
    """Of a run that was stopped, put together from its sample."""
    finished: bool
    sample: PoolSample | None
    folder: Path
    labels: dict[str, str] = field(default_factory=dict)


def gather(summaries: Sequence[Mapping[str, Any]]) -> Contents:
    """From summary.json of runs, each with its `folder` besides, and what lies in these folders."""
    runs = [_run(summary) for summary in summaries]
    groups: dict[tuple[str, str], list[_Run]] = {}
    for run in runs:
        if "task" in run.summary:
            groups.setdefault((run.summary["task"], run.summary["model"]), []).append(run)
    comparison = compare(summaries)
    compared = {(group.task, group.model): group for group in comparison.groups}
    return Contents(
        comparison=comparison,
        groups=tuple(_group(key, of_group, compared.get(key)) for key, of_group in groups.items()),
        runs=tuple(_line(run) for run in runs),
    )


def _run(summary: Mapping[str, Any]) -> _Run:
    folder = Path(summary["folder"])
    sample = read_sample(folder)
    finished = "arms" in summary
    if not finished and sample is not None:
        facts = sample.facts
        arms = {role: {**arm, "per_problem": {}, "curve": _curve(folder / role)} for role, arm in facts["arms"].items()}
        known = {key: facts[key] for key in ("task", "model", "seed", "settings")}
        summary = {**summary, **known, "arms": arms}
    return _Run(summary=summary, finished=finished, sample=sample, folder=folder)


def _curve(arm: Path) -> list[dict[str, Any]]:
    """Of a run that was stopped after training; empty before that."""
    path = arm / "trained.json"
    return read_json(path)["curve"] if path.is_file() else []


def _line(run: _Run) -> RunLine:
    summary = run.summary
    rules = [arm["rule"] for role in ROLES if (arm := summary.get("arms", {}).get(role))]
    status = summary["status"]
    if "stopped_after" in summary:
        status = f"stopped after {summary['stopped_after']}, as it was told to"
    if status == "failed":
        status = f"failed: {summary['error']}"
    return RunLine(
        folder=summary["folder"],
        task=summary.get("task", ""),
        model=summary.get("model", ""),
        seed=str(summary.get("seed", "")),
        rules=" against ".join(rules),
        status=status,
    )


def _group(key: tuple[str, str], runs: Sequence[_Run], compared: Group | None) -> GroupContents:
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
    trained = list(dict.fromkeys(labels[role] for role in ROLES for labels in labelled.runs if role in labels))
    records = {label: _records(labelled.arms[label]) for label in trained}
    pools, without = _pools(f"{key[0]} · {key[1]}", shown or runs)
    return GroupContents(
        task=key[0],
        model=key[1],
        compared=compared,
        curves={label: {s: arm.get("curve", []) for s, arm in labelled.arms[label].items()} for label in trained},
        teacher_shares={label: _mean_shares(of_label) for label, of_label in records.items() if of_label},
        effective={
            label: (_mean([r["effective_sample_size"] for r in of]), _mean([r["counts"]["chosen"] for r in of]))
            for label, of in records.items()
            if of
        },
        pools=pools,
        diagnoses=_diagnoses(shown),
        left_out=(*left_out, *without),
    )


def _records(arms: Mapping[int, Figures]) -> list[Mapping[str, Any]]:
    """The records of the selections that a label's arms were trained on, or would be."""
    records = [arm.get("selection") or arm.get("record") for arm in arms.values()]
    return [record for record in records if record and "teacher_share" in record]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_shares(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record["teacher_share"])
    return {name: _mean([record["teacher_share"].get(name, 0.0) for record in records]) for name in names}


def _pools(name: str, runs: Sequence[_Run]) -> tuple[tuple[PoolContents, ...], list[str]]:
    """The pools of the runs, and a sentence on runs that left none."""
    by_pool: dict[str, list[_Run]] = {}
    for run in runs:
        if run.sample is not None:
            by_pool.setdefault(run.sample.facts["pool"], []).append(run)
    pools = []
    for number, of_pool in enumerate(by_pool.values(), 1):
        by_label: dict[str, dict[int, tuple[str, PoolSample]]] = {}
        for run in of_pool:
            for role in ROLES:
                if run.sample is not None and role in run.labels and role in run.sample.weights:
                    by_label.setdefault(run.labels[role], {})[run.summary["seed"]] = (role, run.sample)
        choices = [Choice(label=label, by_seed=dict(sorted(of.items()))) for label, of in by_label.items()]
        first = of_pool[0].sample
        assert first is not None
        named = name if len(by_pool) == 1 else f"{name} · pool {number} ({of_pool[0].folder.name})"
        pools.append(PoolContents(name=named, sample=first, choices=tuple(choices)))
    missing = sum(run.sample is None for run in runs)
    what = f"{missing} of {len(runs)} runs left no candidates.jsonl.gz, as an older version wrote them; run them again"
    return tuple(pools), [f"{what} to see their candidates."] if missing else []


def _diagnoses(runs: Sequence[_Run]) -> tuple[Diagnosis, ...]:
    found: dict[str, Diagnosis] = {}
    for run in sorted(runs, key=lambda run: run.summary["seed"]):
        path = run.folder / "diagnostics.json"
        label = run.labels["selector"]
        if not path.is_file() or (label in found and found[label].rows):
            continue
        one = Diagnosis(
            label=label,
            seed=run.summary["seed"],
            found=read_json(path),
            rows=_rows(path.with_name("diagnostics-candidates.csv")),
        )
        if label not in found or one.rows:
            found[label] = one
    return tuple(found.values())


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
