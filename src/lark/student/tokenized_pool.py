"""The pool as the student sees it: rows, tokens, verdicts, which of them are held out, which fit.

Everything is memory-mapped Arrow but for a few numbers a row: the arrays of `TokenizedPool` take 50 bytes a row, and
the ids some 60 bytes for each distinct one. Rules, batches and the held-out split address rows by these at random.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lark.answers.checker import CHECKED_AS_TEXT, Answer, Checker
from lark.answers.extract import NO_GOLD
from lark.common.cache import build_once, file_hash, identity_hash
from lark.common.errors import LarkError
from lark.common.groups import Groups
from lark.common.log import announce, logger
from lark.common.table_cache import Compute, compute_table
from lark.common.versions import CHECKING_LIBRARIES, formula_versions
from lark.pool.contamination import find_overlap, find_repeated_problems
from lark.pool.files import find_files
from lark.pool.pool import mask_held_out, read_arrow_column, read_extra_column, read_pool, read_text_column
from lark.student.chat import Chat, TokenizedTrajectory, truncate_trajectory
from lark.tasks.problems import read_problems
from lark.tasks.task import Task

BATCH_ROWS, BATCH_CHARACTERS = 500, 2**19  # tokenised at once: as Python lists a token takes some 100 bytes


class TokenizedPool:
    """Reads, checks and tokenises the task's pool, or finds that done in `cache`.

    Arrays over the pool's rows: problem_id, candidate_id, length (tokens of the whole row), span_tokens (T, the
    trained ones), correct (1, 0 or NaN), is_held_out, fits (not overlong, not empty, not left out as an evaluation
    problem's). `scored` are the rows that rules may choose from. `dropped` counts rows by reason, `truncated` those cut
    to task.max_length, `verdicts` the `correct` filled in and the checks that timed out. `overlaps` tells of each
    evaluation set how many of its problems the pool has too, `in_sets` which of the pool's problems (id -> set/id),
    `repeated` lists the ids of problems that the pool asks under several ids.
    Raises LarkError when no candidate is left to choose from, and for task.overlap=error where problems overlap.
    """

    def __init__(self, task: Task, chat: Chat, *, cache: Path):
        self.task, self.chat, self.cache = task, chat, cache
        source, self.evaluation_files = task.prepare_pool(cache), task.prepare_evaluation(cache)
        pool = read_pool(source, cache=cache, on_error=task.on_error, limit=task.limit)  # type: ignore[arg-type]
        self.rows, self.fingerprint, self.text_fingerprint = pool.rows, pool.fingerprint, pool.text_fingerprint
        self.problem_id = read_text_column(self.rows, "problem_id")
        self.candidate_id = read_text_column(self.rows, "candidate_id")
        self.overlaps, self.in_sets, self.repeated = self._compare_with_sets()
        self.correct, self.verdicts = self._fill_verdicts()
        self.tokens = self._tokenise_pool()
        self.length = self._number("length")
        self.span_tokens = self.length - np.maximum(self._number("prompt_tokens"), 1)
        self.truncated = int((self.length < self._number("full_length")).sum())
        self.fits = (self.length <= task.max_length) & (self.span_tokens > 0)
        self._check_length()
        self.is_held_out = mask_held_out(self.problem_id, task.held_out)
        self.dropped = {
            **Counter(task.count_dropped(cache)) + Counter(pool.dropped),
            "overlong": int((~self.fits).sum()),
        }
        self.left_out = sorted(self.in_sets) if task.overlap == "drop" else []
        if self.left_out:
            leave = np.array([problem in self.in_sets for problem in self.problem_id])
            self.dropped["in an evaluation set"] = int((leave & self.fits).sum())
            self.fits &= ~leave
        self.scored = np.flatnonzero(self.fits & ~self.is_held_out)
        if len(self.scored) == 0:
            raise LarkError(
                f"task.pool={source}: no candidate is left to choose from ({len(self.rows)} rows, "
                f"{self.dropped['overlong']} longer than task.max_length={task.max_length}, "
                + (f"{self.dropped['in an evaluation set']} of evaluation problems, " if self.left_out else "")
                + f"{int(self.is_held_out.sum())} held out); raise task.max_length or lower task.held_out"
            )

    def announce(self) -> None:
        """Log what the pool holds, one row as it is trained, and problems that stand in two places."""
        sizes = Counter(self.problem_id)
        held = len(set(self.problem_id[self.is_held_out]))
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items() if n)
        shared = ", ".join(f"{one['in_pool']:,} of {name}" for name, one in self.overlaps.items() if one["in_pool"])
        counts = (
            (int((self.correct == 0).sum()), "known wrong"),
            (self.truncated, "cut to task.max_length"),
            (self.verdicts["filled"], "verdicts filled in"),
            (self.verdicts["timed_out"], "checks timed out"),
            (self.verdicts["no_gold"], "with answers that are none, such as proof"),
            (sum(size == 1 for size in sizes.values()), "problems with one candidate"),
        )
        parts = [
            f"{len(self.rows):,} trajectories of {len(sizes):,} problems ({held:,} held out)",
            f"dropped: {dropped}" if dropped else "none dropped",
            *(f"{count:,} {what}" for count, what in counts if count),
        ]
        if self.overlaps:
            parts.append(f"it has problems of eval sets: {shared}" if shared else "no overlap with eval sets")
        announce("pool", "; ".join(parts))
        logger.info("pool       %s tokens, longest %s", f"{int(self.length.sum()):,}", f"{int(self.length.max()):,}")
        example = self.chat.preview(self.read_tokens(self.scored[:1])[0], limit=24).replace("\n", "⏎").replace("»«", "")
        announce("example", f"{example}   («» is trained)")
        if self.in_sets and not self.left_out:
            logger.warning("%s; task.overlap=drop leaves them out", self._describe_overlap())
        if self.repeated:
            logger.warning(
                "%d problems of the pool are asked under another id too (first: %s); give each question one id: rules "
                "choose within a problem, and held-out problems should not be asked in training",
                sum(map(len, self.repeated)) - len(self.repeated),
                ", ".join(self.repeated[0][:3]),
            )

    def _describe_overlap(self) -> str:
        shown = ", ".join(f"{problem} ({place})" for problem, place in list(self.in_sets.items())[:3])
        more = " ..." if len(self.in_sets) > 3 else ""
        return f"{len(self.in_sets):,} problems of the pool are in evaluation sets: {shown}{more}"

    @property
    def identity(self) -> dict[str, Any]:
        """Name what the tokens of these rows depend on, where steps begin aside."""
        return {"pool": self.text_fingerprint, "cut_to": self._cut, **self.chat.span_identity}

    @property
    def _cut(self) -> int | None:
        """Tokens that longer rows are cut to; None: they are not."""
        return self.task.max_length if self.task.overlong == "truncate" else None

    def find_held_out(self) -> np.ndarray:
        """Find the held-out rows that fit."""
        return np.flatnonzero(self.fits & self.is_held_out)

    # ---- tokens

    def _tokenise_pool(self) -> datasets.Dataset:
        identity = {
            **self.identity,
            "step_splitter": self.chat.step_splitter,
            **formula_versions("tokens", libraries=("transformers", "tokenizers")),
        }
        return compute_table(
            self.cache / "tokens", identity, len(self.rows), _TOKENS, lambda: nullcontext(self._tokenise), "tokenising"
        )

    def _tokenise(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        batch, characters = [], 0
        row: Any
        for row in self.rows.select_columns(["messages", "source"]).select(range(start, stop)):
            batch.append(row)
            characters += sum(len(message["content"]) for message in row["messages"])
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_ROWS:
                yield self._tokenise_batch(batch)
                batch, characters = [], 0
        if batch:
            yield self._tokenise_batch(batch)

    def _tokenise_batch(self, batch: list[dict[str, Any]]) -> pa.RecordBatch:
        rows = self.chat.encode([row["messages"] for row in batch])
        full_length = [len(row.input_ids) for row in rows]
        if (limit := self._cut) is not None:
            rows = [truncate_trajectory(row, limit) if len(row.input_ids) > limit else row for row in rows]
        columns = {
            "input_ids": [row.input_ids for row in rows],
            "prompt_tokens": [row.prompt_tokens for row in rows],
            "end_of_turn": [row.end_of_turn for row in rows],
            "steps": [row.steps for row in rows],
            "length": [len(row.input_ids) for row in rows],
            "full_length": full_length,
        }
        return pa.RecordBatch.from_pydict(columns, schema=_TOKENS)

    def _check_length(self) -> None:
        """Raises LarkError for task.overlong=error where a row is too long."""
        too_long = np.flatnonzero(self.length > self.task.max_length)
        if self.task.overlong == "error" and len(too_long):
            first = int(too_long[0])
            raise LarkError(
                f"{self.rows[first]['source']}: {self.length[first]} tokens, more than task.max_length="
                f"{self.task.max_length}; raise it, or set task.overlong=drop or truncate"
            )

    def _number(self, name: str) -> np.ndarray:
        return read_arrow_column(self.tokens, name).to_numpy().astype(np.int64)

    def read_tokens(self, rows: np.ndarray) -> list[TokenizedTrajectory]:
        """Read the rows' tokens from the memory-mapped file."""
        batch = self.tokens[rows.tolist()]
        columns = (batch["input_ids"], batch["prompt_tokens"], batch["end_of_turn"], batch["steps"])
        return [
            TokenizedTrajectory(input_ids=list(ids), prompt_tokens=prompt, end_of_turn=end, steps=list(steps))
            for ids, prompt, end, steps in zip(*columns, strict=True)
        ]

    # ---- verdicts

    def _fill_verdicts(self) -> tuple[np.ndarray, dict[str, int]]:
        """Read `correct` as 1, 0 or NaN; a null with a known answer is filled by the checker and counted. A check that
        runs out of time counts as wrong, and is counted too, as are answers that say there is none.
        """
        correct = pc.cast(read_arrow_column(self.rows, "correct"), pa.float64()).to_numpy().copy()  # null becomes NaN
        answers = read_arrow_column(self.rows, "answer")
        unknown = np.flatnonzero(np.isnan(correct) & answers.is_valid().to_numpy())
        no_gold = np.flatnonzero(pc.match_substring_regex(answers, NO_GOLD).fill_null(False).to_numpy())
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


_NUMBERS = pa.list_(pa.int32())
_TOKENS = pa.schema(
    [
        ("input_ids", _NUMBERS),
        ("prompt_tokens", pa.int32()),
        ("end_of_turn", pa.int32()),
        ("steps", _NUMBERS),
        ("length", pa.int32()),
        ("full_length", pa.int32()),
    ]
)
_VERDICTS = pa.schema([("correct", pa.bool_()), ("timed_out", pa.bool_())])


def question_of(problem: dict[str, Any]) -> str:
    """Return the bare text of an evaluation problem, or its last turn where there is none."""
    return problem.get("problem") or problem["messages"][-1]["content"]
