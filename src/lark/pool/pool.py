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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lark.common.cache import atomic_write, build_once, check_writable, identity_hash
from lark.common.errors import LarkError
from lark.common.progress_line import show_progress
from lark.common.versions import formula_versions
from lark.pool.files import find_files, hash_files, read_rows
from lark.pool.rows import FIELDS, Fault, RowError, describe_faults, normalise_row

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


class PoolError(LarkError):
    """A pool with faults: `faults` holds every one, the message shows each kind of mistake once."""

    def __init__(self, headline: str, faults: Sequence[Fault]):
        super().__init__(headline, faults)
        self.headline, self.faults = headline, list(faults)

    def __str__(self) -> str:
        return "\n  ".join([self.headline, *describe_faults(self.faults)])


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Checked rows in order of their ids, whatever order the files have, memory-mapped."""

    rows: datasets.Dataset
    """Columns as in `SCHEMA`; reading a row touches only its part of the file."""
    fingerprint: str
    """16 hex digits over the content of the rows, whatever their order and what their files are called."""
    text_fingerprint: str
    """The same over ids and messages alone, all that a student sees: a new teacher's name or column changes nothing."""
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

    source: a .jsonl, .json (one list), .parquet or .csv file, a folder of such files, a pattern with *, or a list of
        these.
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
        raise LarkError(f"task.limit={limit} is not a number of problems: set it to 1 or more, or to null for all")
    files = find_files(source, setting="task.pool")
    identity = {
        "files": hash_files(files, setting="task.pool"),
        "on_error": on_error,
        "limit": limit,
        **formula_versions("pool"),
    }
    shown = source if isinstance(source, str | Path) else f"[{','.join(map(str, source))}]"

    def write(folder: Path) -> dict[str, Any]:
        with atomic_write(folder / "pool.arrow") as path:
            facts = _write_rows(files, path, on_error=on_error, limit=limit, headline=f"task.pool={shown}")
            _sort_rows(path)
            return facts

    folder = check_writable(cache, "paths.cache") / "pools" / identity_hash(identity)
    manifest = build_once(folder, identity, write)
    return Pool(
        rows=datasets.Dataset.from_file(str(folder / "pool.arrow")),
        fingerprint=manifest["fingerprint"],
        text_fingerprint=manifest["text_fingerprint"],
        dropped=manifest["dropped"],
        faults=[Fault(**fault) for fault in manifest["faults"]],
    )


def mask_held_out(problem_ids: Sequence[str] | np.ndarray, share: float) -> np.ndarray:
    """Mark the rows that are held out: whole problems, chosen by the hash of their id alone.

    The round(share * problems) problems whose id has the smallest sha256, at least one of several when share > 0 and
    never all of them. Neither the order of rows nor their number a problem matters, and a larger share holds out a
    superset.

    problem_ids: [N], one a row. Returns bool [N]. Raises LarkError if share is outside [0, 1).
    """
    if not isinstance(share, int | float) or not 0 <= share < 1:
        raise LarkError(
            f"task.held_out={share} is not a share of problems: set it to at least 0 and below 1, such as .1"
        )
    # While it runs, about 300 bytes a problem; of a row only its byte of the mask.
    problems = sorted(set(map(str, problem_ids)), key=lambda problem: hashlib.sha256(problem.encode()).digest())
    count = max(round(share * len(problems)), int(share > 0))
    chosen = set(problems[: min(count, max(len(problems) - 1, 0))])
    return np.fromiter((str(problem) in chosen for problem in problem_ids), dtype=bool, count=len(problem_ids))


def read_arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """Return one column of memory-mapped rows without copying it."""
    return rows.select_columns([name]).with_format("arrow")[:][name]  # type: ignore[index]  (here a slice is a table)


def read_text_column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """Read a column of texts as an object array [N] (None where there is none), in which equal texts are one object.

    8 bytes a row and some 60 a distinct text (what ids, teachers and answers come to), 100 more while it is read.
    """
    column, start = np.empty(len(rows), dtype=object), 0
    seen: dict[str, str] = {}
    for chunk in read_arrow_column(rows, name).chunks:
        coded = chunk.dictionary_encode()
        texts = [seen.setdefault(text, text) for text in coded.dictionary.to_pylist()]
        index = coded.indices.fill_null(len(texts)).to_numpy()
        column[start : start + len(chunk)] = np.array([*texts, None], dtype=object)[index]
        start += len(chunk)
    return column


def read_extra_column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """Read one further column of the pool as an array [N], by rows.

    float64 with NaN where the column is absent if every value is a number or a bool, else object with None there.
    Raises LarkError if no row has the column. 32 bytes a row are needed to read numbers, of which 8 remain.
    """
    column = np.empty(len(rows), dtype=object)
    names: set[str] = set()
    texts = (text for chunk in read_arrow_column(rows, "extra").chunks for text in chunk.to_pylist())
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


def _write_rows(files: dict[str, Path], path: Path, *, on_error: str, limit: int | None, headline: str) -> dict:
    """Write the valid rows as an Arrow stream; returns what the manifest says of them. Raises PoolError."""
    report, contents, texts, count = _Report(), _UnorderedHash(), _UnorderedHash(), 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        batch, size = [], 0
        for row in _read_valid_rows(files, limit, report):
            content = contents.add([row[name] for name in FIELDS])
            texts.add([row[name] for name in ("problem_id", "candidate_id", "messages")])
            batch.append(row)
            count, size = count + 1, size + content
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
        "fingerprint": contents.hexdigest(),
        "text_fingerprint": texts.hexdigest(),
        "dropped": dict(report.dropped),
        "faults": [asdict(fault) for fault in report.faults],
    }


class _UnorderedHash:
    """Hashes rows whatever their order: by the sum of their digests."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, content: Any) -> int:
        """Add a row and return its size in bytes."""
        encoded = json.dumps(content, ensure_ascii=False).encode()
        self.total += int.from_bytes(hashlib.sha256(encoded).digest())
        return len(encoded)

    def hexdigest(self) -> str:
        return hashlib.sha256(str(self.total).encode()).hexdigest()[:16]


def _sort_rows(path: Path) -> None:
    """Put the rows of a stream into the order of their ids, shorter ids first, so that 2 comes before 10.

    Nothing that is computed from a pool can then depend on the order of its files. Rows are moved a batch at a time.
    """
    rows = datasets.Dataset.from_file(str(path)).with_format("arrow")
    keys: dict[str, pa.ChunkedArray] = {}
    for name in ("problem_id", "candidate_id"):
        ids = read_arrow_column(rows, name)
        keys |= {f"{name}_length": pc.utf8_length(ids), name: ids}  # type: ignore[attr-defined]
    order = pc.sort_indices(pa.table(keys), sort_keys=[(name, "ascending") for name in keys]).to_numpy()  # type: ignore[attr-defined]
    if np.array_equal(order, np.arange(len(order))):
        return
    size = max(1, min(BATCH_ROWS, BATCH_BYTES * len(order) // path.stat().st_size))
    with atomic_write(path) as sorted_path, pa.ipc.new_stream(str(sorted_path), SCHEMA) as writer:
        for start in range(0, len(order), size):
            batch: Any = rows[order[start : start + size].tolist()]
            writer.write_table(batch.cast(SCHEMA).combine_chunks())


@dataclass
class _Report:
    """What was wrong with the rows."""

    faults: list[Fault] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    broken_off: bool = False  # an unknown number of rows is lost

    def drop(self, faults: list[Fault]) -> None:
        self.faults += faults
        self.dropped[faults[0].reason] += 1


@dataclass(slots=True)
class _Problem:
    """What the first valid row of a problem says; later ones must agree with it."""

    prompt: bytes  # digest
    answer: str | None
    source: str


def _read_valid_rows(files: dict[str, Path], limit: int | None, report: _Report) -> Iterator[dict[str, Any]]:
    # Rows of a problem may stand anywhere in any file, so nothing can be forgotten before the end: some 300 bytes a
    # problem and 80 a row.
    problems: dict[str, _Problem] = {}
    candidates: set[bytes] = set()
    with show_progress("reading pool", sum(path.stat().st_size for path in files.values()) / 1e6, "MB") as progress:
        for file, path in files.items():
            line = None
            try:
                for line, raw in read_rows(path, lambda size: progress.update(size / 1e6)):
                    row, errors = ({}, [raw]) if isinstance(raw, RowError) else normalise_row(raw)
                    known = row.get("problem_id") in problems
                    if limit is not None and len(problems) >= limit and "problem_id" in row and not known:
                        continue
                    row["source"] = f"{file}:{line}"
                    if not errors and known:
                        errors = _find_contradictions(row, problems[row["problem_id"]], candidates)
                    if errors:
                        report.drop([error.at(file, line) for error in errors])
                        continue
                    if not known:
                        first = _Problem(_digest(row["messages"][:-1]), row["answer"], row["source"])
                        problems[row["problem_id"]] = first
                    candidates.add(_digest([row["problem_id"], row["candidate_id"]]))
                    yield row
            except RowError as error:
                report.broken_off = True
                report.drop([error.at(file, None)])
            else:
                if line is None:
                    error = RowError("row", "empty file", "the file holds no row: write rows to it or take it out")
                    report.drop([error.at(file, None)])


def _find_contradictions(row: dict[str, Any], first: _Problem, candidates: set[bytes]) -> list[RowError]:
    """List what a row says otherwise than the rows of its problem before it."""
    problem_id, candidate_id = row["problem_id"], row["candidate_id"]
    errors = []
    if _digest([problem_id, candidate_id]) in candidates:
        message = f"problem {problem_id} has a candidate {candidate_id} already: give each its own id"
        errors.append(RowError("candidate_id", "duplicate candidate_id", message))
    where = f"problem {problem_id} in {first.source}: make them equal"
    if _digest(row["messages"][:-1]) != first.prompt:
        message = f"the turns before the last differ from those of {where}"
        errors.append(RowError("messages", "different prompt", message))
    if row["answer"] != first.answer:
        errors.append(RowError("answer", "different answer", f"{row['answer']} is not the answer of {where}"))
    return errors


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()
