"""Reads finished runs and prints the comparison: python -m lark.report <run or multirun folders>.

Imports nothing heavy at the top: Hydra creates the callback below before every run.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from lark.cache import read_json


def read_summaries(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Every summary.json in or below the folders, by path. ValueError when there is none."""
    paths = sorted({path for folder in folders for path in folder.rglob("summary.json")})
    if not paths:
        shown = ", ".join(map(str, folders))
        raise ValueError(f"no summary.json in or below {shown}; name the folder of a finished run or multirun")
    return [read_json(path) | {"folder": str(path.parent)} for path in paths]


def print_comparison(summary: dict[str, Any]) -> None:
    """The table of one run: the student before training, the baseline's arm, the selector's, their difference."""
    from rich.console import Console
    from rich.table import Table

    sets = list(summary["sets"])
    table = Table(title=f"{summary['task']} · {summary['model']} · seed {summary['seed']}", title_justify="left")
    table.add_column("student")
    for name in ("trajectories", "tokens", "eff. size", "held-out loss"):
        table.add_column(name, justify="right")
    for name in sets:
        for metric in summary["sets"][name]["metrics"]:
            table.add_column(f"{name}\n{metric}", justify="right")
    for name, arm in summary["arms"].items():
        table.add_row(*_cells(name, arm, summary), end_section=name == list(summary["arms"])[-1])
    for name in sets:
        difference = summary["sets"][name].get("difference")
        if difference:
            table.add_row(*_difference_cells(name, difference, summary, len(sets)))
    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    console.print(table)
    for name in sets:
        difference = summary["sets"][name].get("difference")
        if difference:
            console.print(f"{name}: {_reading(difference, summary)}", soft_wrap=True)


def _cells(name: str, arm: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    label = "before training" if name == "before" else f"{name}: {arm['rule']}"
    if name != "before" and not arm["matched"]:
        label += " (unmatched)"
    trained = name != "before"
    cells = [
        label,
        f"{arm['trajectories']:,}" if trained else "",
        f"{arm['tokens']:,}" if trained else "",
        f"{arm['effective_sample_size']:,.0f}" if trained else "",
        _number(arm.get("held_out_loss"), "{:.3f}"),
    ]
    for name_of_set, spec in summary["sets"].items():
        metrics = arm["metrics"].get(name_of_set, {})
        cells += [_number(metrics.get(metric), "{:.1%}") for metric in spec["metrics"]]
    return cells


def _difference_cells(name: str, difference: dict[str, Any], summary: dict[str, Any], sets: int) -> list[str]:
    low, high = 100 * difference["low"], 100 * difference["high"]
    first, second = difference["of"]
    cells = [f"{first} - {second}, {name}", "", "", "", ""]
    for other, spec in summary["sets"].items():
        shown = f"{100 * difference['estimate']:+.1f}\n[{low:+.1f}, {high:+.1f}]" if other == name else ""
        cells += [shown] + [""] * (len(spec["metrics"]) - 1)
    return cells


def _reading(difference: dict[str, Any], summary: dict[str, Any]) -> str:
    """The difference in words."""
    first, second = difference["of"]
    low, high = 100 * difference["low"], 100 * difference["high"]
    verdict = "the interval excludes 0" if low > 0 or high < 0 else "the interval includes 0: not told apart"
    note = f" ({difference['label']})" if difference["label"] else ""
    return (
        f"{first} - {second} = {100 * difference['estimate']:+.1f} points, "
        f"{difference['level']:.0%} interval [{low:+.1f}, {high:+.1f}] over {difference['problems']} problems{note}; "
        f"{verdict}; smallest detectable difference {100 * difference['smallest_detectable']:.1f}"
    )


def _number(value: Any, form: str) -> str:
    return "" if value is None or math.isnan(value) else form.format(value)


class ComparisonCallback(Callback):
    """Prints every job's table at the end of a multirun, and exits 1 if a job failed."""

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        summaries = read_summaries([Path(config.hydra.sweep.dir)])
        failed = [summary for summary in summaries if summary["status"] == "failed"]
        for summary in summaries:
            if summary["status"] == "finished":
                print_comparison(summary)
        for summary in failed:
            print(f"failed: {summary['folder']}: {summary['error']}", file=sys.stderr)
        if failed:
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lark.report", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished runs or multiruns")
    try:
        for summary in read_summaries(parser.parse_args().folders):
            if summary["status"] == "finished" and summary.get("sets"):
                print_comparison(summary)
            else:
                print(f"{summary['folder']}: {summary['status']} {summary.get('error', '')}")
    except (ValueError, OSError) as error:
        sys.exit(f"lark: {error}")


if __name__ == "__main__":
    main()
