"""summary.json: the figures of one run, from its arms' folders."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from lark.common.cache import read_json
from lark.comparison.inference import compute_paired_difference, compute_smallest_detectable
from lark.scoring.passes import COST_COLUMNS
from lark.training.arms import Arm, read_held_out_at_start
from lark.training.datamodule import TrajectoryDataModule

_ELSEWHERE = ("paths", "logger", "trainer", "stop_after", "seed", "diagnostics")
"""Settings that tell no two runs of a comparison apart, or have a place of their own in the summary."""


def settings(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """Every setting that may tell two runs apart, by its dotted name."""

    def leaves(name: str, node: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from leaves(f"{name}.{key}" if name else str(key), value)
        else:
            yield name, node

    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    yield from leaves("", {key: value for key, value in plain.items() if key not in _ELSEWHERE})


def summarise_run(
    config: DictConfig,
    arms: list[Arm],
    figures: dict[str, dict[str, Any]],
    data: TrajectoryDataModule,
    actions: dict[str, str],
) -> dict[str, Any]:
    """summary.json: everything the table and a later report need; `figures` are the arms' `read_figures`."""
    sets = list(figures[arms[0].name]["metrics"])
    summary: dict[str, Any] = {
        "status": "finished",
        "task": config.task.name,
        "model": config.model.name,
        "seed": config.seed,
        "selector": config.selector.name,
        "baseline": config.baseline.name,
        "settings": dict(settings(config)),
        "passes": {
            data.pass_folder(wanted).name: {"pass": wanted.name} | {k: v for k, v in cost.items() if k != "identity"}
            for wanted, cost in data.costs.items()
        },
        "difference_of": [],
        "sets": {name: {} for name in sets},
        "arms": {},
    }
    start = read_held_out_at_start(arms)
    for arm in arms:
        trained = read_json(arm.folder / "trained.json") if arm.selection is not None else None
        curve = [start] if trained is None else trained["curve"]
        at_end = start if trained is None else trained["held_out"].get("end", {})
        record = arm.selection.record if arm.selection is not None else {}
        summary["arms"][arm.name] = {
            "rule": arm.rule,
            "hash": arm.folder.name,
            "action": actions[arm.name],
            "matched": record.get("matched", True),
            "lr": arm.recipe.lr if arm.selection is not None else None,
            "cost": data.cost_of(data.rules[arm.name]) if arm.name in data.rules else dict.fromkeys(COST_COLUMNS, 0),
            "trajectories": record["counts"]["chosen"] if record else 0,
            "tokens": record.get("tokens", 0),
            "effective_sample_size": record.get("effective_sample_size", 0.0),
            "held_out_loss": at_end.get("held_out/loss"),
            "held_out_loss_correct": at_end.get("held_out/loss_correct"),
            "curve": curve,
            "selection": record,
            **figures[arm.name],
        }
    shown = [f"avg@{config.evaluation.samples}", f"pass@{max(config.evaluation.pass_at)}"] if sets else []
    names = [arm.name for arm in arms]
    first, second = "selector", "baseline" if "baseline" in names else "before"
    summary["difference_of"] = [first, second]
    for name in sets:
        summary["sets"][name]["metrics"] = shown
        a, b = (summary["arms"][arm]["per_problem"][name] for arm in (first, second))
        keys = sorted(a)
        interval = compute_paired_difference(np.array([[a[k] for k in keys]]), np.array([[b[k] for k in keys]]))
        summary["sets"][name]["difference"] = {
            **vars(interval),
            "smallest_detectable": compute_smallest_detectable(interval.standard_error, df=interval.df),
        }
    return summary
