"""Tasks whose pool others have published in a form of their own: made into a pool of ours once, row by row.

What was made lies in the cache, keyed by the settings and by the files' hashes or the hub's commit, with a manifest
that says what became of every row.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lark.common.cache import build_once, check_writable, identity_hash, read_json
from lark.common.errors import LarkError
from lark.common.hub import download_dataset, find_commit, is_hub_id
from lark.common.log import announce, logger
from lark.common.versions import formula_versions
from lark.pool.files import READERS, find_files, hash_files, keep_data_files, write_rows
from lark.pool.pool import PoolError
from lark.pool.rows import Fault, RowError
from lark.tasks.conversations import Columns, read_candidates
from lark.tasks.merging import ProblemMerger, ReferenceAnswers, read_reference_answers
from lark.tasks.task import Task

FAULTS_KEPT = 50
"""Examples of dropped rows in the manifest; all are counted."""
DATA_FILES = tuple(f"*{ending}" for ending in READERS)


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


@dataclass(frozen=True, kw_only=True)
class ImportedTask(Task):
    """A pool in someone else's form: a local file or folder, or the id of a data set of the hub.

    `system` is also the system turn of pool prompts that are made of a problem's text.
    """

    revision: str | None = None
    """The pool's commit on the hub (or a branch, whose commit is then looked up and stored)."""
    columns: Columns = field(default_factory=Columns)
    """Which columns hold what."""
    answers: str | None = None
    """Data set of the hub, or file, with right answers by the problem's text, for where the pool has none."""
    answers_revision: str | None = None
    """Its commit on the hub."""
    rows: int | None = None
    """Read only as many rows of each list; null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pool, str | Path):
            raise LarkError(f"task.pool={self.pool} is neither a file, folder nor data set of the hub; set it to one")
        if self.rows is not None and self.rows < 1:
            raise LarkError(f"task.rows={self.rows} leaves no row; set it to 1 or more, or null for all")

    def prepare_pool(self, cache: Path) -> Any:
        folder = self._build(cache)
        self._log(read_json(folder / "manifest.json"), folder)
        return folder / "pool.jsonl"

    def count_dropped(self, cache: Path) -> dict[str, int]:
        return read_json(self._build(cache) / "manifest.json")["dropped"]

    def _build(self, cache: Path) -> Path:
        """Return the folder with the pool, made now or before."""
        identity = {
            "pool": self._identify_pool(),
            "answers": self._identify_answers(),
            "columns": asdict(self.columns),
            "system": self.system,
            "on_error": self.on_error,
            "rows": self.rows,
            **formula_versions("imported", "overlap"),
        }
        folder = check_writable(cache, "paths.cache") / "tasks" / f"{self.name}-{identity_hash(identity)}"
        build_once(folder, identity, lambda folder: self._import(folder / "pool.jsonl", identity))
        return folder

    @abstractmethod
    def _identify_pool(self) -> dict[str, Any]:
        """Return what the pool is made of: the files' hashes, or the hub's commit (under "commit")."""

    @abstractmethod
    def _open_lists(self, identity: dict[str, Any]) -> Iterator[RowList]:
        """Yield the lists of rows, in order; identity: of the pool."""

    def _find_problem(self, row: Any, number: int) -> Mapping[str, Any] | None:
        """Return text and answer of a row's problem, where the row does not have them."""
        return None

    def _identify_answers(self) -> dict[str, Any] | None:
        if self.answers is None:
            return None
        if is_hub_id(self.answers):
            return {"commit": find_commit(self.answers, self.answers_revision, setting="task.answers")}
        return {"files": hash_files(find_files(self.answers, setting="task.answers"), setting="task.answers")}

    def _read_answers(self, identity: dict[str, Any] | None) -> ReferenceAnswers:
        if self.answers is None or identity is None:
            return ReferenceAnswers()
        if "commit" in identity:
            folder = download_dataset(self.answers, identity["commit"], DATA_FILES, setting="task.answers")
            files = {path.relative_to(folder).as_posix(): path for path in keep_data_files(folder.rglob("*"))}
        else:
            files = find_files(self.answers, setting="task.answers")
        return read_reference_answers(files, shown=f"task.answers={self.answers}")

    def _import(self, path: Path, identity: dict[str, Any]) -> dict[str, Any]:
        """Write the pool; returns what the manifest says of it. Raises PoolError."""
        merger = ProblemMerger(self._read_answers(identity["answers"]), by_row=self._by_row)
        faults: list[Fault] = []
        dropped, teachers = Counter[str](), Counter[str]()
        lengths: dict[str, int] = {}

        def drop(error: RowError, name: str, line: int | None) -> None:
            dropped[error.reason] += 1
            if self.on_error == "raise" or len(faults) < FAULTS_KEPT:
                faults.append(error.at(name, line))

        def make_rows(part: RowList) -> Iterator[dict[str, Any]]:
            for number, (line, row) in enumerate(islice(part.rows, self.rows)):
                lengths[part.name] = number + 1
                try:
                    problem = self._find_problem(row, number)
                    candidates = read_candidates(
                        row, self.columns, problem=problem, system=self.system, teacher=part.teacher
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
            for part in self._open_lists(identity["pool"]):
                try:
                    yield from make_rows(part)
                except RowError as error:
                    message = f"task.pool={self.pool} has a file that breaks off: repair it"
                    raise PoolError(message, [error.at(part.name, None)]) from error
                if part.name not in lengths:
                    error = RowError("row", "empty file", "the file holds no row: write rows to it or take it out")
                    drop(error, part.name, None)
            count = f"task.pool={self.pool} has {dropped.total():,} faulty rows"
            if faults and self.on_error == "raise":
                remedy = "correct them, or set task.on_error=drop to leave what is faulty out"
                raise PoolError(f"{count}: {remedy}", faults)
            if not merger.rows:
                raise PoolError(f"{count} and no valid one: check task.columns and task.pool", faults)

        write_rows(path, make_all_rows(), default=str)  # nothing is left of a file that is not written to its end
        return {
            **merger.summarise(),
            "teachers": dict(teachers),
            "lists": lengths,
            "answers": len(merger.reference.answers),
            "dropped": dict(dropped),
            "faults": [asdict(fault) for fault in faults],
        }

    @property
    def _by_row(self) -> bool:
        """Tell whether the row number tells problems apart."""
        return False

    def _log(self, manifest: dict[str, Any], folder: Path) -> None:
        """Say what the import came to, whenever the pool is opened."""
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
        if len(turns) > 1 or turns[0][0] != self.system:
            shown = "; ".join(f"{count:,} rows {_quote(turn)}" for turn, count in turns[:3])
            logger.warning(
                "the pool's system turns (%s) differ from that of evaluation prompts (%s): the student is trained and "
                "evaluated on different prompts unless you set task.system",
                shown,
                _quote(self.system),
            )


def _quote(turn: str | None) -> str:
    return "none" if turn is None else repr(turn if len(turn) <= 80 else turn[:77] + "...")
