"""What a pass has measured, on disk: shards while it runs, one table once it is complete.

A shard is an Arrow file ordered by row, whose pages are read from disk as they are touched. The table is a Parquet file
written a few rows at a time. Neither is ever whole in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark.common.cache import atomic_write, is_complete
from lark.scoring.columns import Columns

COST_COLUMNS = ("forward_tokens", "backward_tokens", "computed_tokens", "seconds")
"""Of each row while it is computed; the manifest holds their sums."""
MEANS = {"loss": "sum_surprisal", "brier": "sum_brier", "entropy": "sum_entropy"}
"""Means over the span and the sums they come from."""
BLOCK_BYTES, BLOCK_ROWS = 2**24, 8192
"""What is merged at a time, and a row group of the table: about so many bytes, however many steps or tokens a row has,
and at most so many rows.
"""


def write_shard(folder: Path, rank: int, rows: Sequence[dict[str, Any]]) -> None:
    """Rows that one rank has measured, in a file of its own."""
    ordered = sorted(rows, key=lambda row: row["row"])
    table = pa.Table.from_pylist(ordered)
    with (
        atomic_write(folder / f"part-{rank}-{ordered[0]['row']}-{uuid4().hex[:8]}.arrow") as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)  # as one batch and uncompressed: else it could not be mapped into memory


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.arrow"))


def remove_shards(folder: Path) -> None:
    for part in _shards(folder):
        part.unlink()


def _open(shard: Path) -> pa.Table:
    """The shard's rows, memory-mapped; the mapping outlives the file, so that any number of shards can be open."""
    with pa.memory_map(str(shard)) as file:
        return pa.ipc.open_file(file).read_all()


def rows_done(folder: Path) -> np.ndarray:
    """Row numbers that the shards in `folder` hold (8 bytes a row); no other column is read from disk."""
    parts = [_numbers(_open(path), "row") for path in _shards(folder)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _once(parts: list[pa.Table]) -> list[pa.Table]:
    """The parts with each row once. A rank that outlives its killed job may write rows that the next job computes too:
    equal but for rounding, so the first counts.
    """
    rows = [_numbers(part, "row") for part in parts]
    row_N = np.concatenate(rows)
    first_N = np.zeros(len(row_N), bool)
    first_N[np.unique(row_N, return_index=True)[1]] = True
    kept = np.split(first_N, np.cumsum([len(row) for row in rows])[:-1])
    pairs = zip(parts, kept, strict=True)
    once = [part if keep.all() else part.filter(pa.array(keep)).combine_chunks() for part, keep in pairs]
    return [part for part in once if len(part)]


def merge(folder: Path, wanted: np.ndarray) -> dict[str, Any]:
    """All shards into statistics.parquet, ordered by row, and the sums of their costs.

    A block of rows is in memory at a time. With the pool grow the row numbers, 40 bytes a row, which are sorted to see
    that none is missing and to cut the blocks, and what describes the mapped shards, 60 kB each (100 bytes a row of
    shards of 512), because every block draws on all of them.
    """
    parts = _once([_open(path) for path in _shards(folder)])
    row_N = np.sort(np.concatenate([_numbers(part, "row") for part in parts]))
    assert np.array_equal(row_N, np.sort(wanted)), "the probe's shards do not hold every row exactly once"
    cost = {name: sum(_numbers(part, name).sum().item() for part in parts) for name in COST_COLUMNS}
    kept = [part.drop_columns(list(COST_COLUMNS)) for part in parts]
    # A column of lists that are all empty in one shard has no type of its own there.
    schema = pa.unify_schemas([part.schema for part in kept], promote_options="permissive")
    size = 8 * sum(map(_values, kept)) // len(row_N)  # exact, so that the table does not depend on the shards
    length = min(max(BLOCK_BYTES // size, 1), BLOCK_ROWS)
    with atomic_write(folder / "statistics.parquet") as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(row_N), length):
            first, last = row_N[[start, min(start + length, len(row_N)) - 1]].tolist()
            slices = [_between(part, first, last) for part in kept]
            block = pa.concat_tables([schema.empty_table(), *slices], promote_options="permissive").combine_chunks()
            writer.write_table(block.take(np.argsort(block["row"].to_numpy())))
    return cost


def _numbers(part: pa.Table, name: str) -> np.ndarray:
    """A column of numbers as a view of the file."""
    return part[name].chunk(0).to_numpy()


def _values(part: pa.Table) -> int:
    """Numbers in the table, those in its lists counted one by one."""
    lists = [column.chunk(0) for column in part.columns if pa.types.is_list(column.type)]
    return sum(len(column.flatten()) for column in lists) + len(part) * part.num_columns


def _between(part: pa.Table, first: int, last: int) -> pa.Table:
    """The rows from number `first` to `last`; no copy."""
    start, stop = np.searchsorted(_numbers(part, "row"), (first, last + 1)).tolist()
    return part.slice(start, stop - start)


def read_columns(folder: Path) -> Columns:
    """The columns of a complete cache folder, [N] each and ordered by row; lists are object arrays of arrays."""
    assert is_complete(folder)
    path = folder / "statistics.parquet"
    return Columns({name: partial(_read, path, name) for name in pq.read_schema(path).names})


def read_statistics(folder: Path) -> Columns:
    """`read_columns` of the statistics, with the means derived from the sums: loss, brier, entropy."""
    columns = read_columns(folder)
    return columns.also({mean: partial(_mean, columns, total) for mean, total in MEANS.items()})


def statistics_blocks(folder: Path) -> Iterator[pa.Table]:
    """`read_statistics` of the rows one block after the other, without their numbers: for a copy of all columns."""
    assert is_complete(folder)
    with pq.ParquetFile(folder / "statistics.parquet") as file:
        for i in range(file.num_row_groups):
            block = file.read_row_group(i)
            columns = {name: block[name].to_numpy() for name in ("num_tokens", *MEANS.values())}
            for mean, total in MEANS.items():
                block = block.append_column(mean, pa.array(_mean(columns, total)))
            yield block.drop_columns(["row"])


def _read(path: Path, name: str) -> np.ndarray:
    with pq.ParquetFile(path) as file:
        return file.read(columns=[name])[name].to_numpy()


def _mean(columns: Mapping[str, np.ndarray], total: str) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return columns[total] / columns["num_tokens"]
