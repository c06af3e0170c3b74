"""Reads finished runs and prints the comparison: python -m lark.report <run or multirun folders>.

Imports nothing heavy at the top: Hydra creates the callback below before every run.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from lark.cache import read_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FEW_PROBLEMS = 30
WIDTH = 100  # columns where there is no terminal
SETS_BESIDE_EACH_OTHER = 2


def read_summaries(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Every summary.json in or below the folders, by path, numbered jobs of a multirun in their order.

    Raises ValueError when there is none.
    """
    paths = {path for folder in folders for path in folder.rglob("summary.json")}
    if not paths:
        shown = ", ".join(map(str, folders))
        raise ValueError(f"no summary.json in or below {shown}; name the folder of a finished run or multirun")
    in_order = sorted(paths, key=lambda path: (str(path.parent.parent), path.parent.name.zfill(8)))
    return [read_json(path) | {"folder": str(path.parent)} for path in in_order]


def print_summaries(summaries: Sequence[dict[str, Any]]) -> None:
    """The table of every run that has one, a line for the others, and all differences together if there are several."""
    compared = [summary for summary in summaries if "arms" in summary]
    for summary in summaries:
        if summary in compared:
            print_comparison(summary)
        elif summary["status"] == "finished":
            print(f"{summary['folder']}: stopped after {summary['stopped_after']}, as it was told to")
    if len(compared) > 1:
        print_differences(compared)
    for summary in summaries:
        if summary["status"] == "failed":
            print(f"failed: {summary['folder']}: {summary['error']}", file=sys.stderr)


def print_comparison(summary: dict[str, Any]) -> None:
    """The table of one run: the student before training, the baseline's arm, the selector's, their difference."""
    console = _console()
    names = list(summary["sets"])
    for start in range(0, max(1, len(names)), SETS_BESIDE_EACH_OTHER):
        console.print(_comparison(summary, names[start : start + SETS_BESIDE_EACH_OTHER]))
    for name in names:
        console.print(f"{name}: {_reading(summary['sets'][name]['difference'])}", soft_wrap=True)
        for arm, figures in summary["arms"].items():
            if note := _form(figures["metrics"][name]):
                console.print(f"{name}, {arm}: {note}", soft_wrap=True)


def _comparison(summary: dict[str, Any], sets: list[str]) -> "Table":
    table = _table(f"{summary['task']} · {summary['model']} · seed {summary['seed']}")
    table.add_column("student")
    for name in ("trajec-\ntories", "trained\ntokens", "eff.\nsize", "held-out\nloss"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in sets:
        for metric in summary["sets"][name]["metrics"]:
            table.add_column(f"{name}\n{metric}", justify="right", no_wrap=True)
    arms = summary["arms"]
    for name, arm in arms.items():
        table.add_row(*_cells(name, arm, summary, sets), end_section=name == list(arms)[-1])
    first, second = summary["difference_of"]
    losses = [_value(arms[name]["held_out_loss"]) for name in (first, second)]
    cells = [f"{first} - {second}", "", "", "", _number(losses[0] - losses[1], "{:+.3f}")]
    for name in sets:
        others = len(summary["sets"][name]["metrics"]) - 1
        cells += [_estimate(summary["sets"][name]["difference"], "\n")] + [""] * others
    table.add_row(*cells)
    return table


def _cells(name: str, arm: dict[str, Any], summary: dict[str, Any], sets: list[str]) -> Iterator[str]:
    if name == "before":
        yield from ("before training", "", "", "")
    else:
        yield f"{name}: {arm['rule']}" + ("" if arm["matched"] else " (unmatched)")
        yield from (f"{arm['trajectories']:,}", f"{arm['tokens']:,}", f"{arm['effective_sample_size']:,.0f}")
    yield _number(arm["held_out_loss"], "{:.3f}")
    for of_set in sets:
        for metric in summary["sets"][of_set]["metrics"]:
            yield _number(arm["metrics"][of_set][metric], "{:.1%}")


def print_differences(summaries: Sequence[dict[str, Any]]) -> None:
    """One row a run: its differences with their intervals, in points."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary["sets"]))
    table = _table("differences in points, 95% intervals")
    for name in ("selector - baseline", "task", "model"):
        table.add_column(name)
    table.add_column("seed", justify="right")
    for name in names:
        table.add_column(f"{name}\n{next(s['sets'][name]['metrics'][0] for s in summaries if name in s['sets'])}")
    for summary in summaries:
        pair = " - ".join(summary["arms"][name]["rule"] for name in summary["difference_of"])
        sets = summary["sets"]
        shown = (_estimate(sets[name]["difference"], " ") if name in sets else "" for name in names)
        table.add_row(pair, summary["task"], summary["model"], str(summary["seed"]), *shown)
    _console().print(table)


def _estimate(difference: dict[str, Any], separator: str) -> str:
    estimate, low, high = (100 * _value(difference[key]) for key in ("estimate", "low", "high"))
    return f"{estimate:+.1f}" + ("" if math.isnan(low) else f"{separator}[{low:+.1f}, {high:+.1f}]")


def _form(metrics: dict[str, float]) -> str:
    """What a low accuracy may be due to instead of wrong answers; empty if samples are in good form."""
    if metrics["stop"] < 0.5:
        return f"only {metrics['stop']:.0%} of the samples end by themselves (task.max_new_tokens, model.template)"
    if metrics["boxed"] < 0.2:
        return (
            f"only {metrics['boxed']:.0%} of the samples box their answer (task.system can ask for it, or task.pattern)"
        )
    return ""


def _reading(difference: dict[str, Any]) -> str:
    """What the difference and its interval say, in words."""
    low, high = _value(difference["low"]), _value(difference["high"])
    if low == high == 0:
        return (
            f"no problem was answered differently by the two arms ({difference['problems']} problems): nothing to tell"
        )
    if math.isnan(low):
        verdict = "no interval"
    else:
        excludes = low > 0 or high < 0
        verdict = f"{difference['level']:.0%} interval " + ("excludes 0" if excludes else "includes 0: not told apart")
    smallest = _number(_value(difference["smallest_detectable"]) * 100, "; smallest detectable difference {:.1f}")
    label = f"; {difference['label']}" if difference["label"] else ""
    if difference["problems"] < FEW_PROBLEMS and not math.isnan(low):
        label += "; too few problems for a bootstrap interval to be trusted"
    return f"{verdict} ({difference['problems']} problems{smallest}{label})"


def _value(number: float | None) -> float:
    """JSON has no NaN: summary.json says null."""
    return math.nan if number is None else number


def _number(value: float | None, form: str) -> str:
    return "" if math.isnan(_value(value)) else form.format(value)


def _table(title: str) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


class ComparisonCallback(Callback):
    """Prints every job's table at the end of a multirun, and exits 1 if a job failed."""

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        summaries = read_summaries([Path(config.hydra.sweep.dir)])
        print_summaries(summaries)
        if any(summary["status"] == "failed" for summary in summaries):
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lark.report", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished runs or multiruns")
    try:
        print_summaries(read_summaries(parser.parse_args().folders))
    except (ValueError, OSError) as error:
        sys.exit(f"lark: {error}")


if __name__ == "__main__":
    main()
