"""Print tables on a console or into a log file."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lark.comparison.comparison import Comparison, Group, compare
from lark.comparison.conclusions import list_conclusions
from lark.comparison.tables import LEGEND, TextTable, build_run_table, build_tables, list_notes

WIDTH = 100  # columns where there is no terminal
LABEL_WIDTH = 40
FAILURES_SHOWN = 10


def make_console() -> Console:
    """Make a console that takes users' names for what they are, not for markup."""
    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def make_table(title: str) -> Table:
    """Make an empty table in the style of all of ours."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)


def print_run(summary: Mapping[str, Any]) -> None:
    """Print the table of one run, what its differences mean, and notes."""
    (group,) = compare([summary]).groups
    _print([build_run_table(group, seed=summary["seed"])], [group])


def print_runs(comparison: Comparison) -> None:
    """Print the comparison of several runs, with what it means, its notes and a legend."""
    _print(build_tables(comparison), comparison.groups)
    make_console().print(LEGEND)


def print_failures(comparison: Comparison) -> None:
    """Print the last few failed runs to stderr; a page written by --page, and --output, have all."""
    for folder, error in comparison.failed[-FAILURES_SHOWN:]:
        print(f"failed: {folder}: {error}", file=sys.stderr)
    if (further := len(comparison.failed) - FAILURES_SHOWN) > 0:
        print(f"failed: {further} further runs, which --page and --output name", file=sys.stderr)


def _print(tables: Iterable[TextTable], groups: Iterable[Group]) -> None:
    console, groups = make_console(), list(groups)
    for table in tables:
        _print_table(console, table)
    for group in groups:
        of_group = f"{group.task} · {group.model}, " if len(groups) > 1 else ""
        for text in (*map(" ".join, list_conclusions(group)), *list_notes(group)):
            console.print(f"{of_group}{text}")


def _print_table(console: Console, table: TextTable) -> None:
    """Print as many tables below each other as it takes to stay within the width."""
    unlimited = console.options.update(width=10_000)
    start = 0
    while start < len(table.blocks):
        end = start + 1
        while end < len(table.blocks) and (
            Measurement.get(console, unlimited, _make_part(table, start, end + 1)).maximum <= console.width
        ):
            end += 1
        console.print(_make_part(table, start, end))
        start = end


def _make_part(table: TextTable, start: int, end: int) -> Table:
    part = make_table(table.title)
    part.add_column(table.header, max_width=LABEL_WIDTH, overflow="fold")
    columns = [column for block in table.blocks[start:end] for column in block.items()]
    for header, _ in columns:
        part.add_column(header, justify="right", no_wrap=True)
    for number, row in enumerate(zip(table.labels, *(cells for _, cells in columns), strict=True), 1):
        part.add_row(*row, end_section=table.last_apart and number == len(table.labels) - 1)
    return part
