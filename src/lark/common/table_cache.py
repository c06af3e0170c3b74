"""Tables that are computed once, kept on disk, and continued after a kill.

compute_table   one process computes the rows in order; the table is memory-mapped and read by row
merge_parts     ranks have written rows in any order (`write_part`); the table is one Parquet file in order of the
column
                `row`, read column by column (`read_columns`)

A part is an Arrow stream written by rename, and lost at most by a kill. A folder is complete once its manifest, written
last, is there. No table is ever whole in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark.common.cache import atomic_write, build_once, identity_hash, is_complete
from lark.common.progress_line import show_progress

PART_ROWS = 10_000  # of a part that `compute_table` writes
BATCH_ROWS, BATCH_BYTES = 1000, 2**24
"""A record batch of a part is written when either is reached. One is in memory at a time. Of mapped ones Arrow keeps
the places, 4 kB a batch, that is 4 bytes a row or more where rows are long.
"""
GROUP_ROWS, GROUP_BYTES = 8192, 2**24
"""A row group of a merged table has about so many bytes, however long its lists are, and at most so many rows."""
TABLE = "statistics.parquet"

Compute = Callable[[int, int], Iterator[pa.RecordBatch]]
"""Computes the rows from `start` to `stop` of a table, in order, a few at a time."""


class Columns(Mapping[str, np.ndarray]):
    """Arrays [N] by name, each read when first asked for and kept from then on.

    In memory is what has been asked for: 8 bytes a row of a column of numbers, of one of arrays what they hold and some
    120 bytes a row.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]):
        self._names, self._read = list(names), read
        self._known: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def without(self, *names: str) -> "Columns":
        return Columns([name for name in self if name not in names], self.__getitem__)


def filter_rows(columns: Mapping[str, np.ndarray], keep_N: np.ndarray) -> Columns:
    """Take the rows with keep_N true of every column; none is read for that."""
    return Columns(columns, lambda name: columns[name][keep_N])


# ---- parts


def write_part(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches as one Arrow stream, whole or not at all."""
    with (
        atomic_write(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in _join_batches(batches):
            writer.write_batch(batch)


def _join_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(b.num_rows for b in pending) >= BATCH_ROWS or sum(b.nbytes for b in pending) >= BATCH_BYTES:
            yield pa.concat_batches(pending)
            pending = []
    if pending:
        yield pa.concat_batches(pending)


def compute_table(
    folder: Path,
    identity: Mapping[str, Any],
    rows: int,
    schema: pa.Schema,
    worker: Callable[[], AbstractContextManager[Compute]],
    label: str,
) -> datasets.Dataset:
    """Return a table of `rows` rows, memory-mapped: as cached in `folder`/<hash of the identity>, or computed now.

    worker: opened once if a part is missing; gives what computes one. label: of the progress line.
    """
    identity = {**identity, "part_rows": PART_ROWS}
    folder = folder / identity_hash(identity)
    paths = {start: folder / f"part-{start:012}.arrow" for start in range(0, rows, PART_ROWS)}

    def write_missing_parts(_: Path) -> dict[str, Any]:
        for half_written in folder.glob(".part-*.tmp"):
            half_written.unlink()
        missing = {start: path for start, path in paths.items() if not path.exists()}
        if missing:
            done = sum(min(PART_ROWS, rows - start) for start in paths.keys() - missing.keys())
            with worker() as compute, show_progress(label, rows, "rows", initial=done) as progress:
                for start, path in missing.items():
                    stop = min(start + PART_ROWS, rows)
                    write_part(path, schema, _count_rows(compute(start, stop), stop - start, progress.update))
        return {"rows": rows}

    build_once(folder, identity, write_missing_parts, keep_partial=True)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths.values()])


def _count_rows(
    batches: Iterator[pa.RecordBatch], rows: int, advance: Callable[[int], Any]
) -> Iterator[pa.RecordBatch]:
    computed = 0
    for batch in batches:
        computed += batch.num_rows
        advance(batch.num_rows)
        yield batch
    assert computed == rows, f"{computed} rows computed instead of {rows}"


# ---- parts in any order of the rows


def write_rows(folder: Path, rows: list[dict[str, Any]], *, rank: int) -> None:
    """Write rows, numbered by their "row", as a part that belongs to one rank."""
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["row"]))
    write_part(folder / f"part-{rank}-{uuid4().hex}.arrow", table.schema, table.to_batches())


def list_parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.arrow"))


def read_row_numbers(folder: Path) -> np.ndarray:
    """List the rows that the parts hold (8 bytes a row); no other column is read from disk."""
    return np.concatenate([np.zeros(0, np.int64), *(_view(_map_part(path), "row") for path in list_parts(folder))])


def merge_parts(folder: Path, row_N: np.ndarray, *, summed: Iterable[str]) -> dict[str, Any]:
    """Write all parts as one table, ordered by row, and return the sums of the columns `summed`, which it lacks.

    A row group is in memory at a time. With the table grow the row numbers, 40 bytes a row, which are sorted to see
    that none is missing and to cut the groups, and what describes the mapped parts, 60 kB each.
    """
    parts = _drop_repeated_rows([_map_part(path) for path in list_parts(folder)])
    found_N = np.sort(np.concatenate([_view(part, "row") for part in parts]))
    assert np.array_equal(found_N, np.sort(row_N)), "the parts do not hold every row exactly once"
    sums = {name: sum(_view(part, name).sum().item() for part in parts) for name in summed}
    kept = [part.drop_columns(list(sums)) for part in parts]
    # A column of lists that are all empty in one part has no type of its own there.
    schema = pa.unify_schemas([part.schema for part in kept], promote_options="permissive")
    row_bytes = sum(part.nbytes for part in kept) // len(found_N)
    size = min(max(GROUP_BYTES // row_bytes, 1), GROUP_ROWS)
    with atomic_write(folder / TABLE) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(found_N), size):
            first, last = found_N[[start, min(start + size, len(found_N)) - 1]].tolist()
            slices = [_slice_rows(part, first, last) for part in kept]  # views: only the group is copied
            group = pa.concat_tables([schema.empty_table(), *slices], promote_options="permissive").combine_chunks()
            writer.write_table(group.take(np.argsort(group["row"].to_numpy())))
    return sums


def _map_part(path: Path) -> pa.Table:
    """Memory-map a part; the mapping outlives the file, so that any number of parts can be open."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def _view(part: pa.Table, name: str) -> np.ndarray:
    """View a column of numbers in the file."""
    return part[name].chunk(0).to_numpy()


def _drop_repeated_rows(parts: list[pa.Table]) -> list[pa.Table]:
    """Keep each row once. A rank that outlives its killed job may write rows that the next job computes too: equal but
    for rounding, so the first counts.
    """
    rows = [_view(part, "row") for part in parts]
    row_N = np.concatenate(rows)
    first_N = np.zeros(len(row_N), bool)
    first_N[np.unique(row_N, return_index=True)[1]] = True
    kept = np.split(first_N, np.cumsum([len(row) for row in rows])[:-1])
    pairs = zip(parts, kept, strict=True)
    once = [part if keep.all() else part.filter(pa.array(keep)).combine_chunks() for part, keep in pairs]
    return [part for part in once if len(part)]


def _slice_rows(part: pa.Table, first: int, last: int) -> pa.Table:
    start, stop = np.searchsorted(_view(part, "row"), (first, last + 1)).tolist()
    return part.slice(start, stop - start)


def read_columns(folder: Path) -> Columns:
    """Read a merged table lazily: columns [N] ordered by row; lists are object arrays of arrays."""
    assert is_complete(folder)
    return Columns(pq.read_schema(folder / TABLE).names, partial(_read_column, folder / TABLE))


def _read_column(path: Path, name: str) -> np.ndarray:
    with pq.ParquetFile(path) as file:
        return file.read(columns=[name])[name].to_numpy()


def read_row_groups(folder: Path) -> Iterator[pa.Table]:
    """Read a merged table a few rows at a time, without their numbers."""
    assert is_complete(folder)
    with pq.ParquetFile(folder / TABLE) as file:
        for i in range(file.num_row_groups):
            yield file.read_row_group(i).drop_columns(["row"])
