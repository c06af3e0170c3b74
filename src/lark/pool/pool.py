"""Pools: rows checked, normalised and kept in one memory-mapped Arrow file.

A row is one candidate (trajectory) of one problem:

    {"problem_id": "17", "candidate_id": "0", "teacher": "qwen3-8b" | null, "answer": "42" | null,
     "correct": true | false | null, "messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}], ...}

Ids may be integers and are stored as strings, answers may be numbers and are stored as strings, `messages` may be a
JSON string. The columns not named above are carried along as one JSON string, `extra`, so that files with different
further columns fit into one table; there a null (or NaN) counts as absent.
"""

import hashlib
import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

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
from lark.common.progress_line import show_progress
from lark.common.versions import formula_versions
from lark.pool.rows import FIELDS, Advance, Fault, RowError, find_files, normalise, read_rows

SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("candidate_id", pa.string()),
        ("teacher", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("extra", pa.string()),  # the further columns, one JSON object
        ("source", pa.string()),  # file:line, for messages to the user; no part of the fingerprint
    ]
)
BATCH_ROWS, BATCH_BYTES = 1000, 2**24  # written at once, whichever is reached first; mapped, a batch takes 5 kB
SHOWN_FAULTS = 20


class PoolError(LarkError):
    """A pool with faults: `faults` holds every one, the message shows the first 20."""

    def __init__(self, headline: str, faults: Sequence[Fault]):
        super().__init__(headline, faults)
        self.headline, self.faults = headline, list(faults)

    def __str__(self) -> str:
        lines = [self.headline, *map(str, self.faults[:SHOWN_FAULTS])]
        if len(self.faults) > SHOWN_FAULTS:
            lines.append(f"... and {len(self.faults) - SHOWN_FAULTS} more")
        return "\n  ".join(lines)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Checked rows in file order, memory-mapped."""

    rows: datasets.Dataset
    """Columns as in `SCHEMA`; reading a row touches only its part of the file."""
    fingerprint: str
    """16 hex digits over the content of the rows in order, whatever their files are called and written in."""
    dropped: dict[str, int]
    """Reason -> rows dropped for it; a row counts once, under its first fault ("empty file" counts files)."""
    faults: list[Fault]
    """The faults of what was dropped."""


def read_pool(
    source: str | Path | Sequence[str | Path],
    *,
    cache: str | Path,
    on_error: Literal["raise", "drop"] = "raise",
    limit: int | None = None,
) -> Pool:
    """Read a pool, or open it as it was once read from files of the same contents.

    source: a .jsonl, .json (one list) or .parquet file, a folder of such files, a glob, or a list of these.
    cache: folder of caches (`paths.cache`); the rows go to `<cache>/pools/<hash of the identity>/pool.arrow`.
    on_error: "drop" leaves faulty rows out and counts them; of rows of a problem that contradict each other the first
        one holds.
    limit: only the first `limit` problems that have a valid row, in file order. Their rows need not stand together, so
        files are read to their end; rows of further problems are neither checked nor counted.

    Raises PoolError with all faults under "raise". Under "drop" as well if no row is left, or if a file breaks off (a
    broken JSON list, damaged Parquet), because nobody knows how many rows that loses. Raises LarkError naming the
    setting for a file that does not exist or has an unknown ending and for settings out of range.
    """
    if on_error not in ("raise", "drop"):
        raise LarkError(f"task.on_error={on_error} is unknown: set it to raise or drop")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise LarkError(f"task.limit={limit} is no number of problems: set it to 1 or more, or to null for all")
    files = find_files(source, setting="task.pool")
    identity = {
        "files": _contents(files),
        "on_error": on_error,
        "limit": limit,
        **formula_versions("pool"),
    }
    folder = check_writable(cache, "paths.cache") / "pools" / identity_hash(identity)
    if not is_complete(folder):
        with hold_lock(folder):
            if not is_complete(folder):  # else another process has written it while this one waited
                shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
                shown = source if isinstance(source, str | Path) else f"[{','.join(map(str, source))}]"
                outcome = _write(files, folder, on_error=on_error, limit=limit, headline=f"task.pool={shown}")
                write_json(folder / "manifest.json", {"identity": identity, **outcome})
    manifest = read_json(folder / "manifest.json")
    return Pool(
        rows=datasets.Dataset.from_file(str(folder / "pool.arrow")),
        fingerprint=manifest["fingerprint"],
        dropped=manifest["dropped"],
        faults=[Fault(**fault) for fault in manifest["faults"]],
    )


def held_out(problem_ids: Sequence[str] | np.ndarray, share: float) -> np.ndarray:
    """Which rows are held out: whole problems, chosen by the hash of their id alone.

    The round(share * problems) problems whose id has the smallest sha256, at least one of several when share > 0 and
    never all of them. Neither the order of rows nor their number a problem matters, and a larger share holds out a
    superset.

    problem_ids: [N], one a row. Returns bool [N]. Raises LarkError if share is outside [0, 1).
    """
    if not isinstance(share, int | float) or not 0 <= share < 1:
        raise LarkError(f"task.held_out={share} is no share of problems: set it to at least 0 and below 1, such as .1")
    # While it runs, about 300 bytes a problem; of a row only its byte of the mask.
    problems = sorted(set(map(str, problem_ids)), key=lambda problem: hashlib.sha256(problem.encode()).digest())
    count = max(round(share * len(problems)), int(share > 0))
    chosen = set(problems[: min(count, max(len(problems) - 1, 0))])
    return np.fromiter((str(problem) in chosen for problem in problem_ids), dtype=bool, count=len(problem_ids))


def arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """One column of memory-mapped rows, of which nothing is copied."""
    return rows.select_columns([name]).with_format("arrow")[:][name]  # type: ignore[index]  (here a slice is a table)


def text_column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """A column of texts as an object array [N] (None where there is none), in which equal texts are one object: 8 bytes
    a row and some 60 a distinct text (what ids, teachers and answers come to), 100 more while it is read.
    """
    column, start = np.empty(len(rows), dtype=object), 0
    seen: dict[str, str] = {}
    for chunk in arrow_column(rows, name).chunks:
        coded = chunk.dictionary_encode()
        texts = [seen.setdefault(text, text) for text in coded.dictionary.to_pylist()]
        index = coded.indices.fill_null(len(texts)).to_numpy()
        column[start : start + len(chunk)] = np.array([*texts, None], dtype=object)[index]
        start += len(chunk)
    return column


def extra_column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """One further column of the pool as an array [N], by rows.

    float64 with NaN where the column is absent if every value is a number or a bool, else object with None there.
    Raises LarkError if no row has the column. 32 bytes a row are needed to read numbers, of which 8 remain.
    """
    column = np.empty(len(rows), dtype=object)
    names: set[str] = set()
    texts = (text for chunk in arrow_column(rows, "extra").chunks for text in chunk.to_pylist())
    for i, extra in enumerate(map(json.loads, texts)):
        column[i] = extra.get(name)
        names.update(extra)
    if name not in names:
        raise LarkError(
            f"the pool has no column {name} (wanted by a rule's filter, prior or score); its further columns are "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    if all(value is None or isinstance(value, int | float) for value in column):
        return column.astype(np.float64)  # None becomes NaN
    return column


def _contents(files: dict[str, Path]) -> list[list[Any]]:
    """Name, size and hash of each file; a pool is known by what is in it."""
    contents = []
    with show_progress("comparing pool", sum(path.stat().st_size for path in files.values()) / 1e6, "MB") as progress:
        for name, path in files.items():
            size = path.stat().st_size
            try:
                contents.append([name, size, file_hash(path)])
            except OSError as error:
                remedy = "set it to a readable file"
                raise LarkError(f"task.pool={path} cannot be read ({error.strerror}): {remedy}") from error
            progress.update(size // 10**6)
    return contents


@dataclass
class _Report:
    faults: list[Fault] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    broken_off: bool = False  # an unknown number of rows is lost

    def drop(self, faults: list[Fault]) -> None:
        self.faults += faults
        self.dropped[faults[0].reason] += 1


def _write(files: dict[str, Path], folder: Path, *, on_error: str, limit: int | None, headline: str) -> dict[str, Any]:
    """Write the valid rows to `folder`/pool.arrow; returns what the manifest says of them. Raises PoolError."""
    report, digest, count = _Report(), hashlib.sha256(), 0
    with atomic_write(folder / "pool.arrow") as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            batch, size = [], 0
            for row in _valid_rows(files, limit, report):
                content = json.dumps([row[name] for name in FIELDS], ensure_ascii=False).encode()
                digest.update(content + b"\n")
                batch.append(row)
                count, size = count + 1, size + len(content)
                if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
                    batch, size = [], 0
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
        headline += f" has {len(report.faults)} {'fault' if len(report.faults) == 1 else 'faults'}"
        if report.broken_off:
            raise PoolError(f"{headline}, and a file that breaks off: repair or remove that file", report.faults)
        if report.faults and on_error == "raise":
            remedy = "correct them, or set task.on_error=drop to leave what is faulty out"
            raise PoolError(f"{headline}: {remedy}", report.faults)
        if not count:
            raise PoolError(f"{headline} and no valid row: correct the rows or set task.pool to others", report.faults)
    return {
        "rows": count,
        "fingerprint": digest.hexdigest()[:16],
        "dropped": dict(report.dropped),
        "faults": [asdict(fault) for fault in report.faults],
    }


def _valid_rows(files: dict[str, Path], limit: int | None, report: _Report) -> Iterator[dict[str, Any]]:
    ledger = _Ledger(list(files), limit)
    with _counting(files) as advance:
        for number, (file, path) in enumerate(files.items()):
            line = None
            try:
                for line, raw in read_rows(path, advance):
                    row, errors = ({}, [raw]) if isinstance(raw, RowError) else normalise(raw)
                    if ledger.is_beyond_limit(row.get("problem_id")):
                        continue
                    row["source"] = f"{file}:{line}"
                    errors = errors or ledger.enter(row, number, line)
                    if errors:
                        report.drop([error.at(file, line) for error in errors])
                    else:
                        yield row
            except RowError as error:
                report.broken_off = True
                report.drop([error.at(file, error.line)])
            else:
                if line is None:
                    error = RowError("row", "empty file", "the file holds no row: write rows to it or take it out")
                    report.drop([error.at(file, None)])


@contextmanager
def _counting(files: dict[str, Path]) -> Iterator[Advance]:
    """A progress line of rows, whose number is estimated from the bytes of those read so far."""
    size = sum(path.stat().st_size for path in files.values())
    rows = read = 0
    with show_progress("reading pool", 0, "rows") as progress:

        def advance(taken: float) -> None:
            nonlocal rows, read
            rows, read = rows + 1, read + taken
            progress.total = max(rows, round(rows * size / read))
            progress.update()

        yield advance


class _Ledger:
    """What the valid rows so far say of their problems.

    The only part of reading that grows with the pool, by digests rather than texts: about 20 bytes a row and 250 a
    problem (measured), that is 0.45 GB for ten million rows of one million problems. Rows of a problem may stand
    anywhere in any file, so nothing can be forgotten before the end. (Faults are kept too: they are to be mended.)
    """

    HEAD = struct.Struct("16s16sIQ")  # digests of prompt and answer, file and line of the first row

    def __init__(self, files: Sequence[str], limit: int | None):
        self.files, self.limit = files, limit
        self.problems: dict[str, bytearray] = {}  # id -> head, then the digests of the candidates' ids

    def is_beyond_limit(self, problem_id: str | None) -> bool:
        full = self.limit is not None and len(self.problems) >= self.limit
        return full and problem_id is not None and problem_id not in self.problems

    def enter(self, row: dict[str, Any], file: int, line: int) -> list[RowError]:
        """Enter a row that stands there; returns its contradictions to the rows before, and enters nothing if there are
        any.
        """
        problem_id, candidate_id = row["problem_id"], row["candidate_id"]
        candidate, prompt, answer = map(_digest, (candidate_id, row["messages"][:-1], row["answer"]))
        entry = self.problems.get(problem_id)
        if entry is None:
            self.problems[problem_id] = bytearray(self.HEAD.pack(prompt, answer, file, line) + candidate)
            return []
        first_prompt, first_answer, first_file, first_line = self.HEAD.unpack_from(entry)
        first = f"{self.files[first_file]}:{first_line}"
        errors = []
        if entry.find(candidate, self.HEAD.size) >= 0:
            message = f"problem {problem_id} has a candidate {candidate_id} already: give each its own id"
            errors.append(RowError("candidate_id", "duplicate candidate_id", message))
        if prompt != first_prompt:
            message = f"the turns before the last differ from those of problem {problem_id} in {first}: make them equal"
            errors.append(RowError("messages", "different prompt", message))
        if answer != first_answer:
            message = f"{row['answer']} is not the answer of problem {problem_id} in {first}: make them equal"
            errors.append(RowError("answer", "different answer", message))
        if not errors:
            entry += candidate
        return errors


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()
