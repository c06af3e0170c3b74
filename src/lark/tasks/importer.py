"""Pools that others have published in a form of their own, made into a pool of ours once, row by row.

What was made lies in the cache, keyed by the settings and by the files' hashes or the hub's commit, with a manifest
that says what became of every row.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lark.common.cache import build_once, check_writable, identity_hash, read_json
from lark.common.errors import LarkError
from lark.common.log import announce, logger
from lark.common.progress_line import show_progress
from lark.common.versions import formula_versions
from lark.pool.files import read_rows, write_rows
from lark.pool.pool import PoolError
from lark.pool.rows import COLUMNS, Fault, RowError
from lark.tasks.conversations import Columns, collect_samples, read_candidates, recognise_columns, show_names
from lark.tasks.merging import ProblemMerger, ReferenceAnswers

FAULTS_KEPT = 50
"""Examples of dropped rows in the manifest; all are counted."""
SAMPLE_ROWS = 100
"""Rows by whose columns a list is recognised."""


@dataclass(frozen=True, kw_only=True)
class RowList:
    """Rows of one file, or of one data set."""

    name: str
    """The file, for faults."""
    rows: Iterable[tuple[int, Any]]
    """(line, row), as `lark.pool.files.read_rows` yields them."""
    teacher: str | None = None
    """Who wrote its trajectories where no column says it."""
    label: str | None = None
    """Ids of its candidates, where they are known."""


def open_files(files: Mapping[str, Path]) -> Iterator[RowList]:
    """Open files one after the other, by name."""
    with show_progress("importing", sum(path.stat().st_size for path in files.values()) / 1e6, "MB") as progress:
        for name, path in files.items():
            yield RowList(name=name, rows=read_rows(path, lambda size: progress.update(size / 1e6)))


FindProblem = Callable[[Any, int, Columns], Mapping[str, Any] | None]
"""Finds text and answer of the problem of a row, by the row and its number, where the row does not have them."""


@dataclass(frozen=True, kw_only=True)
class Importer:
    """Makes a pool of lists of rows, once."""

    name: str
    """The task's."""
    source: str
    """task.pool, for messages."""
    identity: dict[str, Any]
    """Identifies the rows: hashes of files, or a commit, and what is chosen of them."""
    open_lists: Callable[[], Iterator[RowList]]
    columns: Columns
    """Those that the user has named."""
    system: str | None
    """System turn of prompts that are made of a problem's text, and of evaluation prompts."""
    on_error: str
    rows: int | None = None
    """Read only as many rows of each list; None: all."""
    answers: dict[str, Any] | None = None
    """Identifies the right answers by the problem's text."""
    read_answers: Callable[[], ReferenceAnswers] = ReferenceAnswers
    by_row: bool = False
    """Whether the row number tells problems apart."""
    find_problem: FindProblem = lambda row, number, columns: None

    def build(self, cache: Path) -> Path:
        """Return the folder with pool.jsonl and manifest.json, made now or before. Raises PoolError."""
        identity = {
            "pool": self.identity,
            "answers": self.answers,
            "columns": asdict(self.columns),
            "system": self.system,
            "on_error": self.on_error,
            "rows": self.rows,
            **formula_versions("imported", "overlap"),
        }
        folder = check_writable(cache, "paths.cache") / "tasks" / f"{self.name}-{identity_hash(identity)}"
        build_once(folder, identity, lambda folder: self._import(folder / "pool.jsonl"))
        return folder

    def _import(self, path: Path) -> dict[str, Any]:
        """Write the pool; returns what the manifest says of it. Raises PoolError."""
        merger = ProblemMerger(self.read_answers(), by_row=self.by_row)
        faults: list[Fault] = []
        dropped, teachers, layouts = Counter[str](), Counter[str](), Counter[str]()
        lengths: dict[str, int] = {}

        def drop(error: RowError, name: str, line: int | None) -> None:
            dropped[error.reason] += 1
            if self.on_error == "raise" or len(faults) < FAULTS_KEPT:
                faults.append(error.at(name, line))

        def make_rows(part: RowList) -> Iterator[dict[str, Any]]:
            numbered = iter(part.rows)
            first = list(islice(numbered, SAMPLE_ROWS))
            samples = collect_samples([row for _, row in first if isinstance(row, dict)])
            columns = self._recognise(samples, part.name) if samples else self.columns
            layouts[_describe_layout(columns, samples)] += 1
            for number, (line, row) in enumerate(islice(chain(first, numbered), self.rows)):
                lengths[part.name] = number + 1
                try:
                    problem = self.find_problem(row, number, columns)
                    candidates = read_candidates(
                        row, columns, problem=problem, system=self.system, teacher=part.teacher
                    )
                    for candidate in candidates:
                        try:
                            if isinstance(candidate, RowError):
                                raise candidate
                            yield merger.make_row(candidate, number=number, label=part.label)
                            teachers[candidate.teacher or "no name"] += 1
                        except RowError as error:
                            drop(error, part.name, line)
                except RowError as error:  # of the whole row
                    drop(error, part.name, line)

        def make_all_rows() -> Iterator[dict[str, Any]]:
            for part in self.open_lists():
                try:
                    yield from make_rows(part)
                except RowError as error:
                    message = f"task.pool={self.source} has a file that breaks off: repair it"
                    raise PoolError(message, [error.at(part.name, None)]) from error
                if part.name not in lengths:
                    error = RowError("row", "empty file", "the file holds no row: write rows to it or take it out")
                    drop(error, part.name, None)
            count = f"task.pool={self.source} has {dropped.total():,} faulty rows"
            if faults and self.on_error == "raise":
                remedy = "correct them, or set task.on_error=drop to leave what is faulty out"
                raise PoolError(f"{count}: {remedy}", faults)
            if not merger.rows:
                raise PoolError(f"{count} and no valid one: check task.columns and task.pool", faults)

        write_rows(path, make_all_rows(), default=str)  # nothing is left of a file that is not written to its end
        return {
            **merger.summarise(),
            "layouts": dict(layouts),
            "teachers": dict(teachers),
            "lists": lengths,
            "answers": len(merger.reference.answers),
            "dropped": dict(dropped),
            "faults": [asdict(fault) for fault in faults],
        }

    def _recognise(self, samples: Mapping[str, Any], name: str) -> Columns:
        missing = [column for column in self.columns.list_names() if column not in samples]
        try:
            if missing and not self.by_row:  # each teacher may have columns of its own
                there = show_names(samples)
                raise LarkError(
                    f"task.columns names {', '.join(missing)}, but there are the columns {there}; correct it"
                )
            return recognise_columns(self.columns, samples)
        except LarkError as error:
            where = "" if name == self.source else f" ({name})"
            raise LarkError(f"task.pool={self.source}{where}: {error}") from error


def _describe_layout(columns: Columns, samples: Mapping[str, Any]) -> str:
    """Describe in a line which columns are read as what, which are carried along and which are not used."""
    further = [name for name in samples if name not in columns.list_names()]
    carried = columns.keep if columns.keep is not None else [name for name in further if name not in COLUMNS]
    unused = [name for name in further if name not in carried]
    marks = [mark for mark in ("<|begin_of_thought|>",) if any(mark in str(value) for value in samples.values())]
    parts = [
        columns.describe(),
        *(f"thoughts between {mark} and its end, as they stand" for mark in marks),
        *([f"carried along: {', '.join(carried)}"] if carried else []),
        *([f"not used: {', '.join(unused)}"] if unused else []),
    ]
    return "; ".join(parts)


def log_import(folder: Path, system: str | None) -> None:
    """Log what an import came to, whenever its pool is opened."""
    manifest = read_json(folder / "manifest.json")
    for layout, count in manifest["layouts"].items():
        announce("columns", layout + (f" ({count:,} files)" if count > 1 else ""))
    count = len(manifest["teachers"])
    lost = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items())
    announce(
        "import",
        f"{manifest['rows']:,} rows of {manifest['problems']:,} problems "
        f"({manifest['problems_with_answer']:,} with an answer) "
        f"by {count} {'teacher' if count == 1 else 'teachers'}; "
        + (f"dropped: {lost} ({folder / 'manifest.json'})" if lost else "none dropped"),
    )
    for what, count in manifest["counts"].items():
        logger.info("import: %s: %s", what, f"{count:,}")
    lists = manifest["lists"]
    if len(set(lists.values())) > 1:
        longest = max(lists.values())
        short = ", ".join(f"{name} {count:,}" for name, count in lists.items() if count < longest)
        logger.info("import: lists of unequal length, the longest of %d rows: %s", longest, short)
    turns = manifest["system_turns"]
    if len(turns) > 1 or turns[0][0] != system:
        shown = "; ".join(f"{count:,} rows {_quote(turn)}" for turn, count in turns[:3])
        logger.warning(
            "the pool's system turns (%s) differ from that of evaluation prompts (%s): the student is trained and "
            "evaluated on different prompts unless you set task.system",
            shown,
            _quote(system),
        )


def _quote(turn: str | None) -> str:
    return "none" if turn is None else repr(turn if len(turn) <= 80 else turn[:77] + "...")
