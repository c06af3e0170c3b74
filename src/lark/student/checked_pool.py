"""The pool as checked: rows, verdicts filled in, problems that stand in two places; all that needs no student.

Rows are memory-mapped Arrow but for the arrays of `CheckedPool`, 24 bytes a row, and ids, some 60 bytes for each
distinct one.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lark.answers.checker import CHECKED_AS_TEXT, Answer, Checker
from lark.answers.extract import NO_GOLD
from lark.common.cache import build_once, file_hash, identity_hash
from lark.common.errors import LarkError
from lark.common.groups import Groups
from lark.common.table_cache import Compute, compute_table
from lark.common.versions import CHECKING_LIBRARIES, formula_versions
from lark.pool.contamination import find_overlap, find_repeated_problems
from lark.pool.files import find_files
from lark.pool.pool import read_arrow_column, read_extra_column, read_pool, read_text_column
from lark.tasks.problems import read_problems
from lark.tasks.task import Task

BATCH_ROWS = 500  # checked at once


class CheckedPool:
    """Reads and checks the task's pool, or finds that done in `cache`: all that needs no student.

    Arrays over the pool's rows: problem_id, candidate_id, correct (1, 0 or NaN). `dropped` counts rows by reason,
    `verdicts` the `correct` filled in and the checks that timed out. `overlaps` tells of each evaluation set how many
    of its problems the pool has too, `in_sets` which of the pool's problems (id -> set/id), `repeated` lists the ids of
    problems that the pool asks under several ids.
    Raises LarkError for task.overlap=error where problems overlap.
    """

    def __init__(self, task: Task, *, cache: Path):
        self.task, self.cache = task, cache
        self.source, self.evaluation_files = task.prepare_pool(cache), task.prepare_evaluation(cache)
        pool = read_pool(self.source, cache=cache, on_error=task.on_error, limit=task.limit)  # type: ignore[arg-type]
        self.rows, self.fingerprint, self.text_fingerprint = pool.rows, pool.fingerprint, pool.text_fingerprint
        self.faults = pool.faults
        self.problem_id = read_text_column(self.rows, "problem_id")
        self.candidate_id = read_text_column(self.rows, "candidate_id")
        self.overlaps, self.in_sets, self.repeated = self._compare_with_sets()
        self.correct, self.verdicts = self._fill_verdicts()
        self.dropped = dict(Counter(task.count_dropped(cache)) + Counter(pool.dropped))

    def _describe_overlap(self) -> str:
        shown = ", ".join(f"{problem} ({place})" for problem, place in list(self.in_sets.items())[:3])
        more = " ..." if len(self.in_sets) > 3 else ""
        return f"{len(self.in_sets):,} problems of the pool are in evaluation sets: {shown}{more}"

    # ---- verdicts

    def _fill_verdicts(self) -> tuple[np.ndarray, dict[str, int]]:
        """Read `correct` as 1, 0 or NaN; a null with a known answer is filled by the checker and counted. A check that
        runs out of time counts as wrong, and is counted too, as are answers that say there is none.
        """
        correct = pc.cast(read_arrow_column(self.rows, "correct"), pa.float64()).to_numpy().copy()  # null becomes NaN
        answers = read_arrow_column(self.rows, "answer")
        unknown = np.flatnonzero(np.isnan(correct) & answers.is_valid().to_numpy())
        no_gold = np.flatnonzero(pc.match_substring_regex(answers, NO_GOLD).fill_null(False).to_numpy())  # type: ignore[attr-defined]
        extras = map(json.loads, self.rows[no_gold.tolist()]["extra"])
        kinds = np.array([extra.get("checker") or self.task.checker for extra in extras], dtype=str)
        no_gold = no_gold[~np.isin(kinds, CHECKED_AS_TEXT)]
        unknown = np.setdiff1d(unknown, no_gold)
        counts = {"filled": len(unknown), "timed_out": 0, "no_gold": len(no_gold)}
        if not len(unknown):
            return correct, counts
        identity = {
            "pool": self.fingerprint,
            "checker": self.task.checker,
            "pattern": self.task.pattern,
            **formula_versions("verdicts", libraries=CHECKING_LIBRARIES),
        }
        found = compute_table(
            self.cache / "verdicts", identity, len(unknown), _VERDICTS, lambda: self._checking(unknown), "checking"
        )
        correct[unknown] = read_arrow_column(found, "correct").to_numpy()
        return correct, counts | {"timed_out": int(read_arrow_column(found, "timed_out").to_numpy().sum())}

    @contextmanager
    def _checking(self, rows: np.ndarray) -> Iterator[Compute]:
        with Checker(self.task.checker, pattern=self.task.pattern) as checker:

            def check(start: int, stop: int) -> Iterator[pa.RecordBatch]:
                for first in range(start, stop, BATCH_ROWS):
                    verdicts = checker.check(self._answers(rows[first : min(first + BATCH_ROWS, stop)].tolist()))
                    columns = {name: [getattr(verdict, name) for verdict in verdicts] for name in _VERDICTS.names}
                    yield pa.RecordBatch.from_pydict(columns, schema=_VERDICTS)

            yield check

    def _answers(self, rows: list[int]) -> list[Answer]:
        batch = self.rows[rows]
        return [
            Answer(
                gold=gold,
                text=messages[-1]["content"],
                source_dataset=extra.get("source_dataset"),
                metadata=extra.get("metadata"),
                kind=extra.get("checker"),
                pattern=extra.get("pattern"),
            )
            for gold, messages, extra in zip(
                batch["answer"], batch["messages"], map(json.loads, batch["extra"]), strict=True
            )
        ]

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Read a pool column for Candidates: teacher, answer, text (the trajectory), correct (1, 0, NaN) or another."""
        if name == "correct":
            return self.correct[rows]
        if name in ("teacher", "answer"):
            return read_text_column(self.rows, name)[rows]
        if name == "text":  # all that is asked for is in memory: ask for a block of rows at a time
            return np.array([turns[-1]["content"] for turns in self._messages(rows)], dtype=object)
        return read_extra_column(self.rows, name)[rows]

    def _messages(self, rows: np.ndarray) -> Iterator[list[dict[str, str]]]:
        messages = self.rows.select_columns(["messages"])
        for start in range(0, len(rows), BATCH_ROWS):
            yield from messages[rows[start : start + BATCH_ROWS].tolist()]["messages"]

    # ---- problems that stand in two places

    def _read_prompts(self) -> Iterator[tuple[str, str]]:
        """Yield id and last turn of the user of each problem."""
        first = np.unique(Groups.from_ids(self.problem_id).index_N, return_index=True)[1]  # one row a problem
        for problem, messages in zip(self.problem_id[first], self._messages(first), strict=True):
            yield problem, next(turn["content"] for turn in reversed(messages[:-1]) if turn["role"] == "user")

    def _compare_with_sets(self) -> tuple[dict[str, dict[str, Any]], dict[str, str], list[list[str]]]:
        """Find `overlaps`, `in_sets` and `repeated`, in the cache or by reading every problem once."""
        limit = self.task.eval_limit
        contents = {
            name: [file_hash(file) for file in find_files(path, setting="task.eval").values()]
            for name, path in self.evaluation_files.items()
        }
        identity = {"pool": self.text_fingerprint, "sets": contents, "eval_limit": limit, **formula_versions("overlap")}

        def compare(_: Path) -> dict[str, Any]:
            sets = {name: read_problems(file, limit=limit) for name, file in self.evaluation_files.items()}
            asked = {name: [(p["problem_id"], question_of(p)) for p in problems] for name, problems in sets.items()}
            found = find_overlap(asked, self._read_prompts())
            overlaps = {
                name: {
                    "problems": len(sets[name]),
                    "in_pool": len(ids),
                    "share": len(ids) / len(sets[name]),
                    "examples": ids[:20],
                }
                for name, ids in found.evaluation.items()
            }
            return {
                "overlaps": overlaps,
                "in_sets": found.pool,
                "repeated": find_repeated_problems(self._read_prompts()),
            }

        known = build_once(self.cache / "overlap" / identity_hash(identity), identity, compare)
        self.in_sets = known["in_sets"]
        if self.in_sets and self.task.overlap == "error":
            raise LarkError(f"task.overlap=error: {self._describe_overlap()}; take them out, or set task.overlap=drop")
        return known["overlaps"], known["in_sets"], known["repeated"]

    def count_copies(self) -> int:
        """Count the trajectories that repeat another one of their problem; 8 bytes a row."""
        texts = zip(self.problem_id, self._messages(np.arange(len(self.rows))), strict=True)
        hashes = (hash((problem, messages[-1]["content"])) for problem, messages in texts)
        return len(self.rows) - len(np.unique(np.fromiter(hashes, np.int64, len(self.rows))))

    def read_rows(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yield pool rows with `correct` as filled in."""
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            batch = self.rows[part.tolist()]
            for i, row in enumerate(part.tolist()):
                known = self.correct[row]
                yield {name: values[i] for name, values in batch.items()} | {
                    "correct": None if np.isnan(known) else bool(known)
                }


_VERDICTS = pa.schema([("correct", pa.bool_()), ("timed_out", pa.bool_())])


def question_of(problem: dict[str, Any]) -> str:
    """Return the bare text of an evaluation problem, or its last turn where there is none."""
    return problem.get("problem") or problem["messages"][-1]["content"]
