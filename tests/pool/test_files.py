"""Files of rows: which are found, where their rows stand, what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lark.pool.files
from lark.pool.files import find_files, read_rows, write_rows
from lark.pool.rows import RowError

# Sources


def test_files_of_a_list_come_in_its_order_and_once(tmp_path):
    for name in ("a.jsonl", "b.PARQUET", "deep/c.json", "deep/README.md", "deep/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = [tmp_path / "deep", str(tmp_path / "b.PARQUET"), tmp_path / "a*"]
    assert find_files(source, setting="task.eval") == {
        "deep/c.json": tmp_path / "deep" / "c.json",
        "b.PARQUET": tmp_path / "b.PARQUET",
        "a.jsonl": tmp_path / "a.jsonl",
    }
    assert list(find_files(tmp_path / "deep", setting="task.eval")) == ["c.json"]
    assert list(find_files(tmp_path / "**" / "*.json*", setting="task.eval")) == ["a.jsonl", "deep/c.json"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data/pol.jsonl", r"^task\.eval=.*pol\.jsonl does not exist: did you mean .*data/pool\.jsonl\?$"),
        ("data/zzz.parquet", r"zzz\.parquet does not exist: set task\.eval to .* \(.*data holds pool\.jsonl\)$"),
        ("none/pool.jsonl", r"does not exist: there is no folder .*none, correct task\.eval$"),
        ("data/notes.txt", r"^task\.eval=.*notes\.txt has an unknown ending: .*\.json, \.parquet or \.csv$"),
        ("empty", r"^task\.eval=.*empty holds no \.jsonl"),
        ("data/*.parquet", r"^task\.eval=.*\*\.parquet holds no \.jsonl"),
    ],
)
def test_a_source_that_is_not_there(tmp_path, source, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "data" / "notes.txt").touch()
    (tmp_path / "data" / "pool.jsonl").touch()
    with pytest.raises(ValueError, match=message):
        find_files(tmp_path / source, setting="task.eval")


def test_a_path_is_the_file_of_that_name_and_no_other(tmp_path):
    for name in ("pool[1].jsonl", "pool1.jsonl", "pool?.jsonl", "pools.jsonl", "pool*.jsonl"):
        (tmp_path / name).touch()
    for name in ("pool[1].jsonl", "pool?.jsonl", "pool*.jsonl"):
        assert find_files(tmp_path / name, setting="task.pool") == {name: tmp_path / name}
    (tmp_path / "pool[1].jsonl").unlink()
    with pytest.raises(ValueError, match=r"pool\[1\]\.jsonl does not exist"):
        find_files(tmp_path / "pool[1].jsonl", setting="task.pool")
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "part-0.jsonl").touch()
    assert list(find_files(tmp_path / "[x]" / "part-*", setting="task.pool")) == ["part-0.jsonl"]


@pytest.mark.parametrize("source", ["", [], None])
def test_a_source_that_is_not_set(source):
    with pytest.raises(ValueError, match=r"^task\.eval is not set: set it to"):
        find_files(source, setting="task.eval")


# Readers


def test_blank_lines_and_a_byte_order_mark_are_skipped_but_lines_are_counted(tmp_path):
    (tmp_path / "pool.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n \r\n{"a": 2}\r\n{"a": 3}')
    assert list(read_rows(tmp_path / "pool.jsonl")) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    (tmp_path / "pool.jsonl").write_text('{"a": "one\u2028two\x85"}\n', encoding="utf-8")
    assert list(read_rows(tmp_path / "pool.jsonl")) == [(1, {"a": "one\u2028two\x85"})]


def test_rows_of_a_json_list_have_their_numbers(tmp_path):
    (tmp_path / "pool.json").write_text('\ufeff[{"a": 1}, {"a":\n2},\n\n{"a": 3}\n]\n', encoding="utf-8")
    assert list(read_rows(tmp_path / "pool.json")) == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3})]


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ \n] "])
def test_a_json_list_without_rows(tmp_path, text):
    (tmp_path / "pool.json").write_text(text)
    assert list(read_rows(tmp_path / "pool.json")) == []


def test_rows_of_parquet_are_counted_across_batches(tmp_path):
    pq.write_table(pa.table({"a": range(2500)}), tmp_path / "pool.parquet", row_group_size=700)
    assert list(read_rows(tmp_path / "pool.parquet")) == [(number + 1, {"a": number}) for number in range(2500)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_rows_say_how_many_bytes_they_take(tmp_path, ending):
    rows = [{"text": "x" * length} for length in range(0, 2000, 4)]
    path = tmp_path / f"pool.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if ending == "jsonl" else f"[{', '.join(lines)}]")
    taken = []
    assert [row for _, row in read_rows(path, taken.append)] == rows
    assert len(taken) == 500 and sum(taken) == pytest.approx(path.stat().st_size, rel=0.01)


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"problem_id": 1,, }', "broken JSON", "broken JSON at column 18: "),
        ('{"problem_id": 1', "broken JSON", "broken JSON at column 17: "),
        ('{"problem_id": ' + "9" * 5000 + "}", "broken JSON", "JSON that cannot be read: Exceeds the limit"),
        ("[" * 100_000, "broken JSON", "JSON that cannot be read: maximum recursion"),
        (b'{"teacher": "Zo\xeb"}', "invalid UTF-8", "byte 16 (0xeb) is not UTF-8"),
    ],
)
def test_fault_of_a_line(tmp_path, line, reason, message):
    data = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "pool.jsonl").write_bytes(b"{}\n" + data + b"\n{}\n")
    [(_, before), (number, error), (_, after)] = read_rows(tmp_path / "pool.jsonl")
    assert before == after == {}
    assert isinstance(error, RowError)
    assert (number, error.field, error.reason) == (2, "row", reason)
    assert message in error.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": 1},,\n{}]', "broken JSON at line 3, column 10"),
        ('[{"a": 1}', "broken JSON at column 10"),
        ('[{"a": 1}]\n []', "broken JSON at line 2, column 2"),
        ('{"rows": []}', "is not one list of rows"),
    ],
)
def test_a_broken_json_list(tmp_path, text, message):
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(RowError) as caught:
        list(read_rows(tmp_path / "pool.json"))
    assert (caught.value.field, caught.value.reason) == ("row", "broken JSON")
    assert message in caught.value.message


def test_a_json_list_has_a_limit(tmp_path, monkeypatch):
    (tmp_path / "pool.json").write_text("[{}]")
    monkeypatch.setattr(lark.pool.files, "JSON_BYTES", 3)
    with pytest.raises(RowError, match="convert it to JSONL"):
        list(read_rows(tmp_path / "pool.json"))


def test_invalid_utf8_in_a_json_list(tmp_path):
    (tmp_path / "pool.json").write_bytes(b'["Zo\xeb"]')
    with pytest.raises(RowError, match=r"byte 5 \(0xeb\) is not UTF-8"):
        list(read_rows(tmp_path / "pool.json"))


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "pool.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(RowError, match="can be read as Parquet") as caught:
        list(read_rows(tmp_path / "pool.parquet"))
    assert (caught.value.line, caught.value.reason) == (1, "damaged Parquet")


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"a": "é"}, {"a": 2}])
    with pytest.raises(ZeroDivisionError):
        write_rows(tmp_path / "rows.jsonl", ({"a": 1 / i} for i in (1, 0)))
    assert list(read_rows(tmp_path / "rows.jsonl")) == [(1, {"a": "é"}), (2, {"a": 2})]


@pytest.mark.slow
def test_a_row_group_is_not_read_whole(tmp_path):
    """What Arrow allocates at most, by its own count, for one row group of 32 MB."""
    rng = np.random.default_rng(0)
    texts = [rng.bytes(2**11).hex() for _ in range(8192)]
    messages = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in texts]
    columns = {"problem_id": range(8192), "candidate_id": [0] * 8192, "messages": messages}
    pq.write_table(pa.table(columns), tmp_path / "pool.parquet", use_dictionary=False)
    assert pq.read_metadata(tmp_path / "pool.parquet").num_row_groups == 1
    script = (
        "import sys, pyarrow as pa, lark.pool.files; from pathlib import Path\n"
        "assert sum(1 for _ in lark.pool.files.read_rows(Path(sys.argv[1]))) == 8192\n"
        "print(pa.default_memory_pool().max_memory())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "pool.parquet")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2**24
