"""Write diagnostics.json, its tables as diagnostics-*.csv, its figures as one flat dict, and lines for the log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lark.common.cache import write_json, write_text
from lark.common.log import announce, logger
from lark.selection.within_problem import Mean


def write_diagnostics(folder: Path, found: Mapping[str, Any]) -> None:
    """Write diagnostics.json and the tables beside it."""
    write_json(folder / "diagnostics.json", to_plain(found))
    for name, rows in list_tables(found).items():
        write_table(folder / f"diagnostics-{name}.csv", rows)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file, a mapping a row."""
    text = pd.DataFrame.from_records(list(rows)).to_csv(index=False, lineterminator="\n")
    assert isinstance(text, str)
    write_text(path, text)


def to_plain(value: Any) -> Any:
    """Convert figures to what JSON takes: a `Mean` becomes its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def flatten_figures(found: Mapping[str, Any], prefix: str = "diagnostics") -> dict[str, float]:
    """List every figure that is one finite number by its path: diagnostics/correlations/lark/loss/within, ... Of a
    `Mean` the mean; lists and settings are left out.
    """
    figures: dict[str, float] = {}
    for key, value in found.items():
        name = f"{prefix}/{str(key).replace(' ', '_')}"
        value = value.mean if isinstance(value, Mean) else value
        if isinstance(value, Mapping) and key != "settings":
            figures |= flatten_figures(value, name)
        elif isinstance(value, int | float | np.number) and math.isfinite(value):
            figures[name] = float(value)
    return figures


def list_tables(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """List the tables by name, a dict a row."""
    chosen = [(role, one["rule"], one) for role, one in found.get("selections", {}).items()]
    bins = found.get("bins", {}).get("rows", [])
    accuracies = [{f"accuracy_{name}": value for name, value in row["accuracy"].items()} for row in bins]
    tables = {
        "overlaps": found.get("overlaps", []),
        "correlations": _list_means(found.get("correlations", {}), ("score", "with", "over")),
        "fidelity": _list_means(found.get("fidelity", {}).get("proxies", {}), ("score", "truth", "figure")),
        "teachers": [
            {"selection": role, "rule": rule, "teacher": teacher, **row}
            for role, rule, one in chosen
            for teacher, row in one["teachers"].items()
        ],
        "coverage": [
            {"selection": role, "rule": rule, "difficulty": measure, **row}
            for role, rule, one in chosen
            for measure, rows in one["coverage"].items()
            for row in rows
        ],
        "bins": [
            {key: value for key, value in row.items() if key != "accuracy"} | accuracy
            for row, accuracy in zip(bins, accuracies, strict=True)
        ],
    }
    return {name: rows for name, rows in tables.items() if rows}


def _list_means(nested: Mapping[str, Any], names: tuple[str, str, str]) -> list[dict[str, Any]]:
    """List the `Mean`s of a mapping three levels deep, whose levels have these names."""
    return [
        {**dict(zip(names, (first, second, third), strict=True)), **asdict(mean)}
        for first, seconds in nested.items()
        for second, thirds in seconds.items()
        for third, mean in thirds.items()
    ]


# ---- the log


def log_selections(found: Mapping[str, Any]) -> None:
    """Log how scores correlate and what was chosen."""
    table = {
        score: {target: str(kinds["within"]) for target, kinds in targets.items()}
        for score, targets in found["correlations"].items()
    }
    counts = f"{found['problems']:,} problems, {found['candidates']:,} candidates"
    logger.info("rank correlations within problems [95%% interval], %s\n%s", counts, _format_table(table))
    for role, one in found["selections"].items():
        weights = one["concentration"]
        shares = ", ".join(f"{name} {row['share']:.0%} ({row['chance']:.0%})" for name, row in one["teachers"].items())
        logger.info("%s: teachers (of a random choice) %s", role, shares)
        logger.info(
            "%s: effective size %.0f of %s trajectories, %.2f a problem; chi2 to the pool %.2f a problem",
            role,
            weights["effective_sample_size"],
            f"{weights['chosen']:,}",
            weights["effective_within_problem"].mean,
            weights["chi2_within_problem"].mean,
        )
    selector = found["selections"]["selector"]
    pairs = [row for row in found["overlaps"] if selector["score"] in (row["a"], row["b"]) and row["problems"]]
    named = [(row["b"] if row["a"] == selector["score"] else row["a"], row) for row in pairs]
    shown = ", ".join(f"{name} {row['mean']:.2f}" for name, row in sorted(named, key=lambda pair: -pair[1]["mean"]))
    if pairs:
        logger.info("selector: overlap (Jaccard, chance %.2f) with %s", pairs[0]["chance"], shown)


def log_fidelity(found: Mapping[str, Any]) -> None:
    """Log each score beside the truth; warn where the step of the loss drops was too large."""
    step, kappa, proxies = found["step"], found["kappa"], found["proxies"]
    announce(
        "fidelity",
        f"{found['candidates']:,} trajectories of {found['problems']:,} problems; rank correlation with the true loss "
        "drop: " + ", ".join(f"{name} {proxies[name]['loss_drop']['spearman'].mean:+.2f}" for name in ("rho", "lark")),
    )
    table = {
        name: {f"exact {true}": f"{kinds['spearman']} {kinds['overlap'].mean:.2f}" for true, kinds in by_truth.items()}
        for name, by_truth in proxies.items()
    }
    top = proxies["rho"]["loss_drop"]["overlap"]
    what = f"rank correlation within problems [95% interval] and overlap of the top {found['budget']}"
    logger.info("%s (chance %.2f)\n%s", what, top.chance, _format_table(table))
    if "mean" in kappa:
        power, shown = kappa["exponent_within_problems"], (kappa["mean"], kappa["cv"])
        logger.info("kappa: mean %.3g, coefficient of variation %.2f, power of the length %s", *shown, power)
    if not step["passed"]:
        logger.warning(
            "only %.0f%% of the loss drops stay within %.0f%% when the step is halved: lower diagnostics.eta=%g, or "
            "compare with rho, its limit",
            *(100 * step["share_within"], 100 * step["tolerance"], step["eta"]),
        )


def log_curves(curves: Mapping[str, Mapping[str, Any]]) -> None:
    """Log how fast each arm's held-out loss falls beside the baseline's."""
    for name, one in curves.items():
        if "area_ratio" in one and name != "baseline":
            logger.info(
                "%s (%s): area under the held-out loss %.3f of the baseline's, whose end it reaches after %.0f steps",
                *(name, one["rule"], one["area_ratio"], one["steps_to_baseline"]),
            )


def log_bins(found: Mapping[str, Any]) -> None:
    """Log what the students trained on the bins of the score came to."""
    rows, trend = found["rows"], found["trends"]["held_out_loss"]
    losses = " ".join(f"{row['held_out_loss']:.3f}" for row in rows)
    correlated = f" (rank correlation {trend['spearman']:+.2f}, p {trend['p']:.2f})"
    announce(
        "bins",
        f"held-out loss by bin of {found['rule']}'s score, lowest first: {losses}"
        + (correlated if math.isfinite(trend["spearman"]) else ""),
    )
    logger.info("bins\n%s", pd.DataFrame(list_tables({"bins": found})["bins"]).to_string(index=False))


def _format_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    return pd.DataFrame(list(rows.values()), index=list(rows)).to_string()
