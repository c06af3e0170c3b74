"""The pool as the student sees it: rows, tokens, verdicts, which of them are held out, which fit.

Everything is memory-mapped Arrow but for a few numbers a row: the arrays of `Trajectories` take 50 bytes a row, and the
ids some 60 bytes for each distinct one. Rules, batches and the held-out split address rows by these at random.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lark.cache import source_hash
from lark.chat import Chat, Encoded, truncated
from lark.groups import Groups
from lark.parts import Compute, in_parts
from lark.pool import arrow_column, extra_column, held_out, read_pool, text_column
from lark.tasks.files import Task
from lark.verify import Answer, Checker

BATCH_ROWS, BATCH_CHARACTERS = 500, 2**19  # tokenised at once: as Python lists a token takes some 100 bytes

Say = Callable[[str], None]
"""How derived facts reach the user (print on rank 0, nothing elsewhere)."""


class Trajectories:
    """Reads, checks and tokenises the task's pool, or finds that done in `cache`.

    Arrays over the pool's rows: problem_id, candidate_id, length (tokens of the whole row), span_tokens (T, the
    trained ones), correct (1, 0 or NaN), is_held_out, fits (not overlong, not empty). `dropped` counts rows by reason,
    `truncated` those cut to task.max_length, `verdicts` the `correct` filled in and the checks that timed out.
    Raises ValueError when no candidate is left to choose from.
    """

    def __init__(self, task: Task, chat: Chat, *, cache: Path, say: Say = print):
        self.task, self.chat, self.cache = task, chat, cache
        source, self.evaluation_files = task.sources(cache)
        pool = read_pool(source, cache=cache, on_error=task.on_error, limit=task.limit)  # type: ignore[arg-type]
        self.rows, self.fingerprint = pool.rows, pool.fingerprint
        self.problem_id = text_column(self.rows, "problem_id")
        self.candidate_id = text_column(self.rows, "candidate_id")
        self.correct, self.verdicts = self._verdicts()
        self.tokens = self._tokenised()
        self.length = self._number("length")
        self.span_tokens = self.length - np.maximum(self._number("prompt_tokens"), 1)
        self.truncated = int((self.length < self._number("full_length")).sum())
        self.fits = (self.length <= task.max_length) & (self.span_tokens > 0)
        self.is_held_out = held_out(self.problem_id, task.held_out)
        self.scored = np.flatnonzero(self.fits & ~self.is_held_out)
        self.dropped = {**pool.dropped, "overlong": int((~self.fits).sum())}
        self._describe(say)
        if len(self.scored) == 0:
            raise ValueError(
                f"task.pool={source}: no candidate is left to choose from ({len(self.rows)} rows, "
                f"{self.dropped['overlong']} longer than task.max_length={task.max_length}, "
                f"{int(self.is_held_out.sum())} held out); raise task.max_length or lower task.held_out"
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
            sample = self.chat.marked(self.encoded(self.scored[:1])[0], limit=24)
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
        }

    def _tokenised(self) -> datasets.Dataset:
        cut = self.task.max_length if self.task.overlong != "drop" else None
        identity = {
            "pool": self.fingerprint,
            "overlong": [self.task.overlong, cut],
            "sources": source_hash(["chat", "trajectories"]),
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
            raise ValueError(
                f"{batch[first]['source']}: {len(rows[first].input_ids)} tokens, more than task.max_length={limit}; "
                "raise it, or set task.overlong=drop or truncate"
            )
        full_length = [len(row.input_ids) for row in rows]
        if self.task.overlong == "truncate":
            rows = [truncated(row, limit) if len(row.input_ids) > limit else row for row in rows]
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

    def encoded(self, rows: np.ndarray) -> list[Encoded]:
        """The rows' tokens, read from the memory-mapped file."""
        batch = self.tokens[rows.tolist()]
        columns = (batch["input_ids"], batch["prompt_tokens"], batch["end_of_turn"], batch["steps"])
        return [
            Encoded(input_ids=list(ids), prompt_tokens=prompt, end_of_turn=end, steps=list(steps))
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
            "sources": source_hash(["answers", "verify"]),
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

    def overlap(self, problems: list[dict[str, Any]]) -> int:
        """Evaluation problems whose text is, but for case and white space, the prompt of a problem of the pool."""
        asked = Counter(_plain_text(p.get("problem") or p["messages"][-1]["content"]) for p in problems)
        first = np.unique(Groups.from_ids(self.problem_id).index_N, return_index=True)[1]  # one row a problem
        prompts = (_plain_text(messages[-2]["content"]) for messages in self._messages(first))
        return sum(asked[text] for text in set(filter(asked.__contains__, prompts)))

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


def _plain_text(text: str) -> str:
    return " ".join(text.lower().split())
