"""Reads finished runs and prints the comparison: python -m lark.report <run or multirun folders>.

Imports nothing heavy at the top: Hydra creates the callback below before every run.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hydra.experimental.callback import Callback

from lark.common.cache import read_json, writable, write_text
from lark.common.errors import LarkError
from lark.comparison.tables import (
    FEW_PROBLEMS,
    FORM,
    TOO_FEW,
    estimate,
    form_of_samples,
    new_console,
    new_table,
    number,
    print_runs,
    stop_rates,
    texts,
)

if TYPE_CHECKING:
    from rich.table import Table

    from lark.comparison.comparison import Comparison

SETS_BESIDE_EACH_OTHER = 2
FAILURES = 10
"""How many failed runs are named."""
FORMATS = {"csv": ("arms.csv", "differences.csv"), "latex": ("comparison.tex",), "json": ("comparison.json",)}
"""What can be printed instead of the table, as it is in these files."""
_ARM = ("rule", "hash", "matched", "lr", "trajectories", "tokens", "effective_sample_size", "held_out_loss", "curve")
_DIFFERENCE = ("estimate", "low", "high", "level", "problems", "label", "smallest_detectable")
_FIGURES = {
    **dict.fromkeys(("status", "task", "model", "seed", "settings", "difference_of")),
    "arms": {
        "*": {
            **dict.fromkeys((*_ARM, "per_problem")),
            "cost": dict.fromkeys(("forward_tokens", "backward_tokens", "seconds")),
            "metrics": {"*": dict.fromkeys(figure for figure, _, _ in FORM)},
        }
    },
    "sets": {"*": {"metrics": None, "difference": dict.fromkeys(_DIFFERENCE)}},
}
"""What is reported of a finished run's summary; * stands for every key there is."""


def read_summaries(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Every summary.json in or below the folders, once, by path, numbered jobs of a multirun in their order.

    Raises LarkError when there is none, or one of a finished run lacks what is reported.
    """
    paths = {path.resolve(): path for folder in folders for path in folder.rglob("summary.json")}
    if not paths:
        shown = ", ".join(map(str, folders))
        raise LarkError(f"no summary.json in or below {shown}; name the folder of a finished run or multirun")
    in_order = sorted(paths, key=lambda path: (str(path.parent.parent), path.parent.name.zfill(8)))
    return [_read_summary(paths[path]) for path in in_order]


def _read_summary(path: Path) -> dict[str, Any]:
    summary = read_json(path)
    if summary.get("status") != "failed" and "stopped_after" not in summary:
        missing = next(_missing(summary, _FIGURES), None)
        if missing:
            raise LarkError(
                f"{path} has no {missing}, as another version of lark wrote it; run it again, or leave its folder out"
            )
    return summary | {"folder": str(path.parent)}


def _missing(part: Mapping[str, Any], figures: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key, inner in figures.items():
        for found in part if key == "*" else [key]:
            if found not in part:
                yield f"{within}{found}"
            elif inner:
                yield from _missing(part[found], inner, f"{within}{found}.")


def report(folders: Sequence[Path], *, form: str, output: Path | None, page: Path | None = None) -> None:
    """Print the table of a single run, or the comparison of several.

    form: table, or one of FORMATS, which then is all that stdout gets; output: a folder to write all of them to; page:
    the HTML file to write the page to (lark.page).
    Raises LarkError where there is no summary.json, nothing to put into a file, or `output` cannot be written.
    """
    from lark.comparison.comparison import compare

    summaries = read_summaries(folders)
    comparison = compare(summaries)
    contents = texts(comparison) if comparison.runs and (form != "table" or output) else {}
    if form != "table":
        print("\n".join(contents[name] for name in FORMATS[form] if name in contents), end="")
    elif comparison.runs == 1:
        print_comparison(next(summary for summary in summaries if "arms" in summary))
    elif comparison.runs > 1:
        print_runs(comparison)
    beside = sys.stdout if form == "table" else sys.stderr
    for folder, stage in comparison.stopped:
        print(f"{folder}: stopped after {stage}, as it was told to", file=beside)
    print_failures(comparison)
    if comparison.runs == 0 and (form != "table" or output):
        raise LarkError(f"no run in or below {', '.join(map(str, folders))} came to its end; there is nothing to write")
    if output:
        write_files(contents, writable(output, "--output"), file=beside)
    if page:
        from lark.page.write import write_page

        writable(page.parent, "--page")
        print(f"page        {write_page(folders, page)}", file=beside)


def print_comparison(summary: dict[str, Any]) -> None:
    """The table of one run: the student before training, the baseline's arm, the selector's, their difference."""
    console = new_console()
    names = list(summary["sets"])
    for start in range(0, max(1, len(names)), SETS_BESIDE_EACH_OTHER):
        console.print(_comparison(summary, names[start : start + SETS_BESIDE_EACH_OTHER]))
    for name in names:
        console.print(f"{name}: {_reading(summary['sets'][name]['difference'])}", soft_wrap=True)
        for arm, figures in summary["arms"].items():
            if note := form_of_samples(figures["metrics"][name]):
                console.print(f"{name}, {arm}: {note}", soft_wrap=True)
        shares = {arm: figures["metrics"][name]["stop"] for arm, figures in summary["arms"].items()}
        if text := stop_rates(shares, before=shares.get("before")):
            console.print(f"{name}: {text}", soft_wrap=True)


def _comparison(summary: dict[str, Any], sets: list[str]) -> "Table":
    table = new_table(f"{summary['task']} · {summary['model']} · seed {summary['seed']}")
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
    cells = [f"{first} - {second}", "", "", "", number(losses[0] - losses[1], "{:+.3f}")]
    for name in sets:
        others = len(summary["sets"][name]["metrics"]) - 1
        cells += [estimate(summary["sets"][name]["difference"], "\n")] + [""] * others
    table.add_row(*cells)
    return table


def _cells(name: str, arm: dict[str, Any], summary: dict[str, Any], sets: list[str]) -> Iterator[str]:
    if name == "before":
        yield from ("before training", "", "", "")
    else:
        yield f"{name}: {arm['rule']}" + ("" if arm["matched"] else " (unmatched)")
        yield from (f"{arm['trajectories']:,}", f"{arm['tokens']:,}", f"{arm['effective_sample_size']:,.0f}")
    yield number(arm["held_out_loss"], "{:.3f}")
    for of_set in sets:
        for metric in summary["sets"][of_set]["metrics"]:
            yield number(arm["metrics"][of_set][metric], "{:.1%}")


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
    smallest = number(_value(difference["smallest_detectable"]) * 100, "; smallest detectable difference {:.1f}")
    label = f"; {difference['label']}" if difference["label"] else ""
    if difference["problems"] < FEW_PROBLEMS and not math.isnan(low):
        label += f"; {TOO_FEW}"
    return f"{verdict} ({difference['problems']} problems{smallest}{label})"


def _value(figure: float | None) -> float:
    """JSON has no NaN: summary.json says null."""
    return math.nan if figure is None else figure


class ComparisonCallback(Callback):
    """Prints the comparison of a multirun's jobs, whose own tables have been printed, and writes it and the page to the
    sweep's folder; exits 1 if a job failed.
    """

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        from lark.comparison.comparison import compare
        from lark.page.write import write_own_page

        folder = Path(config.hydra.sweep.dir)
        comparison = compare(read_summaries([folder]))
        if comparison.runs > 1:
            print_runs(comparison)
            write_files(texts(comparison), folder)
        if comparison.runs > 1 or len(comparison.stopped) > 1:
            write_own_page(folder, print)
        print_failures(comparison)
        if comparison.failed:
            sys.exit(1)


def write_files(contents: Mapping[str, str], folder: Path, *, file: TextIO | None = None) -> None:
    """Write the files, each whole or not at all, and say so (to stdout, or `file`)."""
    for name, text in contents.items():
        write_text(folder / name, text)
    print(f"comparison  {folder}: {', '.join(contents)}", file=file)


def print_failures(comparison: "Comparison") -> None:
    """The last few; a page written by --page, and --output, have all."""
    for folder, error in comparison.failed[-FAILURES:]:
        print(f"failed: {folder}: {error}", file=sys.stderr)
    if (further := len(comparison.failed) - FAILURES) > 0:
        print(f"failed: {further} further runs, which --page and --output name", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    about = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="python -m lark.report", description=about)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished runs or multiruns")
    parser.add_argument("--output", type=Path, help="folder to write the comparison to, as CSV, LaTeX and JSON")
    parser.add_argument(
        "--format",
        choices=("table", *FORMATS),
        default="table",
        help="what to print; csv: the arms and, after an empty line, the differences",
    )
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="write the page, and plotly.min.js beside it")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        report(arguments.folders, form=arguments.format, output=arguments.output, page=arguments.page)
    except (ValueError, OSError) as error:
        sys.exit(f"lark: {error}")


if __name__ == "__main__":
    main()
