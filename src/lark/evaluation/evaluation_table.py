"""Print the metrics of an evaluation as a table."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lark.comparison.printing import make_console, make_table
from lark.comparison.tables import FEW_PROBLEMS, TOO_FEW, describe_samples, format_number

LEGEND = (
    "Shares in percent; avg with its 95% bootstrap interval over problems, which covers the choice of problems and the "
    "noise of sampling, not the wording of prompts. tokens: mean of a sample."
)


def print_metrics(title: str, figures: Mapping[str, Any]) -> None:
    """Print what `Evaluator.evaluate` returns, a row a set, and one for each of its levels."""
    console, table = make_console(), make_table(title)
    first = next(iter(figures["metrics"].values()))
    metrics = [name for name in first if "@" in name and name != "pass@1"]  # pass@1 is avg@k
    table.add_column("set")
    for header in ("problems", *metrics, "boxed", "stop", "trunc.", "time-\nouts", "tokens"):
        table.add_column(header, justify="right", no_wrap=True)
    for label, of_set, interval, ends in _list_rows(figures):
        shares = [format_number(of_set[name], "{:.1%}") for name in (*metrics, "boxed", "stop", "truncated")]
        shares[0] += _format_ends(interval)
        table.add_row(
            label,
            f"{of_set['problems']:,}",
            *shares,
            f"{of_set['timeouts']:,}",
            format_number(of_set["tokens"], "{:,.0f}"),
            end_section=ends,
        )
    console.print(table)
    for text in _explain(figures):
        console.print(text, soft_wrap=True)
    console.print(LEGEND)


def _list_rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float], Mapping[str, Any], bool]]:
    for name, metrics in figures["metrics"].items():
        levels = figures["levels"].get(name, {})
        yield name, metrics, figures["intervals"][name], not levels
        for level, part in levels.items():
            yield f"  level {level}", part["metrics"], part["interval"], level == list(levels)[-1]


def _format_ends(interval: Mapping[str, Any]) -> str:
    low, high = (format_number(_read_number(interval[end]) * 100, "{:.1f}") for end in ("low", "high"))
    return f" [{low}, {high}]" if low else ""


def _explain(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the figures do not say by themselves."""
    for name, metrics in figures["metrics"].items():
        interval = figures["intervals"][name]
        for text in describe_samples([metrics]):
            yield f"{name}: {text}"
        if interval["label"] or interval["problems"] < FEW_PROBLEMS:
            yield f"{name}: {interval['label'] or TOO_FEW}"
        if metrics["timeouts"] or metrics["oversized"]:
            cut, large = metrics["timeouts"], metrics["oversized"]
            yield f"{name}: wrong are also {cut:,} checks that were cut off, {large:,} answers too long to be checked"


def _read_number(figure: float | None) -> float:
    """Read a null of metrics.json as NaN, which JSON has not."""
    return math.nan if figure is None else figure
