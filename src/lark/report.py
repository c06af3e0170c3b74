"""Read finished runs and print their comparison: python -m lark.report <run or multirun folders>.

Imports nothing heavy at the top: Hydra creates the callback below before every run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from lark.common.cache import check_writable
from lark.common.errors import LarkError
from lark.comparison.summaries import read_summaries, take_best_rates

FORMATS = {"csv": ("arms.csv", "differences.csv"), "latex": ("comparison.tex",), "json": ("comparison.json",)}
"""What can be printed instead of the table, as it is in these files."""


def report(
    folders: Sequence[Path],
    *,
    form: str = "table",
    output: Path | None = None,
    page: Path | None = None,
    best_lr: bool = False,
) -> None:
    """Print the table of a single run, or the comparison of several.

    form: table, or one of FORMATS, which then is all that stdout gets; output: a folder to write all of them to; page:
    the HTML file to write the page to; best_lr: take each arm at its best learning rate (`take_best_rates`).
    Raises LarkError where there is no summary.json, nothing to put into a file, or `output` cannot be written.
    """
    from lark.comparison.comparison import compare
    from lark.comparison.files import render_files, write_files
    from lark.comparison.printing import print_failures, print_run, print_runs

    summaries = read_summaries(folders)
    summaries = take_best_rates(summaries) if best_lr else summaries
    comparison = compare(summaries)
    if form == "table" and comparison.runs == 1:
        print_run(next(summary for summary in summaries if "arms" in summary))
    elif form == "table" and comparison.runs > 1:
        print_runs(comparison)
    elif comparison.runs:
        files = render_files(comparison)
        print("\n".join(files[name] for name in FORMATS[form]), end="")
    beside = sys.stdout if form == "table" else sys.stderr
    for folder, stage in comparison.stopped:
        print(f"{folder}: stopped after {stage}, as it was told to", file=beside)
    print_failures(comparison)
    if comparison.runs == 0 and (form != "table" or output):
        raise LarkError(f"no run in or below {', '.join(map(str, folders))} came to its end; there is nothing to write")
    if output:
        write_files(comparison, check_writable(output, "--output"), beside)
    if page:
        from lark.page.write import write_page

        check_writable(page.parent, "--page")
        print(f"page        {write_page(summaries, page)}", file=beside)


class ComparisonCallback(Callback):
    """Print and write the comparison of a multirun's jobs at its end; exit with 1 if a job failed."""

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """Compare the jobs if several finished: the table of a single one has been printed."""
        from lark.comparison.comparison import compare
        from lark.comparison.files import write_files
        from lark.comparison.printing import print_failures, print_runs
        from lark.page.write import write_own_page

        folder = Path(config.hydra.sweep.dir)
        comparison = compare(read_summaries([folder]))
        if comparison.runs > 1:
            print_runs(comparison)
            write_files(comparison, folder, sys.stdout)
        several = comparison.runs > 1 or len(comparison.stopped) > 1
        if several and (page := write_own_page(folder, Path(config.paths.logs))):
            print(f"page        {page}")
        print_failures(comparison)
        if comparison.failed:
            sys.exit(1)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    about = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="python -m lark.report", description=about)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="folders of finished runs or multiruns")
    add("--output", type=Path, help="folder to write the comparison to, as CSV, LaTeX and JSON")
    printed = "what to print; csv: the arms and, after an empty line, the differences"
    add("--format", dest="form", choices=("table", *FORMATS), default="table", help=printed)
    add("--page", type=Path, metavar="FILE.html", help="write the page, and plotly.min.js beside it")
    best = "of runs that differ in sft.lr only, take each arm at the rate of its lowest held-out loss"
    add("--best-lr", action="store_true", help=best)
    return parser


def main() -> None:
    """Run the command line."""
    try:
        report(**vars(build_parser().parse_args()))
    except (LarkError, OSError) as error:
        sys.exit(f"lark: {error}")


if __name__ == "__main__":
    main()
