"""What the logger's runs hold: of a pass, of a choice, of an arm, of the pair. docs/wandb.md has the names.

Runs of one job type have the same ones whatever the rule, the task and the seed, so that one workspace fits all; what
is not known is NaN. Names that differ (an evaluation set's, a diagnostic's) have a fixed one beside them.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.cache import read_json
from lark.diagnostics.composition import shares
from lark.selection.candidates import Candidates
from lark.selection.selection import Selection
from lark.tracking import decisions
from lark.tracking.decisions import Taken
from lark.tracking.tracking import Csv, Wandb
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule

Tracker = Wandb | Csv
ROWS = 200  # of a table
DIFFERENCE = ("estimate", "low", "high", "smallest_detectable")
CORRELATED = ("loss", "length", "correct")


def log_pass(logger: Any, tracker: Tracker, manifest: Mapping[str, Any]) -> None:
    """What a pass chose by itself and cost, from its manifest."""
    found = {f"decisions/{name}": value for name, value in decisions.of_pass(manifest).items()}
    tracker.summarise(logger, found | _cost(manifest))


def log_choice(
    logger: Any, tracker: Tracker, role: str, folder: Path, data: TrajectoryDataModule, taken: Taken
) -> None:
    """A selection that `folder` holds as selection.jsonl, of a run that ends with it."""
    tracker.summarise(logger, _decisions(decisions.of_run(data, taken)))
    _log_selection(logger, tracker, role, folder, data)
    if role in data.rules:
        logger.log_metrics(_cost(data.cost_of(data.rules[role])))
    logger.save()


def log_arm(
    logger: Any, tracker: Tracker, arm: Arm, data: TrajectoryDataModule, *, action: str, taken: Taken
) -> dict[str, float]:
    """Final figures, the choice, and what was decided; of a reused arm the held-out curve too, which this group lacks.

    action: train | evaluate | reuse. Returns what choosing cost, nothing for an arm without a rule.
    """
    path = arm.folder / "trained.json"
    trained = read_json(path) if arm.selection is not None and path.is_file() else {"curve": [], "steps": 0}
    if action != "train":
        for point in trained["curve"]:
            logger.log_metrics({k: v for k, v in point.items() if k != "step"}, step=int(point["step"]))
    path = arm.folder / "metrics.json"
    written = read_json(path) if path.is_file() else {"sets": {}, "intervals": {}}
    logger.log_metrics(evaluation_metrics(written["sets"], written["intervals"]), step=trained["steps"])
    tracker.summarise(logger, _decisions(decisions.of_run(data, taken) | decisions.of_arm(arm, action)))
    cost: dict[str, float] = {}
    if arm.name in data.rules:
        cost = data.cost_of(data.rules[arm.name])
        logger.log_metrics(_cost(cost))
    if arm.name in data.selections:
        _log_selection(logger, tracker, arm.name, arm.folder, data)
    tracker.keep(logger, f"{arm.name}-{arm.folder.name}", sorted(arm.folder.glob("samples-*.jsonl")))
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
    """The pair, from summary.json's content; found: the diagnostics' `found`."""
    arms = summary["arms"]
    metrics: dict[str, float] = {}
    for name, of_set in summary["sets"].items():
        metrics |= {f"comparison/{name}/{key}": of_set["difference"][key] for key in DIFFERENCE}
    first = next(iter(summary["sets"]), None)
    metrics |= {f"comparison/{key}": metrics.get(f"comparison/{first}/{key}", math.nan) for key in DIFFERENCE}
    ours, theirs = (arms.get(role, {}).get("held_out_loss") for role in ("selector", "baseline"))
    metrics["comparison/held_out_loss"] = math.nan if None in (ours, theirs) else ours - theirs
    logger.log_metrics(metrics | fixed_diagnostics(summary["diagnostics"], found))
    rates = {role: (arm["rule"], arm["lr"]) for role, arm in arms.items() if role in data.selections}
    actions = {f"{role}_action": arms.get(role, {}).get("action", decisions.NONE) for role in _ARMS}
    of_run = decisions.of_run(data, taken) | dict(decisions.of_rates(rates)) | actions
    tracker.summarise(logger, _decisions(of_run) | dict(summary["diagnostics"]))
    if isinstance(tracker, Wandb):
        tracker.tabulate(logger, {"tables/comparison": comparison_rows(summary)})
    logger.save()


_ARMS = ("before", "baseline", "selector")
_OF_ARM = ("lr", "trajectories", "tokens", "effective_sample_size", "held_out_loss")


def comparison_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
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
                {"set": name, "arm": role, "rule": arm["rule"], **accuracy, **{key: arm[key] for key in _OF_ARM}}
            )
        if name:
            one = summary["sets"][name]["difference"]
            accuracy = {"accuracy": one["estimate"], "low": one["low"], "high": one["high"]}
            title = " - ".join(summary["difference_of"])
            rows.append({"set": name, "arm": title, "rule": None, **accuracy, **dict.fromkeys(_OF_ARM)})
    return rows


def evaluation_metrics(
    sets: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """evaluation/<set>/<metric> of every set, and under names that all tasks share those of the first."""
    metrics = {f"evaluation/{name}/{key}": value for name, of in sets.items() for key, value in of.items()}
    first = next(iter(sets), "")
    of, interval = sets.get(first, {}), intervals.get(first, {})
    metrics["evaluation/accuracy"] = of.get(f"avg@{of.get('samples')}", math.nan)
    metrics |= {f"evaluation/accuracy_{end}": interval.get(end, math.nan) for end in ("low", "high")}
    return metrics | {f"evaluation/{key}": of.get(key, math.nan) for key in ("boxed", "stop", "truncated", "tokens")}


def fixed_diagnostics(figures: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, float]:
    """Of the many diagnostics those that every run has, by role in place of the rule's name."""
    fixed: dict[str, float] = {}
    for role in ("selector", "baseline"):
        score = str(found.get("selections", {}).get(role, {}).get("score", "")).replace(" ", "_")
        places = {f"score_with_{x}": f"correlations/{score}/{x}/within" for x in CORRELATED}
        places |= {
            "effective_within_problem": f"selections/{role}/concentration/effective_within_problem",
            "chi2_within_problem": f"selections/{role}/concentration/chi2_within_problem",
            "area_ratio": f"curves/{role}/area_ratio",
            "final_ratio": f"curves/{role}/final_ratio",
            "steps_ratio": f"curves/{role}/steps_ratio",
        }
        fixed |= {
            f"diagnostics/{role}/{name}": figures.get(f"diagnostics/{at}", math.nan) for name, at in places.items()
        }
    return fixed


def _decisions(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"decisions/{name}": value for name, value in values.items()}


def _cost(cost: Mapping[str, Any]) -> dict[str, float]:
    return {f"cost/{name}": float(cost[name]) for name in ("forward_tokens", "backward_tokens", "seconds")}


# ---- a choice


def _log_selection(logger: Any, tracker: Tracker, role: str, folder: Path, data: TrajectoryDataModule) -> None:
    selection, candidates = data.selections[role], data.candidates
    logger.log_metrics(selection_metrics(selection, candidates))
    tracker.summarise(logger, _decisions(decisions.of_selection(selection)))
    if not isinstance(tracker, Wandb):
        return
    rows = trajectory_rows(candidates, selection)
    if tracker.text:
        _add_texts(rows, data)
    for row in rows:
        del row["row"]
    tracker.tabulate(logger, {"tables/trajectories": rows})
    whole = ("selection.json", *(("selection.jsonl", "dataset_info.json") if tracker.text else ()))
    written = {} if tracker.text else {"selection.jsonl": without_text(folder / "selection.jsonl")}
    about = {
        "rule": selection.record["rule"],
        "trajectories": len(selection.row),
        "tokens": selection.record["tokens"],
        "texts": tracker.text,
    }
    name = f"selection-{role}-{folder.name}"
    tracker.keep_selection(logger, name, [folder / file for file in whole], written=written, about=about)


def selection_metrics(selection: Selection, candidates: Candidates) -> dict[str, float]:
    """Counts, and what the score goes along with (Spearman's correlation within problems); shares from 0 to 1."""
    record, counts = selection.record, selection.record["counts"]
    correct_N = candidates["correct"].astype(np.float64)[shares(candidates, selection) > 0]
    known_N = np.isfinite(correct_N)
    spearman = record["within_problem_spearman"]
    figures: dict[str, Any] = {
        "trajectories": counts["chosen"],
        "of_candidates": counts["candidates"],
        "tokens": record["tokens"],
        "effective_sample_size": record["effective_sample_size"],
        "largest_weight": float(selection.weight.max()),
        "largest_teacher_share": max(record["teacher_share"].values()),
        "correct_share": correct_N[known_N].mean() if known_N.any() else None,
        "problems_without_choice": counts["problems_without_choice"],
        "dropped_by_filter": counts["dropped_by_filter"],
        "dropped_without_score": counts["dropped_without_score"],
        "short_of_selector": counts.get("short_of_selector", 0),
        "score_with_loss": spearman.get("loss"),
        "score_with_length": spearman.get("num_tokens"),
    }
    return {f"selection/{key}": math.nan if value is None else float(value) for key, value in figures.items()}


def trajectory_rows(candidates: Candidates, selection: Selection, *, limit: int = ROWS) -> list[dict[str, Any]]:
    """Of every teacher the candidates with the highest and the lowest scores, as many of each; at most `limit` rows in
    all, those of the teachers with the most candidates. `row` is the row's number in the pool.
    """
    score_N, weight_N = selection.score_N, np.zeros(len(candidates))
    weight_N[np.searchsorted(candidates.row_N, selection.row)] = selection.weight
    loss_N = candidates["loss"] if "loss" in candidates.statistics else np.full(len(candidates), np.nan)
    teacher_N = np.array([str(teacher) for teacher in candidates["teacher"]])
    names, counts = np.unique(teacher_N[np.isfinite(score_N)], return_counts=True)
    each = max(1, limit // (2 * max(1, len(names))))
    rows: list[dict[str, Any]] = []
    for name in names[np.argsort(-counts, kind="stable")][:limit].tolist():
        of_teacher = np.flatnonzero((teacher_N == name) & np.isfinite(score_N))
        ordered = of_teacher[np.argsort(-score_N[of_teacher], kind="stable")].tolist()
        best = ordered[:each]
        worst = ordered[len(best) :][::-1][:each]
        for end, part in (("best", best), ("worst", worst)):
            for i in part:
                known = candidates["correct"][i]
                rows.append(
                    {
                        "row": int(candidates.row_N[i]),
                        "teacher": name,
                        "end": end,
                        "score": float(score_N[i]),
                        "weight": float(weight_N[i]),
                        "loss": float(loss_N[i]) if math.isfinite(loss_N[i]) else None,
                        "tokens": int(candidates["num_tokens"][i]),
                        "correct": None if known is None or math.isnan(known) else bool(known),
                        "problem_id": str(candidates.problem_id[i]),
                        "candidate_id": str(candidates.candidate_id[i]),
                    }
                )
    return rows[:limit]


def _add_texts(rows: Sequence[dict[str, Any]], data: TrajectoryDataModule) -> None:
    numbers = sorted({row["row"] for row in rows})
    texts = dict(zip(numbers, data.trajectories.read_rows(np.array(numbers, np.int64)), strict=True))
    for row in rows:
        *prompt, last = texts[row["row"]]["messages"]
        row["prompt"] = "\n\n".join(message["content"] for message in prompt)
        row["trajectory"] = last["content"]


def without_text(path: Path) -> Iterator[str]:
    """The lines of a selection.jsonl with ids, weights and scores, and without messages and answers."""
    kept = ("problem_id", "candidate_id", "teacher", "correct", "rule", "score", "share")
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            meta = {key: row["meta"][key] for key in kept}
            yield json.dumps({"weight": row["weight"], "meta": meta}, ensure_ascii=False) + "\n"
