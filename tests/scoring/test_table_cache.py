"""Shards of a pass and the table they are merged into."""

import itertools
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lark.scoring.table_cache
from lark.common.cache import write_json
from lark.scoring.table_cache import (
    COST_COLUMNS,
    merge,
    read_columns,
    read_statistics,
    remove_shards,
    rows_done,
    statistics_blocks,
    write_shard,
)


def measured(count, steps=lambda row: row % 4):
    """What a pass gives for the rows 10, 13, 16 ..., by row."""
    rng = np.random.default_rng(0)
    rows = range(10, 10 + 3 * count, 3)
    costs = dict.fromkeys(COST_COLUMNS, 0)
    return {
        row: {
            "row": row,
            **costs,
            "forward_tokens": row,
            "seconds": 0.5,
            "num_tokens": row % 5,
            **{name: float(rng.random()) for name in ("sum_surprisal", "sum_brier", "sum_entropy")},
            "step_tokens": list(range(steps(row))),
            "step_surprisal": rng.random(steps(row)),
            "vector": rng.random(3).astype(np.float32),
        }
        for row in rows
    }


def merged(folder, rows, cuts, ranks=2):
    """Write the rows in a random order as shards cut at `cuts`, merge them, and complete the folder."""
    folder.mkdir()
    order = random.Random(len(cuts)).sample(sorted(rows), len(rows))
    for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts, len(order)])):
        write_shard(folder, number % ranks, [rows[row] for row in order[start:stop]])
    cost = merge(folder, np.array(order))
    write_json(folder / "manifest.json", {})
    remove_shards(folder)
    return cost


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 20], list(range(1, 40))])
def test_merged_is_every_row_in_order(tmp_path, cuts, monkeypatch):
    monkeypatch.setattr(lark.scoring.table_cache, "BLOCK_ROWS", 16)
    rows = measured(40)
    cost = merged(tmp_path / "pass", rows, cuts)
    assert cost == {**dict.fromkeys(COST_COLUMNS, 0), "forward_tokens": sum(rows), "seconds": 20.0}
    columns = read_columns(tmp_path / "pass")
    assert set(columns) == set(rows[10]) - set(COST_COLUMNS)
    for name, column in columns.items():
        assert len(column) == 40
        for value, row in zip(column, rows.values(), strict=True):
            np.testing.assert_array_equal(value, row[name], err_msg=name)
    assert columns["vector"][0].dtype == np.float32 and columns["row"].dtype == np.int64
    assert [path.name for path in sorted((tmp_path / "pass").iterdir())] == ["manifest.json", "statistics.parquet"]


def test_the_table_does_not_depend_on_the_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(lark.scoring.table_cache, "BLOCK_BYTES", 2000)
    rows = measured(60)
    for name, cuts in {"one": [], "few": [13, 29], "many": list(range(2, 60, 2))}.items():
        merged(tmp_path / name, rows, cuts)
    one, few, many = ((tmp_path / name / "statistics.parquet").read_bytes() for name in ("one", "few", "many"))
    assert one == few == many
    assert pq.read_metadata(tmp_path / "one" / "statistics.parquet").num_row_groups > 3


def test_row_groups_hold_about_as_many_bytes_whatever_a_row_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(lark.scoring.table_cache, "BLOCK_BYTES", 50_000)
    lengths = {}
    for steps in (0, 100):
        merged(tmp_path / str(steps), measured(200, steps=lambda row, steps=steps: steps), [70])
        metadata = pq.read_metadata(tmp_path / str(steps) / "statistics.parquet")
        lengths[steps] = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert lengths[0] == [200], "11 numbers a row"
    assert set(lengths[100][:-1]) == {50_000 // (8 * 211)}


def test_a_column_of_empty_lists_has_the_type_of_the_others(tmp_path):
    rows = measured(6, steps=lambda row: 2 * (row > 13))
    tmp_path.joinpath("pass").mkdir()
    for row in rows.values():  # the first two shards know of no step
        write_shard(tmp_path / "pass", 0, [row])
    merge(tmp_path / "pass", np.array(list(rows)))
    table = pq.read_table(tmp_path / "pass" / "statistics.parquet")
    assert table.schema.field("step_surprisal").type == pa.list_(pa.float64())
    assert table["step_surprisal"].to_pylist() == [list(row["step_surprisal"]) for row in rows.values()]


def test_a_missing_row(tmp_path):
    rows = list(measured(5).values())
    write_shard(tmp_path, 0, rows[:3])
    write_shard(tmp_path, 1, rows[4:])
    assert sorted(rows_done(tmp_path)) == [10, 13, 16, 22]
    with pytest.raises(AssertionError, match="every row exactly once"):
        merge(tmp_path, np.array([10, 13, 16, 19, 22]))
    assert not (tmp_path / "statistics.parquet").exists()


def test_nothing_is_done_in_an_empty_folder(tmp_path):
    assert rows_done(tmp_path).tolist() == [] and rows_done(tmp_path / "none").dtype == np.int64


def test_shards_are_mapped_and_their_files_are_not_kept_open(tmp_path):
    rows = [row | {"vector": np.zeros(2**16, np.float32)} for row in measured(64).values()]
    for start in range(0, 64, 4):
        write_shard(tmp_path, 0, rows[start : start + 4])
    opened, before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0, pa.total_allocated_bytes()
    tables = [lark.scoring.table_cache._open(path) for path in sorted(tmp_path.glob("part-*"))]
    assert sum(table.nbytes for table in tables) > 16 * 2**20
    assert pa.total_allocated_bytes() - before < 2**16
    assert not opened or len(os.listdir("/proc/self/fd")) == opened
    remove_shards(tmp_path)
    assert sum(len(table) for table in tables) == 64 and not list(tmp_path.iterdir())


def test_merging_holds_a_block_of_rows(tmp_path):
    """What Arrow allocates at most, by its own count, does not grow with the rows."""
    script = (
        "import sys, pyarrow, lark.scoring.table_cache as s; from pathlib import Path\n"
        "s.BLOCK_BYTES = 2**20\n"
        "for folder in map(Path, sys.argv[1:]):\n"
        "    s.merge(folder, s.rows_done(folder)); print(pyarrow.default_memory_pool().max_memory())"
    )
    folders = {count: tmp_path / str(count) for count in (200, 1600)}
    for count, folder in folders.items():
        folder.mkdir()
        rows = [row | {"vector": np.zeros(2**10)} for row in measured(count).values()]
        order = random.Random(0).sample(rows, count)
        for start in range(0, count, 100):
            write_shard(folder, 0, order[start : start + 100])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *map(str, folders.values())]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    small, large = map(int, done.stdout.split())
    assert large < 1.2 * small < 8 * 2**20, "13 MB of vectors in the larger one"


def test_a_process_killed_while_merging_leaves_its_shards(tmp_path):
    rows = measured(8)
    write_shard(tmp_path, 0, list(rows.values()))
    script = (
        "import os, sys, numpy, lark.scoring.table_cache as s; from pathlib import Path\n"
        "s.pq.ParquetWriter.write_table = lambda *_: os.kill(os.getpid(), 9)\n"
        "s.merge(Path(sys.argv[1]), s.rows_done(Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "statistics.parquet").exists() and len(rows_done(tmp_path)) == 8
    merge(tmp_path, np.array(list(rows)))
    assert pq.read_table(tmp_path / "statistics.parquet")["row"].to_pylist() == list(rows)


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    rows = measured(12)
    merged(tmp_path / "pass", rows, [5])
    asked, read = [], lark.scoring.table_cache._read
    monkeypatch.setattr(lark.scoring.table_cache, "_read", lambda path, name: asked.append(name) or read(path, name))
    columns = read_statistics(tmp_path / "pass")
    assert {"loss", "brier", "entropy", "step_tokens"} < set(columns) and asked == []
    with np.errstate(all="ignore"):
        loss = [np.divide(row["sum_surprisal"], row["num_tokens"]) for row in rows.values()]
    np.testing.assert_array_equal(columns["loss"], loss)
    assert np.isinf(columns["loss"]).any(), "no tokens"
    assert columns["num_tokens"].tolist() == [row["num_tokens"] for row in rows.values()]
    assert sorted(asked) == ["num_tokens", "sum_surprisal"]


def test_blocks_are_the_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(lark.scoring.table_cache, "BLOCK_ROWS", 5)
    merged(tmp_path / "pass", measured(12), [5])
    blocks = list(statistics_blocks(tmp_path / "pass"))
    assert [len(block) for block in blocks] == [5, 5, 2]
    columns, table = read_statistics(tmp_path / "pass").without("row"), pa.concat_tables(blocks)
    assert table.column_names == list(columns)
    for name, values in columns.items():
        for a, b in zip(table[name].to_numpy(), values, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_rows_that_a_rank_of_a_killed_job_wrote_as_well_count_once(tmp_path):
    """It outlives its job for a while, and the next one computes the same rows."""
    rows = measured(12)
    merged(tmp_path / "once", rows, [5])
    twice = tmp_path / "twice"
    twice.mkdir()
    numbers = sorted(rows)
    for part in (numbers[:5], numbers[5:], numbers[3:9], numbers[5:]):
        write_shard(twice, 1, [rows[row] for row in part])
    cost = merge(twice, np.array(numbers))
    assert cost["forward_tokens"] == sum(numbers)
    assert pq.read_table(twice / "statistics.parquet").equals(pq.read_table(tmp_path / "once" / "statistics.parquet"))
