"""Write the logger's runs: of a pass, of a selection, of an arm, of the pair. docs/wandb.md has the names.

Runs of one job type have the same names whatever the rule, the task and the seed, so that one workspace fits all; what
is not known is NaN. Names that differ (an evaluation set's, a diagnostic's) have a fixed one beside them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lark.common.cache import file_hash
from lark.diagnostics.composition import expand_q
from lark.selection.candidates import Candidates
from lark.selection.selection import Selection
from lark.tracking.decisions import (
    NONE,
    Taken,
    collect_arm_decisions,
    collect_pass_decisions,
    collect_run_decisions,
    collect_selection_decisions,
    read_if_there,
)
from lark.tracking.tracking import Csv, Wandb
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule

Tracker = Wandb | Csv
ROWS = 200  # of a table
DIFFERENCE = ("estimate", "low", "high", "smallest_detectable")
SHARED = ("boxed", "stop", "truncated", "tokens")
ARMS = ("before", "baseline", "selector")
ARM_COLUMNS = ("lr", "trajectories", "tokens", "effective_sample_size", "held_out_loss")
COSTS = ("forward_tokens", "backward_tokens", "seconds")


def log_pass(logger: Any, tracker: Tracker, manifest: Mapping[str, Any]) -> None:
    """Log what a pass chose by itself and cost, from its manifest."""
    tracker.summarise(logger, _prefix("decisions", collect_pass_decisions(manifest)) | _list_cost(manifest))


def log_choice(
    logger: Any, tracker: Tracker, role: str, folder: Path, data: TrajectoryDataModule, taken: Taken
) -> None:
    """Log the selection that `folder` holds as selection.jsonl, in a run that ends with it."""
    tracker.summarise(logger, _prefix("decisions", collect_run_decisions(data, taken)))
    _log_selection(logger, tracker, role, folder, data)
    logger.log_metrics(_list_cost(data.cost_of(data.rules[role])))
    logger.save()


def log_arm(
    logger: Any,
    tracker: Tracker,
    arm: Arm,
    run: Path,
    data: TrajectoryDataModule,
    figures: Mapping[str, Any],
    *,
    action: str,
    taken: Taken,
    texts: Mapping[str, Path],
) -> dict[str, float]:
    """Log an arm's final figures, its selection and what was decided; return what choosing cost.

    run: the run's folder. figures: what its evaluation came to (`Evaluator.evaluate`); empty: there was none. action:
    train | evaluate | reuse. An arm that was not trained here gets its held-out curve too, which this group of runs has
    not seen. texts: files of samples and verdicts, by name.
    """
    trained = read_if_there(arm.folder / "trained.json") if arm.selection is not None else {}
    if action != "train":
        for point in trained.get("curve", ()):
            logger.log_metrics({k: v for k, v in point.items() if k != "step"}, step=int(point["step"]))
    metrics = list_evaluation_metrics(figures.get("metrics", {}), figures.get("intervals", {}))
    logger.log_metrics(metrics, step=trained.get("steps", 0))
    decided = collect_run_decisions(data, taken) | collect_arm_decisions(arm, action, figures.get("sampling", {}))
    tracker.summarise(logger, _prefix("decisions", decided))
    cost = data.cost_of(data.rules[arm.name]) if arm.name in data.rules else {}
    if cost:
        logger.log_metrics(_list_cost(cost))
    if arm.name in data.rules:
        _log_selection(logger, tracker, arm.name, run / arm.name, data)
    tracker.keep_texts(logger, f"{arm.name}-{arm.folder.name}", texts)
    logger.save()
    return cost


def log_comparison(
    logger: Any,
    tracker: Tracker,
    summary: Mapping[str, Any],
    data: TrajectoryDataModule,
    found: Mapping[str, Any],
    taken: Taken,
) -> None:
    """Log the pair of arms, from summary.json's content and the diagnostics' `found`."""
    arms = summary["arms"]
    metrics: dict[str, float] = {}
    for name, of_set in summary["sets"].items():
        metrics |= {f"comparison/{name}/{key}": of_set["difference"][key] for key in DIFFERENCE}
    first = next(iter(summary["sets"]), None)
    metrics |= {f"comparison/{key}": metrics.get(f"comparison/{first}/{key}", math.nan) for key in DIFFERENCE}
    ours, theirs = (arms.get(role, {}).get("held_out_loss") for role in ("selector", "baseline"))
    metrics["comparison/held_out_loss"] = math.nan if None in (ours, theirs) else ours - theirs
    logger.log_metrics(metrics | pick_fixed_diagnostics(summary["diagnostics"], found))

    decided = collect_run_decisions(data, taken)
    decided |= {f"{role}_action": arms.get(role, {}).get("action", NONE) for role in ARMS}
    for role in ("selector", "baseline"):
        arm = arms[role] if role in arms and role in data.selections else {}
        decided |= {f"{role}_rule": arm.get("rule", NONE), f"{role}_lr": arm.get("lr", math.nan)}
    tracker.summarise(logger, _prefix("decisions", decided) | dict(summary["diagnostics"]))
    if isinstance(tracker, Wandb):
        tracker.log_table(logger, "tables/comparison", list_comparison_rows(summary))
    logger.save()


def list_evaluation_metrics(
    sets: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """List evaluation/<set>/<metric> of every set, and those of the first set under names that all tasks share."""
    metrics = {f"evaluation/{name}/{key}": value for name, one in sets.items() for key, value in one.items()}
    first = next(iter(sets), "")
    figures, interval = sets.get(first, {}), intervals.get(first, {})
    shared = {"accuracy": figures.get(f"avg@{figures.get('samples')}", math.nan)}
    shared |= {f"accuracy_{end}": interval.get(end, math.nan) for end in ("low", "high")}
    shared |= {key: figures.get(key, math.nan) for key in SHARED}
    return metrics | _prefix("evaluation", shared)


def list_comparison_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List accuracies by evaluation set and arm beside the arm's rule, size and held-out loss, from summary.json's
    content; then each set's difference. Without evaluation sets: a row an arm.
    """
    rows = []
    for name in summary["sets"] or [""]:
        for role, arm in summary["arms"].items():
            metrics, interval = arm["metrics"].get(name, {}), arm["intervals"].get(name, {})
            accuracy = {"accuracy": metrics.get(f"avg@{metrics.get('samples')}")}
            accuracy |= {end: interval.get(end) for end in ("low", "high")}
            rows.append(
                {"set": name, "arm": role, "rule": arm["rule"], **accuracy, **{key: arm[key] for key in ARM_COLUMNS}}
            )
        if name:
            one = summary["sets"][name]["difference"]
            accuracy = {"accuracy": one["estimate"], "low": one["low"], "high": one["high"]}
            title = " - ".join(summary["difference_of"])
            rows.append({"set": name, "arm": title, "rule": None, **accuracy, **dict.fromkeys(ARM_COLUMNS)})
    return rows


def pick_fixed_diagnostics(figures: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, float]:
    """Pick those of the many diagnostics that every run has, under names by role in place of the rule's name."""
    fixed: dict[str, float] = {}
    for role in ("selector", "baseline"):
        score = str(found.get("selections", {}).get(role, {}).get("score", "")).replace(" ", "_")
        paths = {f"score_with_{x}": f"correlations/{score}/{x}/within" for x in ("loss", "length", "correct")}
        for name in ("effective_within_problem", "chi2_within_problem"):
            paths[name] = f"selections/{role}/concentration/{name}"
        paths |= {name: f"curves/{role}/{name}" for name in ("area_ratio", "final_ratio", "steps_ratio")}
        values = {name: figures.get(f"diagnostics/{path}", math.nan) for name, path in paths.items()}
        fixed |= _prefix(f"diagnostics/{role}", values)
    return fixed


def _prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _list_cost(cost: Mapping[str, Any]) -> dict[str, float]:
    return {f"cost/{name}": float(cost[name]) for name in COSTS}


# ---- a selection


def _log_selection(logger: Any, tracker: Tracker, role: str, folder: Path, data: TrajectoryDataModule) -> None:
    """Log a selection's figures and decisions; in W&B also the trajectories' table and the rows as an artifact."""
    selection, candidates = data.selections[role], data.candidates
    logger.log_metrics(list_selection_metrics(selection, candidates))
    tracker.summarise(logger, _prefix("decisions", collect_selection_decisions(selection)))
    if not isinstance(tracker, Wandb):
        return
    rows = list_trajectory_rows(candidates, selection)
    row_N = np.array([row.pop("row") for row in rows], np.int64)
    if tracker.text:
        for row, text in zip(rows, data.trajectories.read_rows(row_N), strict=True):
            *prompt, last = text["messages"]
            row |= {"prompt": "\n\n".join(one["content"] for one in prompt), "trajectory": last["content"]}
    tracker.log_table(logger, "tables/trajectories", rows)
    about = {"rule": selection.record["rule"], "trajectories": len(selection.row), "tokens": selection.record["tokens"]}
    tracker.keep_selection(logger, f"selection-{role}-{file_hash(folder / 'selection.json')[:16]}", folder, about)


def list_selection_metrics(selection: Selection, candidates: Candidates) -> dict[str, float]:
    """List counts, and what the score goes along with (Spearman's correlation within problems); shares from 0 to 1."""
    record, counts = selection.record, selection.record["counts"]
    correct_N = candidates["correct"].astype(np.float64)[expand_q(candidates, selection) > 0]
    correct_N = correct_N[np.isfinite(correct_N)]
    spearman = record["within_problem_spearman"]
    figures: dict[str, Any] = {
        "trajectories": counts["chosen"],
        "of_candidates": counts["candidates"],
        "tokens": record["tokens"],
        "effective_sample_size": record["effective_sample_size"],
        "largest_weight": selection.weight.max(),
        "largest_teacher_share": max(record["teacher_share"].values()),
        "correct_share": correct_N.mean() if len(correct_N) else None,
        "problems_without_choice": counts["problems_without_choice"],
        "dropped_by_filter": counts["dropped_by_filter"],
        "dropped_without_score": counts["dropped_without_score"],
        "short_of_selector": counts.get("short_of_selector", 0),
        "score_with_loss": spearman.get("loss"),
        "score_with_length": spearman.get("num_tokens"),
    }
    return {f"selection/{key}": math.nan if value is None else float(value) for key, value in figures.items()}


def list_trajectory_rows(candidates: Candidates, selection: Selection, *, limit: int = ROWS) -> list[dict[str, Any]]:
    """List the candidates with the highest and the lowest scores of every teacher, as many of each; at most `limit`
    rows, those of the teachers with the most candidates. `row` is the row's number in the pool.
    """
    weight_N = np.zeros(len(candidates))
    weight_N[np.searchsorted(candidates.row_N, selection.row)] = selection.weight
    loss_N = candidates["loss"] if "loss" in candidates.statistics else np.full(len(candidates), np.nan)
    columns = {
        "row": candidates.row_N,
        "teacher": [str(teacher) for teacher in candidates["teacher"]],
        "end": "best",
        "score": selection.score_N,
        "weight": weight_N,
        "loss": loss_N,
        "tokens": candidates["num_tokens"],
        "correct": candidates["correct"].astype(np.float64),
        "problem_id": [str(name) for name in candidates.problem_id],
        "candidate_id": [str(name) for name in candidates.candidate_id],
    }
    table: Any = pd.DataFrame(columns)
    table = table[np.isfinite(table["score"])].sort_values("score", ascending=False, kind="stable")
    by_teacher = table.groupby("teacher")
    size, place = by_teacher["row"].transform("size"), by_teacher.cumcount()
    each = max(1, limit // (2 * max(1, by_teacher.ngroups)))
    table.loc[place >= each, "end"] = "worst"
    ends = table[(place < each) | (place >= size - each)].assign(size=size)
    ends = ends.sort_values(["size", "teacher", "end"], ascending=[False, True, True], kind="stable")
    rows = ends.drop(columns="size").head(limit)
    rows["correct"] = rows["correct"].map({0.0: False, 1.0: True})
    return rows.astype(object).where(rows.notna(), None).to_dict("records")
