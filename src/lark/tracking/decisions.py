"""What a run decided by itself, or counted, as flat values: the same names whatever the rule and the task.

All of it is printed too, or stands in a manifest; where something was not asked or does not apply the value says so, or
is NaN. Nothing is quoted from the pool.
"""

import math
from collections.abc import Callable, Iterator, Mapping
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
"""Of a pass: run | reuse."""

NONE = "none"
_CHOICES = {"prompts": "prompts", "statistics": "compiled", "out of memory": "out_of_memory"}
"""What a pass chooses by itself (`StatisticsModule.choices`) in words, and the value's name."""
_TRAINING = (
    *("micro_batch_tokens", "steps", "halvings", "row_tokens", "computed_tokens", "trained_tokens"),
    *("trained_tokens_per_s", "step_seconds", "memory_gb"),
)


def of_run(data: TrajectoryDataModule, taken: Taken) -> dict[str, Any]:
    """Of pool, dtype and passes, which all arms of a run have in common."""
    device = data.make_trainer("").strategy.root_device
    return {
        "scorer": data.scorer.name,
        "dtype_scoring": str(data.scorer.resolve_dtype(device)).removeprefix("torch."),
        "dtype_sampling": data.dtype.removeprefix("torch."),
        "precision": data.precision,
        "device": device.type,
        **_of_pool(data),
        **_of_passes(data, taken),
    }


def _of_pool(data: TrajectoryDataModule) -> dict[str, Any]:
    pool, dropped = data.trajectories, {reason: count for reason, count in data.dropped.items() if count}
    _, sizes = np.unique(pool.problem_id.astype(str), return_counts=True)
    return {
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
    }


def _of_passes(data: TrajectoryDataModule, taken: Taken) -> dict[str, Any]:
    manifest = data.costs.get(Statistics())
    needed = {need: taken(need) for need in data.needs}
    return {
        "passes": ", ".join(f"{need.name}: {action}" for need, action in needed.items()) or NONE,
        "cache_hits": sum(action == "reuse" for action in needed.values()),
        "statistics": needed.get(Statistics(), "not needed"),
        **{f"statistics_{name}": value for name, value in of_pass(manifest or {}).items()},
    }


def of_pass(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Of one pass of the student."""
    choices = manifest.get("choices", {})
    return {
        "tokens_at_a_time": choices.get("tokens at a time", math.nan),
        **{name: choices.get(key, NONE) for key, name in _CHOICES.items()},
    }


def of_selection(selection: Selection) -> dict[str, Any]:
    """What a rule and its policy decided, as words: they differ from rule to rule."""
    record = selection.record
    said = {**record["decisions"], **{key: value for key, value in record["policy"].items() if value is not None}}
    return {"rule": record["rule"], "policy": _words(said), "matched": _yes(bool(record["matched"]))}


def _yes(value: bool | None) -> str:
    return NONE if value is None else "yes" if value else "no"


def _words(values: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {_short(value)}" for key, value in values.items()) or NONE


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def of_arm(arm: Arm, action: str) -> dict[str, Any]:
    """How an arm was trained and evaluated, as its folder has it. action: train | evaluate | reuse."""
    trained = _read(arm.folder / "trained.json")
    training = trained.get("training", {})
    end, evaluation = _read(arm.folder / RECORD), _read(arm.folder / "evaluation.json")
    engine, sampling = evaluation.get("engine", {}), evaluation.get("sampling", {})
    return {
        "action": action,
        "lr": arm.recipe.lr if arm.selection is not None else math.nan,
        "unpacked_reason": training.get("unpacked_reason") or NONE,
        **{name: training.get(name, math.nan) for name in _TRAINING},
        "training_seconds": trained.get("seconds", math.nan),
        "end_token": end.get("token", NONE),
        "end_token_trained": _yes(end.get("head_trained")),
        "end_token_ceiling": end.get("ceiling", math.nan),
        "without_end_token": end.get("without_end", math.nan),
        "engine": engine.get("engine", NONE),
        "engine_dtype": engine.get("dtype", NONE),
        "engine_batch_size": sampling.get("batch_size") or math.nan,
        "stops": ", ".join(evaluation.get("stops", ())) or NONE,
    }


def of_rates(arms: Mapping[str, tuple[str, float]]) -> Iterator[tuple[str, Any]]:
    """Rule and learning rate by role, as pairs of name and value; what a run has no arm for is there too."""
    for role in ("selector", "baseline"):
        rule, rate = arms.get(role, (NONE, math.nan))
        yield f"{role}_rule", rule
        yield f"{role}_lr", rate


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
