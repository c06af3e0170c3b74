"""summary.json of runs as lark.run writes them, in small: for tests of what is made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    compared = {name: {"metrics": ["avg@4", "pass@4"]} for name in sets}
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


def sweep(
    *,
    sets: Sequence[str] = ("eval",),
    baselines: Sequence[str] = ("random", "rsr"),
    budgets: Sequence[int] = (2,),
    seeds: Sequence[int] = (0, 1, 2),
    problems: int = 40,
    **more: Any,
) -> list[dict[str, Any]]:
    """Runs in which lark is ahead by a quarter on every problem."""

    def of_sets(value: float) -> Accuracies:
        return {name: accuracies([value] * problems)["eval"] for name in sets}

    cost = {"forward_tokens": 12345678, "backward_tokens": 0, "seconds": 76.5}
    return [
        run(
            selector=arm("lark", f"a{budget}{seed}", of_sets(0.5), cost=cost, held_out_loss=1.5),
            baseline=arm(rule, f"{rule}{budget}{seed}", of_sets(0.25)),
            seed=seed,
            settings={"budget": budget, "sft.lr": 1e-4},
            **more,
        )
        for seed in seeds
        for budget in budgets
        for rule in baselines
    ]
