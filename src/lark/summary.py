"""summary.json: the figures of one run, from its arms' folders."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from lark.arms import Arm, held_out_at_start
from lark.cache import read_json
from lark.data import TrajectoryDataModule
from lark.evaluate import per_problem
from lark.inference import paired_difference, smallest_detectable_difference


def summarise_run(
    config: DictConfig, arms: list[Arm], sets: list[str], data: TrajectoryDataModule, actions: dict[str, Any]
) -> dict[str, Any]:
    """summary.json: everything the table and a later report need, per-problem accuracies included."""
    summary: dict[str, Any] = {
        "status": "finished",
        "task": config.task.name,
        "model": config.model.name,
        "seed": config.seed,
        "selector": config.selector.name,
        "baseline": config.baseline.name,
        "scoring": data.cost,
        "difference_of": [],
        "sets": {name: {} for name in sets},
        "arms": {},
    }
    start = held_out_at_start(data, arms)
    for arm in arms:
        metrics = read_json(arm.folder / "metrics.json")["sets"] if sets else {}
        curve = [start] if arm.selection is None else read_json(arm.folder / "trained.json")["curve"]
        record = arm.selection.record if arm.selection is not None else {}
        summary["arms"][arm.name] = {
            "rule": arm.rule,
            "hash": arm.folder.name,
            "action": actions[arm.name]["action"],
            "matched": record.get("matched", True),
            "trajectories": record["counts"]["chosen"] if record else 0,
            "tokens": record.get("tokens", 0),
            "effective_sample_size": record.get("effective_sample_size", 0.0),
            "held_out_loss": curve[-1].get("held_out/loss") if curve else None,
            "held_out_loss_correct": curve[-1].get("held_out/loss_correct") if curve else None,
            "curve": curve,
            "metrics": metrics,
            "per_problem": {
                name: {key: float(np.mean(values)) for key, values in per_problem(_samples(arm, name)).items()}
                for name in sets
            },
        }
    shown = [f"avg@{config.evaluation.samples}", f"pass@{max(config.evaluation.pass_at)}"] if sets else []
    names = [arm.name for arm in arms]
    first, second = "selector", "baseline" if "baseline" in names else "before"
    summary["difference_of"] = [first, second]
    for name in sets:
        summary["sets"][name]["metrics"] = shown
        a, b = (summary["arms"][arm]["per_problem"][name] for arm in (first, second))
        keys = sorted(a)
        interval = paired_difference(np.array([[a[k] for k in keys]]), np.array([[b[k] for k in keys]]))
        summary["sets"][name]["difference"] = {
            **vars(interval),
            "smallest_detectable": smallest_detectable_difference(interval.standard_error),
        }
    return summary


def _samples(arm: Arm, name: str) -> Path:
    return arm.folder / f"samples-{name}.jsonl"
