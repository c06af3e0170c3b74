"""Collect what a run decided by itself, or counted, as flat values: the same names whatever the rule and the task.

All of it stands in a manifest too. Where something was not asked or does not apply, the value is "none" or NaN. Nothing
is quoted from the pool.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lark.common.cache import read_json
from lark.scoring.passes import Pass, Statistics
from lark.selection.selection import Selection
from lark.training.arms import Arm
from lark.training.datamodule import TrajectoryDataModule
from lark.training.end_token import RECORD

Taken = Callable[[Pass], str]
"""Says whether a pass was run or reused: "run" | "reuse"."""

NONE = "none"
_TRAINING = (
    *("micro_batch_tokens", "steps", "halvings", "row_tokens", "computed_tokens", "trained_tokens"),
    *("trained_tokens_per_s", "step_seconds", "memory_gb"),
)


def collect_run_decisions(data: TrajectoryDataModule, taken: Taken) -> dict[str, Any]:
    """Collect what all arms of a run have in common: student, dtypes, pool, passes."""
    device = data.make_trainer("").strategy.root_device
    pool, dropped = data.trajectories, {reason: count for reason, count in data.dropped.items() if count}
    _, sizes = np.unique(pool.problem_id.astype(str), return_counts=True)
    actions = {need: taken(need) for need in data.needs}
    statistics = collect_pass_decisions(data.costs.get(Statistics(), {}))
    return {
        "scorer": data.scorer.name,
        "dtype_scoring": str(data.scorer.resolve_dtype(device)).removeprefix("torch."),
        "dtype_sampling": data.dtype.removeprefix("torch."),
        "precision": data.precision,
        "device": device.type,
        "pool_trajectories": len(pool.rows),
        "pool_problems": len(sizes),
        "pool_scored": len(data.scored),
        "pool_held_out": int(pool.is_held_out.sum()),
        "pool_dropped": sum(dropped.values()),
        "pool_dropped_for": ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or NONE,
        "pool_truncated": pool.truncated,
        "pool_known_wrong": int((pool.correct == 0).sum()),
        "pool_verdicts_filled": pool.verdicts["filled"],
        "pool_verdicts_timed_out": pool.verdicts["timed_out"],
        "pool_single_candidates": int((sizes == 1).sum()),
        "pool_repeated_problems": sum(map(len, pool.repeated)) - len(pool.repeated),
        "pool_in_evaluation": sum(found["in_pool"] for found in pool.overlaps.values()),
        "passes": ", ".join(f"{need.name}: {action}" for need, action in actions.items()) or NONE,
        "cache_hits": sum(action == "reuse" for action in actions.values()),
        "statistics": actions.get(Statistics(), "not needed"),
        **{f"statistics_{name}": value for name, value in statistics.items()},
    }


def collect_pass_decisions(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what a pass of the student chose by itself, from its manifest (empty: there was none)."""
    choices = manifest.get("choices", {})
    return {
        "tokens_at_a_time": choices.get("tokens at a time", math.nan),
        "prompts": choices.get("prompts", NONE),
        "compiled": choices.get("statistics", NONE),
        "out_of_memory": choices.get("out of memory", NONE),
    }


def collect_selection_decisions(selection: Selection) -> dict[str, Any]:
    """Collect what a rule and its policy decided; in words, as it differs from rule to rule."""
    record = selection.record
    found = record["decisions"] | {key: value for key, value in record["policy"].items() if value is not None}
    policy = "; ".join(f"{key}={value}" for key, value in found.items()) or NONE
    return {"rule": record["rule"], "policy": policy, "matched": "yes" if record["matched"] else "no"}


def collect_arm_decisions(arm: Arm, action: str, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Collect how an arm was trained, from its folder, and evaluated. action: train | evaluate | reuse. sampling: how
    its samples were drawn.
    """
    trained, end = (read_if_there(arm.folder / name) for name in ("trained.json", RECORD))
    training = trained.get("training", {})
    return {
        "action": action,
        "lr": arm.recipe.lr if arm.selection is not None else math.nan,
        "unpacked_reason": training.get("unpacked_reason") or NONE,
        **{name: training.get(name, math.nan) for name in _TRAINING},
        "training_seconds": trained.get("seconds", math.nan),
        "end_token": end.get("token", NONE),
        "end_token_trained": {True: "yes", False: "no", None: NONE}[end.get("head_trained")],
        "end_token_ceiling": end.get("ceiling", math.nan),
        "without_end_token": end.get("without_end", math.nan),
        "engine": sampling.get("engine", NONE),
        "engine_dtype": sampling.get("dtype", NONE),
        "engine_batch_size": sampling.get("batch_size") or math.nan,
        "stops": ", ".join(sampling.get("stops", ())) or NONE,
    }


def read_if_there(path: Path) -> dict[str, Any]:
    """Read a JSON file; an empty dict where there is none."""
    return read_json(path) if path.is_file() else {}
