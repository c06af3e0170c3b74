"""diagnostics.json, its tables as diagnostics-*.csv, and its figures as one flat dict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lark.common.cache import write_text
from lark.selection.within_problem import Mean


def plain(value: Any) -> Any:
    """As JSON takes it: a `Mean` becomes its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def flat(found: Mapping[str, Any], prefix: str = "diagnostics") -> dict[str, float]:
    """Every figure that is one finite number, by its path: diagnostics/correlations/lark/loss/within, ... Of a `Mean`
    the mean; lists and settings are left out.
    """
    figures: dict[str, float] = {}
    for key, value in found.items():
        name = f"{prefix}/{str(key).replace(' ', '_')}"
        if key in ("settings", "seconds"):
            continue
        value = value.mean if isinstance(value, Mean) else value
        if isinstance(value, Mapping):
            figures |= flat(value, name)
        elif isinstance(value, int | float | np.number) and math.isfinite(value):
            figures[name] = float(value)
    return figures


def tables(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables by name, a dict a row."""
    found_tables: dict[str, list[dict[str, Any]]] = {"overlaps": found.get("overlaps", [])}
    found_tables["correlations"] = [
        {"score": score, "with": target, "over": kind, **asdict(mean)}
        for score, targets in found.get("correlations", {}).items()
        for target, kinds in targets.items()
        for kind, mean in kinds.items()
    ]
    found_tables["fidelity"] = [
        {"score": score, "truth": true, "figure": kind, **asdict(mean)}
        for score, of in found.get("fidelity", {}).get("proxies", {}).items()
        for true, kinds in of.items()
        for kind, mean in kinds.items()
    ]
    chosen = found.get("selections", {})
    found_tables["teachers"] = [
        {"selection": role, "rule": one["rule"], "teacher": teacher, **row}
        for role, one in chosen.items()
        for teacher, row in one["teachers"].items()
    ]
    found_tables["coverage"] = [
        {"selection": role, "rule": one["rule"], "difficulty": measure, **row}
        for role, one in chosen.items()
        for measure, rows in one["coverage"].items()
        for row in rows
    ]
    return {name: rows for name, rows in found_tables.items() if rows}


def levelled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A bin's row with each set's accuracy as a column."""
    accuracies = {f"accuracy_{name}": value for name, value in row["accuracy"].items()}
    return {key: value for key, value in row.items() if key != "accuracy"} | accuracies


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = pd.DataFrame.from_records(list(rows)).to_csv(index=False, lineterminator="\n")
    assert isinstance(text, str)
    write_text(path, text)
