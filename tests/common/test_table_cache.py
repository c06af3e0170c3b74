"""Tables computed part by part: in order by one process, in any order by ranks."""

import itertools
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lark.common.cache
import lark.common.progress_line
from lark.common import table_cache
from lark.common.cache import read_json, write_json
from lark.common.table_cache import (
    TABLE,
    Columns,
    compute_table,
    filter_rows,
    list_parts,
    merge_parts,
    read_columns,
    read_row_groups,
    read_row_numbers,
    write_rows,
)

SCHEMA = pa.schema([("number", pa.int32()), ("square", pa.list_(pa.int32()))])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(table_cache, "PART_ROWS", 10)


class Squares:
    """Computes n and n*n two rows at a time; counts how often it is opened and which parts it is asked for; `dies` at a
    row."""

    def __init__(self, dies=None):
        self.opened, self.parts, self.dies = 0, [], dies

    @contextmanager
    def __call__(self):
        self.opened += 1
        yield self.compute

    def compute(self, start, stop):
        self.parts.append((start, stop))
        for first in range(start, stop, 2):
            if first == self.dies:
                raise KeyboardInterrupt
            numbers = range(first, min(first + 2, stop))
            yield pa.RecordBatch.from_pydict(
                {"number": list(numbers), "square": [[n * n] for n in numbers]}, schema=SCHEMA
            )


def table(folder, worker, rows=25, **identity):
    return compute_table(folder, {"kind": "squares", **identity}, rows, SCHEMA, worker, "squaring")


EXPECTED = [{"number": n, "square": [n * n]} for n in range(25)]


def test_a_table_is_computed_in_parts_and_once(tmp_path):
    squares = Squares()
    computed = table(tmp_path, squares)
    assert list(computed) == EXPECTED and computed[[23, 4]]["number"] == [23, 4]
    assert (squares.opened, squares.parts) == (1, [(0, 10), (10, 20), (20, 25)])
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert read_json(folder / "manifest.json")["identity"] == {"kind": "squares", "part_rows": 10}
    never = Squares()
    assert list(table(tmp_path, never)) == EXPECTED and never.opened == 0
    table(tmp_path, never, kind="others")
    assert never.opened == 1


def test_a_killed_computation_goes_on_with_the_missing_parts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, Squares(dies=14))
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert [path.name for path in folder.iterdir()] == ["part-000000000000.arrow"]
    (folder / ".part-000000000010.arrow.0.tmp").write_bytes(b"half")  # what SIGKILL would leave
    again = Squares()
    assert list(table(tmp_path, again)) == EXPECTED
    assert again.parts == [(10, 20), (20, 25)]
    assert sum(path.name.startswith(".") for path in folder.iterdir()) == 0


def test_killed_before_the_manifest_nothing_is_computed_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lark.common.cache, "write_json", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            table(tmp_path, Squares())
    never = Squares()
    assert list(table(tmp_path, never)) == EXPECTED and never.opened == 0
    assert list(tmp_path.glob("*/manifest.json"))


def test_the_progress_line_goes_on_too(tmp_path, monkeypatch):
    seen = []

    def bar(label, total, unit, *, initial=0):
        seen.append([label, total, unit, initial])
        return lark.common.progress_line.show_progress(label, total, unit, initial=initial)

    monkeypatch.setattr(table_cache, "show_progress", bar)
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, Squares(dies=20))
    table(tmp_path, Squares())
    assert seen == [["squaring", 25, "rows", 0], ["squaring", 25, "rows", 20]]


def test_record_batches_are_put_together(tmp_path, monkeypatch):
    assert [len(batch) for batch in table(tmp_path / "a", Squares()).data.to_batches()] == [10, 10, 5]
    monkeypatch.setattr(table_cache, "BATCH_ROWS", 4)
    assert [len(batch) for batch in table(tmp_path / "b", Squares()).data.to_batches()] == [4, 4, 2, 4, 4, 2, 4, 1]
    monkeypatch.setattr(table_cache, "BATCH_BYTES", 1)
    assert {len(batch) for batch in table(tmp_path / "c", Squares()).data.to_batches()} == {2, 1}


def test_the_table_is_mapped(tmp_path):
    schema = pa.schema([("text", pa.string())])

    @contextmanager
    def texts():
        yield lambda start, stop: iter([pa.RecordBatch.from_pydict({"text": ["x" * 2**20] * (stop - start)}, schema)])

    compute_table(tmp_path, {}, 12, schema, texts, "writing")
    before = pa.total_allocated_bytes()
    again = compute_table(tmp_path, {}, 12, schema, texts, "writing")
    assert len(again) == 12 and pa.total_allocated_bytes() - before < 2**20
    assert [len(again[i]["text"]) for i in (0, 11)] == [2**20] * 2


def test_a_part_that_is_short_of_rows_is_not_kept(tmp_path):
    class Short(Squares):
        def compute(self, start, stop):
            yield from super().compute(start, stop - 1)

    with pytest.raises(AssertionError, match="9 rows"):
        table(tmp_path, Short())
    assert not list(tmp_path.glob("*/part-*"))


# ---- columns


def lazy_columns():
    """Two columns and the list of what has been read."""
    read = []
    values = {"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}
    return Columns(values, lambda name: read.append(name) or np.array(values[name])), read


def test_a_column_is_read_once_and_when_asked_for():
    some, read = lazy_columns()
    assert list(some) == ["a", "b"] and len(some) == 2 and "b" in some and "c" not in some
    assert read == []
    assert some["b"].tolist() == some["b"].tolist() == [4, 5, 6]
    assert list(some.without("a")) == ["b"] and some.without("a")["b"] is some["b"] and "a" not in some.without("a")
    assert read == ["b"]


def test_some_rows_of_all_columns():
    some, read = lazy_columns()
    kept = filter_rows(some, np.array([True, False, True]))
    again = filter_rows(kept, np.array([False, True]))
    assert list(again) == ["a", "b"] and read == []
    assert again["a"].tolist() == [3] and kept["a"].tolist() == [1, 3]
    assert read == ["a"]
    assert filter_rows({"x": np.arange(3)}, np.array([False, True, False]))["x"].tolist() == [1]


# ---- parts in any order of the rows


def measured(count, steps=lambda row: row % 4):
    """What a pass gives for the rows 10, 13, 16 ..., by row."""
    rng = np.random.default_rng(0)
    return {
        row: {
            "row": row,
            "tokens": row,
            "seconds": 0.5,
            "loss": float(rng.random()),
            "step_tokens": list(range(steps(row))),
            "step_surprisal": rng.random(steps(row)),
            "vector": rng.random(3).astype(np.float32),
        }
        for row in range(10, 10 + 3 * count, 3)
    }


def merge(folder, row_N):
    return merge_parts(folder, row_N, summed=("tokens", "seconds"))


def merged(folder, rows, cuts, ranks=2):
    """Write the rows in a random order as parts cut at `cuts`, merge them, and complete the folder."""
    folder.mkdir()
    order = random.Random(len(cuts)).sample(sorted(rows), len(rows))
    for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts, len(order)])):
        write_rows(folder, [rows[row] for row in order[start:stop]], rank=number % ranks)
    sums = merge(folder, np.array(order))
    write_json(folder / "manifest.json", {})
    return sums


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 20], list(range(1, 40))])
def test_merged_is_every_row_in_order(tmp_path, cuts, monkeypatch):
    monkeypatch.setattr(table_cache, "GROUP_ROWS", 16)
    rows = measured(40)
    assert merged(tmp_path / "pass", rows, cuts) == {"tokens": sum(rows), "seconds": 20.0}
    columns = read_columns(tmp_path / "pass")
    assert set(columns) == set(rows[10]) - {"tokens", "seconds"}
    for name, column in columns.items():
        assert len(column) == 40
        for value, row in zip(column, rows.values(), strict=True):
            np.testing.assert_array_equal(value, row[name], err_msg=name)
    assert columns["vector"][0].dtype == np.float32 and columns["row"].dtype == np.int64
    groups = list(read_row_groups(tmp_path / "pass"))
    assert [len(group) for group in groups] == [16, 16, 8] and "row" not in groups[0].column_names
    assert pa.concat_tables(groups)["loss"].to_numpy().tolist() == columns["loss"].tolist()


def test_row_groups_hold_about_as_many_bytes_whatever_a_row_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(table_cache, "GROUP_BYTES", 50_000)
    lengths = {}
    for steps in (0, 100):
        merged(tmp_path / str(steps), measured(200, steps=lambda row, steps=steps: steps), [70])
        metadata = pq.read_metadata(tmp_path / str(steps) / TABLE)
        lengths[steps] = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert lengths[0] == [200]
    assert {int(50_000 / (8 * 205)), int(50_000 / (8 * 210))} >= set(lengths[100][:-1])


def test_a_column_of_empty_lists_has_the_type_of_the_others(tmp_path):
    rows = measured(6, steps=lambda row: 2 * (row > 13))
    for row in rows.values():  # the first two parts know of no step
        write_rows(tmp_path, [row], rank=0)
    merge(tmp_path, np.array(list(rows)))
    table = pq.read_table(tmp_path / TABLE)
    assert table.schema.field("step_surprisal").type == pa.list_(pa.float64())
    assert table["step_surprisal"].to_pylist() == [list(row["step_surprisal"]) for row in rows.values()]


def test_a_missing_row(tmp_path):
    rows = list(measured(5).values())
    write_rows(tmp_path, rows[:3], rank=0)
    write_rows(tmp_path, rows[4:], rank=1)
    assert sorted(read_row_numbers(tmp_path)) == [10, 13, 16, 22]
    with pytest.raises(AssertionError, match="every row exactly once"):
        merge(tmp_path, np.array([10, 13, 16, 19, 22]))
    assert not (tmp_path / TABLE).exists()
    assert read_row_numbers(tmp_path / "none").tolist() == [] and read_row_numbers(tmp_path / "none").dtype == np.int64


def test_parts_are_mapped_and_their_files_are_not_kept_open(tmp_path):
    rows = [row | {"vector": np.zeros(2**16, np.float32)} for row in measured(64).values()]
    for start in range(0, 64, 4):
        write_rows(tmp_path, rows[start : start + 4], rank=0)
    opened, before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0, pa.total_allocated_bytes()
    tables = [table_cache._map_part(path) for path in list_parts(tmp_path)]
    assert sum(table.nbytes for table in tables) > 16 * 2**20
    assert pa.total_allocated_bytes() - before < 2**16
    assert not opened or len(os.listdir("/proc/self/fd")) == opened


@pytest.mark.slow
def test_merging_holds_a_row_group(tmp_path):
    """What Arrow allocates at most, by its own count, does not grow with the rows."""
    script = (
        "import sys, pyarrow, lark.common.table_cache as t; from pathlib import Path\n"
        "t.GROUP_BYTES = 2**20\n"
        "for folder in map(Path, sys.argv[1:]):\n"
        "    t.merge_parts(folder, t.read_row_numbers(folder), summed=())\n"
        "    print(pyarrow.default_memory_pool().max_memory())"
    )
    folders = {count: tmp_path / str(count) for count in (200, 1600)}
    for count, folder in folders.items():
        rows = [row | {"vector": np.zeros(2**10)} for row in measured(count).values()]
        order = random.Random(0).sample(rows, count)
        for start in range(0, count, 100):
            write_rows(folder, order[start : start + 100], rank=0)
    command = [sys.executable, "-c", script, *map(str, folders.values())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    small, large = map(int, done.stdout.split())
    assert large < 1.2 * small < 8 * 2**20, "13 MB of vectors in the larger one"


@pytest.mark.slow
def test_a_process_killed_while_merging_leaves_its_parts(tmp_path):
    rows = measured(8)
    write_rows(tmp_path, list(rows.values()), rank=0)
    script = (
        "import os, sys, numpy, lark.common.table_cache as t; from pathlib import Path\n"
        "t.pq.ParquetWriter.write_table = lambda *_: os.kill(os.getpid(), 9)\n"
        "t.merge_parts(Path(sys.argv[1]), t.read_row_numbers(Path(sys.argv[1])), summed=())"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / TABLE).exists() and len(read_row_numbers(tmp_path)) == 8
    merge(tmp_path, np.array(list(rows)))
    assert pq.read_table(tmp_path / TABLE)["row"].to_pylist() == list(rows)


def test_rows_that_a_rank_of_a_killed_job_wrote_as_well_count_once(tmp_path):
    """It outlives its job for a while, and the next one computes the same rows."""
    rows = measured(12)
    merged(tmp_path / "once", rows, [5])
    twice, numbers = tmp_path / "twice", sorted(rows)
    for part in (numbers[:5], numbers[5:], numbers[3:9], numbers[5:]):
        write_rows(twice, [rows[row] for row in part], rank=1)
    assert merge(twice, np.array(numbers))["tokens"] == sum(numbers)
    assert pq.read_table(twice / TABLE).equals(pq.read_table(tmp_path / "once" / TABLE))
