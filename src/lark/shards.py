"""What a pass has measured, on disk: shards while it runs, one table once it is complete."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lark.cache import complete, replacing

COST_COLUMNS = ("forward_tokens", "backward_tokens", "seconds")
"""Of each row while it is computed; the manifest holds their sums."""


def write_shard(folder: Path, rank: int, rows: Sequence[dict[str, Any]]) -> None:
    """Rows that one rank has measured, in a file of its own."""
    with replacing(folder / f"part-{rank}-{min(row['row'] for row in rows)}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary)


def remove_shards(folder: Path) -> None:
    for part in folder.glob("part-*.parquet"):
        part.unlink()


def rows_done(folder: Path) -> np.ndarray:
    """Row numbers that the shards in `folder` hold."""
    parts = [pq.read_table(path, columns=["row"])["row"].to_numpy() for path in sorted(folder.glob("part-*.parquet"))]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def merge(folder: Path, wanted: np.ndarray) -> dict[str, Any]:
    """All shards into statistics.parquet, ordered by row, and the sums of their costs. Memory grows with the rows times
    what is kept of each: some 30 numbers, and as many arrays as a pass has (steps, a vector, tokens if asked for).
    """
    parts = sorted(folder.glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in parts], promote_options="permissive")
    cost = {name: sum(table[name].to_pylist()) for name in COST_COLUMNS}
    order = np.argsort(table["row"].to_numpy(), kind="stable")
    rows = table["row"].to_numpy()[order]
    assert np.array_equal(rows, np.sort(wanted)), "the probe's shards do not hold every row exactly once"
    with replacing(folder / "statistics.parquet") as temporary:
        pq.write_table(table.drop_columns(list(COST_COLUMNS)).take(order), temporary)
    return cost


def read_columns(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a complete cache folder, [N] each and ordered by row; lists are object arrays of arrays."""
    assert complete(folder)
    table = pq.read_table(folder / "statistics.parquet")
    return {name: _numpy(table[name]) for name in table.column_names}


def read_statistics(folder: Path) -> dict[str, np.ndarray]:
    """`read_columns` of the statistics, with the means derived from the sums: loss, brier, entropy."""
    columns = read_columns(folder)
    with np.errstate(divide="ignore", invalid="ignore"):
        for mean, total in (("loss", "sum_surprisal"), ("brier", "sum_brier"), ("entropy", "sum_entropy")):
            columns[mean] = columns[total] / columns["num_tokens"]
    return columns


def _numpy(column: Iterable[Any]) -> np.ndarray:
    return column.to_numpy()  # type: ignore[attr-defined]
