"""Tables computed part by part."""

from contextlib import contextmanager

import pyarrow as pa
import pytest

import lark.common.parts
import lark.common.progress_line
from lark.common.cache import read_json
from lark.common.parts import in_parts

SCHEMA = pa.schema([("number", pa.int32()), ("square", pa.list_(pa.int32()))])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(lark.common.parts, "PART_ROWS", 10)


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
    return in_parts(folder, {"kind": "squares", **identity}, rows, SCHEMA, worker, "squaring")


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
        patch.setattr(lark.common.parts, "write_json", lambda *_: pytest.fail("killed"))
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

    monkeypatch.setattr(lark.common.parts, "show_progress", bar)
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, Squares(dies=20))
    table(tmp_path, Squares())
    assert seen == [["squaring", 25, "rows", 0], ["squaring", 25, "rows", 20]]


def test_record_batches_are_put_together(tmp_path, monkeypatch):
    assert [len(batch) for batch in table(tmp_path / "a", Squares()).data.to_batches()] == [10, 10, 5]
    monkeypatch.setattr(lark.common.parts, "BATCH_ROWS", 4)
    assert [len(batch) for batch in table(tmp_path / "b", Squares()).data.to_batches()] == [4, 4, 2, 4, 4, 2, 4, 1]
    monkeypatch.setattr(lark.common.parts, "BATCH_BYTES", 1)
    assert {len(batch) for batch in table(tmp_path / "c", Squares()).data.to_batches()} == {2, 1}


def test_the_table_is_mapped(tmp_path):
    schema = pa.schema([("text", pa.string())])

    @contextmanager
    def texts():
        yield lambda start, stop: iter([pa.RecordBatch.from_pydict({"text": ["x" * 2**20] * (stop - start)}, schema)])

    in_parts(tmp_path, {}, 12, schema, texts, "writing")
    before = pa.total_allocated_bytes()
    again = in_parts(tmp_path, {}, 12, schema, texts, "writing")
    assert len(again) == 12 and pa.total_allocated_bytes() - before < 2**20
    assert [len(again[i]["text"]) for i in (0, 11)] == [2**20] * 2


def test_a_part_that_is_short_of_rows_is_not_kept(tmp_path):
    class Short(Squares):
        def compute(self, start, stop):
            yield from super().compute(start, stop - 1)

    with pytest.raises(AssertionError, match="9 rows computed for 0 to 10"):
        table(tmp_path, Short())
    assert not list(tmp_path.glob("*/part-*"))
