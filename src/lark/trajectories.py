"""The pool as the student sees it: rows, tokens, verdicts, which of them are held out, which fit.

Everything is memory-mapped Arrow but for a few numbers a row (ids, lengths, verdicts; about 100 bytes each).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from lark.cache import complete, identity_hash, lock, read_json, replacing, source_hash, write_json
from lark.chat import Chat, Encoded, truncated
from lark.pool import extra_column, held_out, read_pool
from lark.tasks.files import Task
from lark.verify import Answer, Checker

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
        self.problem_id = np.array(self.rows["problem_id"][:], dtype=object)
        self.candidate_id = np.array(self.rows["candidate_id"][:], dtype=object)
        self.correct, self.verdicts = self._verdicts()
        self.tokens = self._tokenised()
        numbers = self.tokens.select_columns(["length", "prompt_tokens", "full_length"]).with_format("numpy")[:]
        self.length = np.asarray(numbers["length"], np.int64)
        self.span_tokens = self.length - np.maximum(np.asarray(numbers["prompt_tokens"], np.int64), 1)
        self.truncated = int((self.length < np.asarray(numbers["full_length"])).sum())
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
        problems, candidates = np.unique(self.problem_id.astype(str), return_counts=True)
        held = len(set(self.problem_id[self.is_held_out]))
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items() if n) or "none"
        single = int((candidates == 1).sum())
        say(
            f"pool        {len(self.rows):,} trajectories of {len(problems):,} problems ({held:,} held out), "
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
        folder = self.cache / "tokens" / identity_hash(identity)
        with lock(folder):
            if not complete(folder):
                folder.mkdir(parents=True, exist_ok=True)
                rows = self.rows.select_columns(["messages", "source"])
                with replacing(folder / "tokens.arrow") as temporary:
                    rows.map(
                        self._tokenise_batch,
                        batched=True,
                        batch_size=500,
                        remove_columns=rows.column_names,
                        cache_file_name=str(temporary),
                        features=_TOKEN_FEATURES,
                        desc="tokenising",
                    )
                write_json(folder / "manifest.json", identity)
        return datasets.Dataset.from_file(str(folder / "tokens.arrow"))

    def _tokenise_batch(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = self.chat.encode(batch["messages"])
        limit = self.task.max_length
        too_long = [i for i, row in enumerate(rows) if len(row.input_ids) > limit]
        if too_long and self.task.overlong == "error":
            first = too_long[0]
            raise ValueError(
                f"{batch['source'][first]}: {len(rows[first].input_ids)} tokens, more than task.max_length={limit}; "
                "raise it, or set task.overlong=drop or truncate"
            )
        full_length = [len(row.input_ids) for row in rows]
        if self.task.overlong == "truncate":
            rows = [truncated(row, limit) if len(row.input_ids) > limit else row for row in rows]
        return {
            "input_ids": [row.input_ids for row in rows],
            "prompt_tokens": [row.prompt_tokens for row in rows],
            "end_of_turn": [row.end_of_turn for row in rows],
            "steps": [row.steps for row in rows],
            "length": [len(row.input_ids) for row in rows],
            "full_length": full_length,
        }

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
        correct = np.array([np.nan if c is None else float(c) for c in self.rows["correct"][:]])
        answers = self.rows["answer"][:]
        unknown = [i for i in np.flatnonzero(np.isnan(correct)).tolist() if answers[i] is not None]
        if not unknown:
            return correct, {"filled": 0, "timed_out": 0}
        identity = {
            "pool": self.fingerprint,
            "checker": self.task.checker,
            "pattern": self.task.pattern,
            "sources": source_hash(["verify"]),
        }
        path = self.cache / "verdicts" / f"{identity_hash(identity)}.json"
        with lock(path):
            if not path.exists():
                with Checker(self.task.checker, pattern=self.task.pattern) as checker:
                    verdicts = [
                        verdict
                        for start in range(0, len(unknown), 1000)
                        for verdict in checker.check(self._answers(unknown[start : start + 1000]))
                    ]
                timed_out = sum(v.timed_out for v in verdicts)
                write_json(path, {"correct": [v.correct for v in verdicts], "timed_out": timed_out})
        found = read_json(path)
        correct[unknown] = found["correct"]
        return correct, {"filled": len(unknown), "timed_out": found["timed_out"]}

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
            return np.array(self.rows.select_columns([name])[rows.tolist()][name], dtype=object)
        if name == "text":
            messages = self.rows.select_columns(["messages"])[rows.tolist()]["messages"]
            return np.array([turns[-1]["content"] for turns in messages], dtype=object)
        return extra_column(self.rows, name)[rows]

    def overlap(self, problems: list[dict[str, Any]]) -> int:
        """Evaluation problems whose text is, but for case and white space, the prompt of a problem of the pool."""
        first = np.unique(self.problem_id.astype(str), return_index=True)[1]
        seen: set[int] = set()  # hashes: 60 bytes a problem
        for start in range(0, len(first), 1000):
            for messages in self.rows[first[start : start + 1000].tolist()]["messages"]:
                seen.add(hash(_plain_text(messages[-2]["content"])))
        return sum(hash(_plain_text(p.get("problem") or p["messages"][-1]["content"])) in seen for p in problems)

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


_TOKEN_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "prompt_tokens": datasets.Value("int32"),
        "end_of_turn": datasets.Value("int32"),
        "steps": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "full_length": datasets.Value("int32"),
    }
)


def _plain_text(text: str) -> str:
    return " ".join(text.lower().split())
