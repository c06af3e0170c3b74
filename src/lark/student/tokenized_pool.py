"""The pool as the student sees it: rows, tokens, verdicts, which of them are held out, which fit.

Everything is memory-mapped Arrow but for a few numbers a row: the arrays of `TokenizedPool` take 50 bytes a row, and the
ids some 60 bytes for each distinct one. Rules, batches and the held-out split address rows by these at random.
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

from lark.answers.checker import Answer, Checker
from lark.common.cache import file_hash, identity_hash, read_json, write_json
from lark.common.errors import LarkError
from lark.common.groups import Groups
from lark.common.parts import Compute, in_parts
from lark.common.versions import CHECKING_LIBRARIES, formula_versions
from lark.pool.contamination import find_overlap, repeated_problems
from lark.pool.pool import arrow_column, extra_column, held_out, read_pool, text_column
from lark.pool.rows import find_files
from lark.student.chat import Chat, TokenizedTrajectory, truncate_trajectory
from lark.tasks.problems import read_problems
from lark.tasks.task import Say, Task

BATCH_ROWS, BATCH_CHARACTERS = 500, 2**19  # tokenised at once: as Python lists a token takes some 100 bytes


class TokenizedPool:
    """Reads, checks and tokenises the task's pool, or finds that done in `cache`.

    Arrays over the pool's rows: problem_id, candidate_id, length (tokens of the whole row), span_tokens (T, the
    trained ones), correct (1, 0 or NaN), is_held_out, fits (not overlong, not empty, not left out as an evaluation
    problem's). `dropped` counts rows by reason, `truncated` those cut to task.max_length, `verdicts` the `correct`
    filled in and the checks that timed out. `overlaps` tells of each evaluation set how many of its problems the pool
    has too, `repeated` lists the ids of problems that the pool asks under several ids.
    Raises LarkError when no candidate is left to choose from, and for task.overlap=error where problems overlap.
    """

    def __init__(self, task: Task, chat: Chat, *, cache: Path, say: Say = print):
        self.task, self.chat, self.cache = task, chat, cache
        source, self.evaluation_files = task.sources(cache, say)
        pool = read_pool(source, cache=cache, on_error=task.on_error, limit=task.limit)  # type: ignore[arg-type]
        self.rows, self.fingerprint = pool.rows, pool.fingerprint
        self.problem_id = text_column(self.rows, "problem_id")
        self.candidate_id = text_column(self.rows, "candidate_id")
        self.overlaps, self.repeated, in_sets = self._compared()
        self.correct, self.verdicts = self._verdicts()
        self.tokens = self._tokenised()
        self.length = self._number("length")
        self.span_tokens = self.length - np.maximum(self._number("prompt_tokens"), 1)
        self.truncated = int((self.length < self._number("full_length")).sum())
        self.fits = (self.length <= task.max_length) & (self.span_tokens > 0)
        self.is_held_out = held_out(self.problem_id, task.held_out)
        self.dropped = {**Counter(task.dropped(cache)) + Counter(pool.dropped), "overlong": int((~self.fits).sum())}
        if task.overlap == "drop" and in_sets:
            leave = np.fromiter((problem in in_sets for problem in self.problem_id), bool, len(self.problem_id))
            self.dropped["in an evaluation set"] = int((leave & self.fits).sum())
            self.fits &= ~leave
        self.left_out = sorted(in_sets) if task.overlap == "drop" else []
        self.scored = np.flatnonzero(self.fits & ~self.is_held_out)
        self._describe(say)
        self._describe_overlap(say, in_sets)
        if len(self.scored) == 0:
            raise LarkError(
                f"task.pool={source}: no candidate is left to choose from ({len(self.rows)} rows, "
                f"{self.dropped['overlong']} longer than task.max_length={task.max_length}, "
                + (f"{self.dropped['in an evaluation set']} of evaluation problems, " if self.left_out else "")
                + f"{int(self.is_held_out.sum())} held out); raise task.max_length or lower task.held_out"
            )

    def _describe(self, say: Say) -> None:
        candidates = Counter(self.problem_id)
        held = len(set(self.problem_id[self.is_held_out]))
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items() if n) or "none"
        single = sum(count == 1 for count in candidates.values())
        say(
            f"pool        {len(self.rows):,} trajectories of {len(candidates):,} problems ({held:,} held out), "
            f"{int(self.length.sum()):,} tokens, longest {int(self.length.max()):,}; dropped: {dropped}"
            + (f"; {int((self.correct == 0).sum()):,} known to be wrong" if (self.correct == 0).any() else "")
            + (f"; {self.truncated:,} cut to task.max_length" if self.truncated else "")
            + (f"; {self.verdicts['filled']:,} verdicts filled in by the checker" if self.verdicts["filled"] else "")
            + (f" ({self.verdicts['timed_out']:,} timed out)" if self.verdicts["timed_out"] else "")
            + (f"; {single:,} problems with one candidate" if single else "")
        )
        if len(self.scored):
            sample = self.chat.preview(self.read_tokens(self.scored[:1])[0], limit=24)
            say("sample      " + sample.replace("\n", "⏎") + "   («trained tokens»)")

    @property
    def identity(self) -> dict[str, Any]:
        """What a pass over these rows depends on, besides the student and, if it asks for steps, the step splitter."""
        task = self.task
        return {
            "pool": self.fingerprint,
            "held_out": task.held_out,
            "max_length": task.max_length,
            "overlong": task.overlong,
            **self.chat.span_identity,
            **({"left_out": identity_hash({"problems": self.left_out})} if self.left_out else {}),
        }

    def _tokenised(self) -> datasets.Dataset:
        cut = self.task.max_length if self.task.overlong != "drop" else None
        identity = {
            "pool": self.fingerprint,
            "overlong": [self.task.overlong, cut],
            **formula_versions("tokens", libraries=("transformers", "tokenizers")),
            **self.chat.identity,
        }
        return in_parts(
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
        limit = self.task.max_length
        too_long = [i for i, row in enumerate(rows) if len(row.input_ids) > limit]
        if too_long and self.task.overlong == "error":
            first = too_long[0]
            raise LarkError(
                f"{batch[first]['source']}: {len(rows[first].input_ids)} tokens, more than task.max_length={limit}; "
                "raise it, or set task.overlong=drop or truncate"
            )
        full_length = [len(row.input_ids) for row in rows]
        if self.task.overlong == "truncate":
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

    def _number(self, name: str) -> np.ndarray:
        return arrow_column(self.tokens, name).to_numpy().astype(np.int64)

    def read_tokens(self, rows: np.ndarray) -> list[TokenizedTrajectory]:
        """The rows' tokens, read from the memory-mapped file."""
        batch = self.tokens[rows.tolist()]
        columns = (batch["input_ids"], batch["prompt_tokens"], batch["end_of_turn"], batch["steps"])
        return [
            TokenizedTrajectory(input_ids=list(ids), prompt_tokens=prompt, end_of_turn=end, steps=list(steps))
            for ids, prompt, end, steps in zip(*columns, strict=True)
        ]

    def _verdicts(self) -> tuple[np.ndarray, dict[str, int]]:
        """Correct per row as 1, 0 or NaN; a null with a known answer is filled by the checker and counted. A check that
        runs out of time counts as wrong, and is counted too.
        """
        correct = pc.cast(arrow_column(self.rows, "correct"), pa.float64()).to_numpy().copy()  # null becomes NaN
        unknown = np.flatnonzero(np.isnan(correct) & arrow_column(self.rows, "answer").is_valid().to_numpy())
        if not len(unknown):
            return correct, {"filled": 0, "timed_out": 0}
        identity = {
            "pool": self.fingerprint,
            "checker": self.task.checker,
            "pattern": self.task.pattern,
            **formula_versions("verdicts", libraries=CHECKING_LIBRARIES),
        }
        found = in_parts(
            self.cache / "verdicts", identity, len(unknown), _VERDICTS, lambda: self._checking(unknown), "checking"
        )
        correct[unknown] = arrow_column(found, "correct").to_numpy()
        return correct, {"filled": len(unknown), "timed_out": int(arrow_column(found, "timed_out").to_numpy().sum())}

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
        """A pool column for Candidates: teacher, answer, text (the trajectory), correct (1, 0, NaN) or any further."""
        if name == "correct":
            return self.correct[rows]
        if name in ("teacher", "answer"):
            return text_column(self.rows, name)[rows]
        if name == "text":  # all that is asked for is in memory: ask for a block of rows at a time
            return np.array([turns[-1]["content"] for turns in self._messages(rows)], dtype=object)
        return extra_column(self.rows, name)[rows]

    def _messages(self, rows: np.ndarray) -> Iterator[list[dict[str, str]]]:
        messages = self.rows.select_columns(["messages"])
        for start in range(0, len(rows), BATCH_ROWS):
            yield from messages[rows[start : start + BATCH_ROWS].tolist()]["messages"]

    def _prompts(self) -> Iterator[tuple[str, str]]:
        """(id, what its last turn of the user asks) of each problem."""
        first = np.unique(Groups.from_ids(self.problem_id).index_N, return_index=True)[1]  # one row a problem
        for problem, messages in zip(self.problem_id[first], self._messages(first), strict=True):
            yield problem, next(turn["content"] for turn in reversed(messages[:-1]) if turn["role"] == "user")

    def _compared(self) -> tuple[dict[str, dict[str, Any]], list[list[str]], dict[str, str]]:
        """What evaluation sets and the pool have in common, what the pool asks twice, and the pool's problems (id ->
        set and id) that evaluation sets have; from the cache or by reading every problem once.
        """
        limit = self.task.eval_limit
        identity = {
            "pool": self.fingerprint,
            "sets": {name: _contents(path) for name, path in self.evaluation_files.items()},
            "eval_limit": limit,
            **formula_versions("overlap"),
        }
        path = self.cache / "overlap" / f"{identity_hash(identity)}.json"
        if not path.is_file():
            sets = {name: read_problems(file, limit=limit) for name, file in self.evaluation_files.items()}
            asked = {name: [(p["problem_id"], question_of(p)) for p in problems] for name, problems in sets.items()}
            found = find_overlap(asked, self._prompts())
            write_json(
                path,
                {
                    "identity": identity,
                    "problems": {name: len(problems) for name, problems in sets.items()},
                    "evaluation": found.evaluation,
                    "pool": found.pool,
                    "repeated": repeated_problems(self._prompts()),
                },
            )
        known = read_json(path)
        if known["pool"] and self.task.overlap == "error":
            remedy = "take them out, or set task.overlap=drop"
            raise LarkError(f"task.overlap=error: {_in_words(known['pool'])}; {remedy}")
        overlaps = {
            name: {
                "problems": known["problems"][name],
                "in_pool": len(ids),
                "share": len(ids) / known["problems"][name],
                "examples": ids[:20],
            }
            for name, ids in known["evaluation"].items()
        }
        return overlaps, known["repeated"], known["pool"]

    def _describe_overlap(self, say: Say, in_sets: dict[str, str]) -> None:
        counts = [f"{found['in_pool']:,} of {found['problems']:,} {name}" for name, found in self.overlaps.items()]
        if counts:
            say(f"overlap     evaluation problems that are in the pool: {', '.join(counts)}")
        if in_sets:
            left = "they are left out" if self.left_out else "task.overlap=drop leaves them out"
            say(f"warning     {_in_words(in_sets)}; {left}")
        if self.repeated:
            more = sum(map(len, self.repeated)) - len(self.repeated)
            say(
                f"warning     {more:,} problems of the pool are asked under another id too (first: "
                f"{', '.join(self.repeated[0][:3])}); give each question one id: rules choose within a problem, and "
                "held-out problems should be no others"
            )

    def read_rows(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        """Pool rows with `correct` as filled in, a few at a time."""
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
    """The bare text of an evaluation problem, or its last turn where there is none."""
    return problem.get("problem") or problem["messages"][-1]["content"]


def _in_words(in_sets: dict[str, str]) -> str:
    shown = ", ".join(f"{problem} ({place})" for problem, place in list(in_sets.items())[:3])
    more = " ..." if len(in_sets) > 3 else ""
    return f"{len(in_sets):,} problems of the pool are in evaluation sets: {shown}{more}"


def _contents(path: Path) -> list[str]:
    return [file_hash(file) for file in find_files(path, setting="task.eval").values()]
