"""The pool as the student sees it: tokens, which rows are held out, which fit.

Everything is memory-mapped Arrow but for a few numbers a row: the arrays of `TokenizedPool` take 50 bytes a row, and
the ids some 60 bytes for each distinct one. Rules, batches and the held-out split address rows by these at random.
"""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from lark.answers.workers import make_process_context
from lark.common.errors import LarkError
from lark.common.log import announce, logger
from lark.common.table_cache import Compute, compute_table
from lark.common.versions import formula_versions
from lark.pool.pool import mask_held_out, read_arrow_column
from lark.student.chat import Chat, TokenizedTrajectory, truncate_trajectory
from lark.student.checked_pool import CheckedPool
from lark.tasks.task import Task

BATCH_ROWS, BATCH_CHARACTERS = 500, 2**19  # tokenised at once: as Python lists a token takes some 100 bytes
PARALLEL_ROWS = 20_000
"""From so many rows on, every core tokenises: starting the processes takes some ten seconds."""
CHUNK_ROWS = 100  # given to a process at a time


class TokenizedPool(CheckedPool):
    """Tokenises a checked pool, or finds that done in `cache`.

    Arrays over the pool's rows: length (tokens of the whole row), span_tokens (T, the trained ones), is_held_out, fits
    (not overlong, not empty, not left out as an evaluation problem's). `scored` are the rows that rules may choose
    from, `truncated` counts those cut to task.max_length.
    Raises LarkError when no candidate is left to choose from.
    """

    def __init__(self, task: Task, chat: Chat, *, cache: Path):
        super().__init__(task, cache=cache)
        self.chat = chat
        self.tokens = self._tokenise_pool()
        self.length = self._number("length")
        self.span_tokens = self.length - np.maximum(self._number("prompt_tokens"), 1)
        self.truncated = int((self.length < self._number("full_length")).sum())
        self.fits = (self.length <= task.max_length) & (self.span_tokens > 0)
        self._check_length()
        self.is_held_out = mask_held_out(self.problem_id, task.held_out)
        self.dropped["overlong"] = int((~self.fits).sum())
        self.left_out = sorted(self.in_sets) if task.overlap == "drop" else []
        if self.left_out:
            leave = np.array([problem in self.in_sets for problem in self.problem_id])
            self.dropped["in an evaluation set"] = int((leave & self.fits).sum())
            self.fits &= ~leave
        self.scored = np.flatnonzero(self.fits & ~self.is_held_out)
        if len(self.scored) == 0:
            raise LarkError(
                f"task.pool={self.source}: no candidate is left to choose from ({len(self.rows)} rows, "
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
            self.cache / "tokens", identity, len(self.rows), _TOKENS, self._open_tokenising, "tokenising"
        )

    @contextmanager
    def _open_tokenising(self) -> Iterator[Compute]:
        """Open what tokenises rows: this process, or one on each core where the pool is worth starting them."""
        tokenise = partial(tokenise_rows, self.rows.select_columns(["messages"]), self.chat, self._cut)
        cores = count_cores()
        if cores == 1 or len(self.rows) < PARALLEL_ROWS:
            yield tokenise
            return
        logger.info("tokenising on %d cores", cores)
        context = make_process_context(["lark.student.tokenized_pool"])
        with ProcessPoolExecutor(cores, context, _start_tokenising, (tokenise,)) as workers:

            def compute(start: int, stop: int) -> Iterator[pa.RecordBatch]:
                for batches in workers.map(_tokenise_in_worker, *_cut_range(start, stop, CHUNK_ROWS)):
                    yield from batches

            yield compute

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


def count_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenise_rows(
    rows: datasets.Dataset, chat: Chat, cut_to: int | None, start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    """Yield the tokens of rows `start` to `stop`, a few rows at a time.

    rows: with `messages`.   cut_to: tokens that longer rows are cut to; None: they are not.
    """
    batch, characters = [], 0
    row: Any
    for row in rows.select(range(start, stop)):
        batch.append(row["messages"])
        characters += sum(len(message["content"]) for message in row["messages"])
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_ROWS:
            yield _tokenise_batch(batch, chat, cut_to)
            batch, characters = [], 0
    if batch:
        yield _tokenise_batch(batch, chat, cut_to)


def _tokenise_batch(conversations: list[Any], chat: Chat, cut_to: int | None) -> pa.RecordBatch:
    rows = chat.encode(conversations)
    full_length = [len(row.input_ids) for row in rows]
    if cut_to is not None:
        rows = [truncate_trajectory(row, cut_to) if len(row.input_ids) > cut_to else row for row in rows]
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "prompt_tokens": [row.prompt_tokens for row in rows],
        "end_of_turn": [row.end_of_turn for row in rows],
        "steps": [row.steps for row in rows],
        "length": [len(row.input_ids) for row in rows],
        "full_length": full_length,
    }
    return pa.RecordBatch.from_pydict(columns, schema=_TOKENS)


_worker_tokenise: Compute  # of a process that `_start_tokenising` has prepared


def _start_tokenising(tokenise: Compute) -> None:
    global _worker_tokenise
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process has one core
    _worker_tokenise = tokenise


def _tokenise_in_worker(start: int, stop: int) -> list[pa.RecordBatch]:
    return list(_worker_tokenise(start, stop))


def _cut_range(start: int, stop: int, size: int) -> tuple[list[int], list[int]]:
    """Return where pieces of `size` rows begin and end."""
    starts = list(range(start, stop, size))
    return starts, [*starts[1:], stop]


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
