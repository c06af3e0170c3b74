"""Compare many runs: arms pooled over seeds, their differences with intervals, a grid over tasks and models.

An arm is one student: one selection, recipe and seed. It may serve many runs and counts once; arms of one label
(lark.comparison.labels) are pooled over seeds. A figure that is missing is NaN. Accuracies and their differences are
fractions here, and points where they are shown.

Shapes: S seeds, P problems.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lark.comparison.inference import (
    Interval,
    adjust_holm,
    compute_paired_difference,
    compute_sign_flip_p,
    compute_smallest_detectable,
)
from lark.comparison.labels import Figures, Summary, label_arms


@dataclass(frozen=True, kw_only=True)
class PooledArm:
    """Pool the arms of one label: figures are means over the seeds that have them."""

    label: str
    trained: bool
    matched: bool
    """False if it did not take as many trajectories of each problem as the selector, or as many tokens."""
    seeds: tuple[int, ...]
    trajectories: float
    tokens: float
    """Trained tokens of the selection."""
    effective_sample_size: float
    held_out_loss: float
    """After training, nats/token."""
    mean_loss: float
    """Area under the held-out loss curve over optimizer steps, divided by the steps: nats/token."""
    lr: tuple[float, ...]
    """The learning rates of its seeds, each once, ascending."""
    metrics: Mapping[str, Mapping[str, float]]
    """By evaluation set: avg@k, pass@k, stop, boxed, ..."""
    forward_tokens: float
    """Tokens that choosing cost, forwards and backwards, and its seconds; 0 for a rule that asks no model."""
    backward_tokens: float
    seconds: float

    def __post_init__(self) -> None:
        assert self.label and self.seeds and list(self.seeds) == sorted(set(self.seeds))


@dataclass(frozen=True, kw_only=True)
class SetDifference:
    """Hold the difference of two labels on one evaluation set."""

    metric: str
    interval: Interval
    """Of the mean over seeds and problems, as a fraction; NaN where the two have nothing in common."""
    p: float
    """Sign-flip p over problems, seeds averaged."""
    p_holm: float
    """The same, adjusted for all differences of the task, model and set."""
    smallest_detectable: float
    left_out: str
    """What not both sides have, in words."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Hold the selector's label minus the baseline's, or minus the student before training."""

    selector: str
    baseline: str
    seeds: tuple[int, ...]
    """Those of both."""
    held_out_loss: float
    """Mean difference over seeds, nats/token: below 0 the selector is better. So for mean_loss."""
    mean_loss: float
    sets: Mapping[str, SetDifference]

    @property
    def label(self) -> str:
        """Name the difference in tables."""
        return f"{self.selector} - {self.baseline}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Compare the runs of one task and model."""

    task: str
    model: str
    sets: Mapping[str, tuple[str, ...]]
    """The metrics shown, by evaluation set; the first is the one whose differences are taken."""
    arms: tuple[PooledArm, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """Hold one pair's differences over tasks, models and evaluation sets."""

    label: str
    cells: tuple[Interval | None, ...]
    """One a column; None where the pair was not run."""
    average: float
    """Unweighted mean of the differences there are."""
    wins: int
    """Intervals above 0; losses: below; ties: the other intervals."""
    ties: int
    losses: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Hold what many runs came to together."""

    runs: int
    """Finished runs, which are compared."""
    groups: tuple[Group, ...]
    columns: tuple[tuple[str, str, str], ...]
    """Task, model and evaluation set of the grid's columns; empty if there is but one."""
    grid: tuple[GridRow, ...]
    failed: tuple[tuple[str, str], ...]
    """Folder and error."""
    stopped: tuple[tuple[str, str], ...]
    """Folder and where the run was told to stop."""


def compare(summaries: Sequence[Summary]) -> Comparison:
    """Compare runs by what their summary.json say; each has its `folder` besides."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        if "arms" in summary:
            groups.setdefault((summary["task"], summary["model"]), []).append(summary)
    compared = tuple(_compare_group(task, model, runs) for (task, model), runs in groups.items())
    columns, grid = _build_grid(compared)
    return Comparison(
        runs=sum(map(len, groups.values())),
        groups=compared,
        columns=columns,
        grid=grid,
        failed=tuple((s["folder"], s["error"]) for s in summaries if s["status"] == "failed"),
        stopped=tuple((s["folder"], s["stopped_after"]) for s in summaries if "stopped_after" in s),
    )


def _compare_group(task: str, model: str, runs: Sequence[Summary]) -> Group:
    labelled = label_arms(runs)
    untrained = {labels["before"] for labels in labelled.runs}
    sets: dict[str, tuple[str, ...]] = {}
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for run, labels in zip(runs, labelled.runs, strict=True):
        first, second = run["difference_of"]
        of_pair = pairs.setdefault((labels[first], labels[second]), {})
        for name, spec in run["sets"].items():
            sets[name] = tuple(dict.fromkeys((*sets.get(name, ()), *spec["metrics"])))
            of_pair.setdefault(name, spec["metrics"][0])
    return Group(
        task=task,
        model=model,
        sets=sets,
        arms=tuple(
            _pool_arm(label, labelled.arms[label], trained=label not in untrained)
            for label in sorted(labelled.arms, key=lambda label: label not in untrained)
        ),
        differences=_adjust_p(
            [
                _compare_labels(pair, labelled.arms[pair[0]], labelled.arms[pair[1]], metrics)
                for pair, metrics in pairs.items()
            ],
            sets=list(sets),
        ),
        notes=tuple(dict.fromkeys((*labelled.notes, *(note for run in runs for note in run.get("notes", ()))))),
    )


def compute_curve_mean(curve: Sequence[Summary]) -> float:
    """Compute the mean held-out loss over training, nats/token.

    The area under the curve by trapezoids, divided by its steps.
    """
    points = [(point["step"], _read_number(point.get("held_out/loss"))) for point in curve if "step" in point]
    step, loss = np.array([point for point in points if math.isfinite(point[1])]).reshape(-1, 2).T
    if len(step) < 2 or step[-1] == step[0]:
        return math.nan
    return float(np.trapezoid(loss, step) / (step[-1] - step[0]))


def _read_number(value: float | None) -> float:
    """Read a figure: JSON has no NaN, summary.json says null."""
    return math.nan if value is None else float(value)


def _compute_mean(values: Iterable[float | None]) -> float:
    present = [x for x in map(_read_number, values) if math.isfinite(x)]
    return float(np.mean(present)) if present else math.nan


def _pool_arm(label: str, by_seed: Mapping[int, Figures], *, trained: bool) -> PooledArm:
    arms = list(by_seed.values())
    metrics = {
        name: dict.fromkeys(metric for arm in arms for metric in arm["metrics"].get(name, {}))
        for name in dict.fromkeys(name for arm in arms for name in arm["metrics"])
    }
    sizes = ("trajectories", "tokens", "effective_sample_size", "held_out_loss")
    costs = ("forward_tokens", "backward_tokens", "seconds")
    return PooledArm(
        label=label,
        trained=trained,
        matched=all(arm["matched"] for arm in arms),
        seeds=tuple(sorted(by_seed)),
        **{key: _compute_mean(arm[key] for arm in arms) for key in sizes},
        mean_loss=_compute_mean(compute_curve_mean(arm["curve"]) for arm in arms),
        lr=tuple(sorted({arm["lr"] for arm in arms if arm["lr"] is not None})),
        metrics={
            name: {metric: _compute_mean(arm["metrics"].get(name, {}).get(metric) for arm in arms) for metric in of_set}
            for name, of_set in metrics.items()
        },
        **{key: _compute_mean(arm["cost"][key] for arm in arms) for key in costs},
    )


def _compare_labels(
    pair: tuple[str, str], a: Mapping[int, Figures], b: Mapping[int, Figures], metrics: Mapping[str, str]
) -> Difference:
    """Compare two labels' arms by seed; `metrics` names what is compared on each evaluation set."""
    seeds = sorted(a.keys() & b.keys())
    accuracies = {
        name: [{s: arm["per_problem"][name] for s, arm in x.items() if name in arm["per_problem"]} for x in (a, b)]
        for name in metrics
    }
    return Difference(
        selector=pair[0],
        baseline=pair[1],
        seeds=tuple(seeds),
        held_out_loss=_compute_mean(
            _read_number(a[s]["held_out_loss"]) - _read_number(b[s]["held_out_loss"]) for s in seeds
        ),
        mean_loss=_compute_mean(compute_curve_mean(a[s]["curve"]) - compute_curve_mean(b[s]["curve"]) for s in seeds),
        sets={name: _compare_on_set(metric, *accuracies[name]) for name, metric in metrics.items()},
    )


def _compare_on_set(
    metric: str, a: Mapping[int, Mapping[str, float | None]], b: Mapping[int, Mapping[str, float | None]]
) -> SetDifference:
    """Compare accuracies by seed and problem, over the seeds of both and the problems that all of these have."""
    seeds = sorted(a.keys() & b.keys())
    answered = [
        {problem for problem, value in x[seed].items() if math.isfinite(_read_number(value))}
        for x in (a, b)
        for seed in seeds
    ]
    problems = sorted(set.intersection(*answered)) if answered else []
    left_out = [f"seed {seed}" for seed in sorted(a.keys() ^ b.keys())]
    if missing := len({problem for x in (a, b) for seed in seeds for problem in x[seed]}) - len(problems):
        left_out.append(f"{missing} problem{'s' if missing > 1 else ''}")
    if not problems:
        nan = dict.fromkeys(("estimate", "low", "high", "standard_error", "df"), math.nan)
        interval = Interval(**nan, level=0.95, seeds=len(seeds), problems=0, label="nothing in common")
        p = math.nan
    else:
        a_SP, b_SP = (np.array([[x[seed][problem] for problem in problems] for seed in seeds], float) for x in (a, b))
        interval = compute_paired_difference(a_SP, b_SP)
        p = compute_sign_flip_p((a_SP - b_SP).mean(0))
    return SetDifference(
        metric=metric,
        interval=interval,
        p=p,
        p_holm=math.nan,
        smallest_detectable=compute_smallest_detectable(interval.standard_error, df=interval.df),
        left_out=", ".join(left_out),
    )


def _adjust_p(differences: Sequence[Difference], *, sets: Sequence[str]) -> tuple[Difference, ...]:
    """Fill in p_holm, each set a family."""
    adjusted = [dict(one.sets) for one in differences]
    for name in sets:
        family = [of_sets for of_sets in adjusted if name in of_sets and math.isfinite(of_sets[name].p)]
        for of_sets, p in zip(family, adjust_holm([of_sets[name].p for of_sets in family]), strict=True):
            of_sets[name] = replace(of_sets[name], p_holm=float(p))
    return tuple(replace(one, sets=of_sets) for one, of_sets in zip(differences, adjusted, strict=True))


def _build_grid(groups: Sequence[Group]) -> tuple[tuple[tuple[str, str, str], ...], tuple[GridRow, ...]]:
    columns = [(group.task, group.model, name) for group in groups for name in group.sets]
    if len(columns) < 2:
        return (), ()
    cells: dict[str, dict[tuple[str, str, str], Interval]] = {}
    for group in groups:
        for one in group.differences:
            for name, difference in one.sets.items():
                cells.setdefault(one.label, {})[group.task, group.model, name] = difference.interval
    return tuple(columns), tuple(
        _count_wins(label, [row.get(column) for column in columns]) for label, row in cells.items()
    )


def _count_wins(label: str, cells: Sequence[Interval | None]) -> GridRow:
    judged = [cell for cell in cells if cell is not None and math.isfinite(cell.low)]
    wins, losses = sum(cell.low > 0 for cell in judged), sum(cell.high < 0 for cell in judged)
    return GridRow(
        label=label,
        cells=tuple(cells),
        average=_compute_mean(cell.estimate for cell in cells if cell is not None),
        wins=wins,
        ties=len(judged) - wins - losses,
        losses=losses,
    )
