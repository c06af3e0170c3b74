"""Tasks whose pool others have published in a form of their own: made into a pool of ours once, row by row.

What was made lies in the cache, keyed by the settings, by the files' hashes or the hub's commit, and by the source of
this package, with a manifest that says what became of every row.
"""

import json
import shutil
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lark.common.cache import (
    atomic_write,
    check_writable,
    file_hash,
    hold_lock,
    identity_hash,
    is_complete,
    read_json,
    write_json,
)
from lark.common.errors import LarkError
from lark.common.versions import formula_versions
from lark.pool.pool import PoolError
from lark.pool.rows import READERS, RowError, find_files
from lark.tasks.conversations import Candidate, Columns
from lark.tasks.hub import commit_of, fetched, is_hub_id
from lark.tasks.merging import Joiner
from lark.tasks.reference_answers import Golds, read_golds
from lark.tasks.task import Say, Task

FAULTS_KEPT = 50  # examples in the manifest; all are counted
DATA_FILES = tuple(f"*{ending}" for ending in READERS)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A candidate or a fault, and where it stands."""

    what: Candidate | RowError
    file: str
    line: int | None
    number: int = 0  # of its row in its list
    label: str | None = None  # the candidate's id, if that is known


@dataclass(frozen=True, kw_only=True)
class ImportedTask(Task):
    """A pool in someone else's form.

    pool: local file or folder, or id of a data set of the hub.
    revision: its commit there (or a branch, whose commit is then looked up, printed and stored).
    columns: which columns hold what.
    system: also the system turn of pool prompts that are made of a problem's text.
    answers: data set of the hub, or file, with right answers by the problem's text, for where the pool has none.
    answers_revision: its commit on the hub.
    rows: read only as many rows of each list (null: all).
    """

    revision: str | None = None
    columns: Columns = field(default_factory=Columns)
    answers: str | None = None
    answers_revision: str | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pool, str | Path):
            raise LarkError(
                f"task.pool={self.pool} is neither a file or folder nor a data set of the hub; set it to one"
            )
        if self.rows is not None and self.rows < 1:
            raise LarkError(f"task.rows={self.rows} leaves no row; set it to 1 or more, or null for all")

    def sources(self, cache: Path, say: Say = print) -> tuple[Any, dict[str, Path]]:
        folder = self._folder(cache)
        for line in read_json(folder / "manifest.json")["said"]:
            say(line)
        return folder / "pool.jsonl", self.evaluation_files(cache, say)

    def dropped(self, cache: Path) -> dict[str, int]:
        return read_json(self._folder(cache) / "manifest.json")["dropped"]

    def _folder(self, cache: Path) -> Path:
        """Where the pool is, made now or before."""
        identity = {
            "pool": self._origin(),
            "answers": self._answers_origin(),
            "columns": asdict(self.columns),
            "system": self.system,
            "on_error": self.on_error,
            "rows": self.rows,
            **formula_versions("imported", "overlap"),
        }
        folder = check_writable(cache, "paths.cache") / "tasks" / f"{self.name}-{identity_hash(identity)}"
        with hold_lock(folder):
            if not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                golds = None
                if self.answers is not None:
                    golds = read_golds(self._answer_files(identity["answers"]), shown=f"task.answers={self.answers}")
                outcome = self._write(folder / "pool.jsonl", self._found(identity["pool"]), golds)
                if outcome["dropped"]:
                    outcome["said"].append(f"import      what was dropped, with examples: {folder / 'manifest.json'}")
                write_json(folder / "manifest.json", {"identity": identity, **outcome})
        return folder

    @abstractmethod
    def _origin(self) -> dict[str, Any]:
        """What the pool is made of, for the identity: the files' hashes, or the hub's commit (under "commit")."""

    @abstractmethod
    def _found(self, origin: dict[str, Any]) -> Iterator[Found]:
        """Everything that stands there, in order."""

    def _answers_origin(self) -> Any:
        if self.answers is None:
            return None
        if is_hub_id(self.answers):
            return {"commit": commit_of(self.answers, self.answers_revision, setting="task.answers")}
        return {"files": hashes(find_files(self.answers, setting="task.answers"))}

    def _answer_files(self, origin: dict[str, Any]) -> dict[str, Path]:
        assert self.answers is not None
        if "commit" not in origin:
            return find_files(self.answers, setting="task.answers")
        folder = fetched(self.answers, origin["commit"], DATA_FILES, setting="task.answers")
        return {path.relative_to(folder).as_posix(): path for path in data_files(folder.rglob("*"))}

    def _write(self, path: Path, found: Iterator[Found], golds: Golds | None) -> dict[str, Any]:
        joiner, faults, dropped = Joiner(golds, by_row=self._by_row), [], Counter[str]()
        teachers: Counter[str] = Counter()
        lists: dict[str, int] = {}  # file -> rows
        keep = None if self.on_error == "raise" else FAULTS_KEPT
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for item in found:
                lists[item.file] = max(lists.get(item.file, 0), item.number + 1)
                try:
                    if isinstance(item.what, RowError):
                        raise item.what
                    row = joiner.row(item.what, number=item.number, label=item.label)
                    file.write(json.dumps(row, default=str) + "\n")
                    teachers[item.what.teacher or "no name"] += 1
                except RowError as error:
                    dropped[error.reason] += 1
                    if keep is None or len(faults) < keep:
                        faults.append(error.at(item.file, error.line or item.line))
            count = f"task.pool={self.pool} has {dropped.total():,} faulty rows"
            if faults and self.on_error == "raise":
                remedy = "correct them, or set task.on_error=drop to leave what is faulty out"
                raise PoolError(f"{count}: {remedy}", faults)
            if not joiner.counts["rows"]:
                raise PoolError(f"{count} and no valid one: check task.columns and task.pool", faults)
        summary = joiner.summary() | {"teachers": dict(teachers), "lists": lists}
        if golds is not None:
            summary["answers"] = {"problems": len(golds.answers), "without": golds.unboxed}
        return {
            **summary,
            "dropped": dict(dropped),
            "faults": [asdict(fault) for fault in faults],
            "said": self._lines(summary, dropped),
        }

    @property
    def _by_row(self) -> bool:
        """Whether the row number tells problems apart."""
        return False

    def _lines(self, summary: dict[str, Any], dropped: Counter[str]) -> list[str]:
        """What is said of the import whenever the pool is opened."""
        teachers = summary["teachers"]
        lost = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"
        notes = {
            "questions asked twice in a list (their candidates are joined)": summary["questions_asked_twice"],
            "questions at a row where another stood before (they get ids of their own)": summary[
                "questions_out_of_line"
            ],
            "prompts made that of the problem's first row": summary["prompts_replaced"],
            "answers ignored, as the problem's first row has none": summary["answers_ignored"],
            "answers of which task.answers has another (the first holds)": summary["answers_contradicting"],
        }
        lines = [
            f"import      {self.pool}: {summary['rows']:,} rows of {summary['problems']:,} problems by "
            f"{len(teachers)} {'teacher' if len(teachers) == 1 else 'teachers'}, "
            f"{summary['problems_with_answer']:,} problems with an answer; dropped: {lost}"
            + "".join(f"; {text}: {count:,}" for text, count in notes.items() if count)
        ]
        lengths = summary["lists"].values()
        if len(set(lengths)) > 1:
            short = [f"{name} {count:,}" for name, count in summary["lists"].items() if count < max(lengths)]
            shown = ", ".join(short[:5]) + (f" and {len(short) - 5} more" if len(short) > 5 else "")
            lines.append(f"import      lists of unequal length, the longest of {max(lengths):,} rows: {shown}")
        turns = summary["system_turns"]
        if len(turns) > 1 or turns[0][0] != self.system:
            shown = "; ".join(f"{count:,} rows {_quoted(turn)}" for turn, count in turns[:3])
            lines.append(
                f"import      system turns of the pool: {shown}; of evaluation prompts: {_quoted(self.system)}"
            )
        return lines


def data_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in READERS and not path.name.startswith("."))


def hashes(files: dict[str, Path]) -> list[list[str]]:
    """Name and hash of each file."""
    return [[name, _hash(path, path.stat().st_size, path.stat().st_mtime_ns)] for name, path in files.items()]


@cache
def _hash(path: Path, size: int, changed: int) -> str:
    """Computed once a process, unless the file changes: a run asks several times."""
    return file_hash(path)


def _quoted(turn: str | None) -> str:
    return "none" if turn is None else repr(turn if len(turn) <= 80 else turn[:77] + "...")
