"""summary.json of runs as lark.run writes them, in small: for tests of what is made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lark.comparison.inference import paired_difference, smallest_detectable_difference

Accuracies = dict[str, dict[str, float | None]]
"""By evaluation set and problem."""


def accuracies(values: Sequence[float | None], name: str = "eval") -> Accuracies:
    return {name: {str(problem): value for problem, value in enumerate(values)}}


def arm(rule: str, hash: str, accuracy: Accuracies, **more: Any) -> dict[str, Any]:
    """An arm's part; one of the same hash is the same student."""
    means = {name: float(np.mean([x for x in of_set.values() if x is not None])) for name, of_set in accuracy.items()}
    trained = (
        {} if rule == "before" else {"trajectories": 123456, "tokens": 98765432, "effective_sample_size": 100345.6}
    )
    return {
        "rule": rule,
        "hash": hash,
        "matched": rule != "all",
        "lr": None if rule == "before" else 1e-4,
        "cost": {"forward_tokens": 0, "backward_tokens": 0, "seconds": 0.0},
        "trajectories": 0,
        "tokens": 0,
        "effective_sample_size": 0.0,
        "held_out_loss": 2.0,
        "held_out_loss_correct": 2.0,
        "curve": [{"step": 0, "held_out/loss": 3.0}, {"step": 10, "held_out/loss": 2.0}],
        "per_problem": accuracy,
        "metrics": {n: {"avg@4": mean, "pass@4": mean + 0.1, "stop": 0.9, "boxed": 0.9} for n, mean in means.items()},
        **trained,
        **more,
    }


def run(
    *,
    selector: Mapping[str, Any],
    baseline: Mapping[str, Any] | None = None,
    before: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A finished run of these arms, compared over the problems of the selector's."""
    sets = selector["per_problem"]
    untrained = arm("before", f"before-{seed}", {name: dict.fromkeys(of_set, 0.0) for name, of_set in sets.items()})
    arms = {"before": before or untrained, **({"baseline": baseline} if baseline else {}), "selector": selector}
    other = arms["baseline" if baseline else "before"]["per_problem"]
    compared = {}
    for name, of_set in sets.items():
        common = [key for key in of_set if of_set[key] is not None and other[name].get(key) is not None]
        interval = paired_difference(
            *(np.array([[x[name][key] for key in common]], float) for x in (sets, other)), resamples=200
        )
        smallest = smallest_detectable_difference(interval.standard_error)
        difference = vars(interval) | {"smallest_detectable": smallest}
        compared[name] = {"metrics": ["avg@4", "pass@4"], "difference": difference}
    return {
        "status": "finished",
        "folder": "logs/runs/one",
        "task": "arithmetic",
        "model": "tiny",
        "seed": seed,
        "settings": settings or {},
        "difference_of": ["selector", "baseline" if baseline else "before"],
        "arms": arms,
        "sets": compared,
        **more,
    }
