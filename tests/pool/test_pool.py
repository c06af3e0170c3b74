"""Pools: what is read, what is refused and where, what is cached, what is held out."""

import hashlib
import json
import os
import pickle
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lark.pool.pool
from lark.common.versions import FORMULAS
from lark.pool.pool import PoolError, mask_held_out, read_extra_column, read_pool, read_text_column


def make_row(problem: int | None = 0, candidate: int | str = 0, **fields):
    messages = [
        {"role": "user", "content": f"What is {problem} + 1?"},
        {"role": "assistant", "content": f"It is the number after {problem}, says {candidate}."},
    ]
    row = {"problem_id": problem, "candidate_id": candidate, "teacher": f"teacher-{candidate}", "messages": messages}
    return {**row, "answer": f"{problem} + 1", "correct": True, **fields}


ROWS = [make_row(problem, candidate) for problem in range(4) for candidate in range(3)]


def write(path, rows):
    """Write rows as the ending of the path says; a str or bytes among the rows of a JSONL file is written as it is."""
    if path.suffix == ".parquet":
        names = {name: None for row in rows for name in row}
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
        path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


@pytest.fixture
def read(tmp_path):
    """Read rows (written to a JSONL file) or a path, with a cache of the test's own."""

    def read(source, **settings):
        path = write(tmp_path / "pool.jsonl", source) if isinstance(source, list) else source
        return read_pool(path, cache=tmp_path / "cache", **settings)

    return read


def read_faults(read, source):
    with pytest.raises(PoolError) as caught:
        read(source)
    return caught.value.faults


def ids(pool):
    return list(zip(pool.rows["problem_id"], pool.rows["candidate_id"], strict=True))


def test_rows_are_normalised(read):
    rows = [
        make_row(7, 0, answer=42, score=0.5, note=None),
        {**make_row(7, "b", answer="42", correct=False), "messages": json.dumps(make_row(7)["messages"])},
        {"problem_id": "8", "candidate_id": 0, "messages": make_row(8)["messages"], "tags": {"b": [1], "a": "é"}},
    ]
    pool = read(rows)
    assert list(pool.rows) == [
        {"problem_id": "7", "candidate_id": "0", "teacher": "teacher-0", "messages": make_row(7)["messages"],
         "answer": "42", "correct": True, "extra": '{"score": 0.5}', "source": "pool.jsonl:1"},
        {"problem_id": "7", "candidate_id": "b", "teacher": "teacher-b", "messages": make_row(7)["messages"],
         "answer": "42", "correct": False, "extra": "{}", "source": "pool.jsonl:2"},
        {"problem_id": "8", "candidate_id": "0", "teacher": None, "messages": make_row(8)["messages"],
         "answer": None, "correct": None, "extra": '{"tags": {"a": "é", "b": [1]}}', "source": "pool.jsonl:3"},
    ]  # fmt: skip
    assert pool.dropped == {} and pool.faults == []


def test_one_candidate_a_problem_is_legal(read):
    assert ids(read([make_row(problem) for problem in range(3)])) == [("0", "0"), ("1", "0"), ("2", "0")]


def test_rows_are_memory_mapped(read, tmp_path):
    rows = [make_row(problem, note="x" * 2**20) for problem in range(4)]
    read(rows)
    before = pa.total_allocated_bytes()
    pool = read(rows)
    assert pa.total_allocated_bytes() - before < 2**20, "opening 4 MiB of rows takes less than one of them"
    [file] = pool.rows.cache_files
    assert file["filename"] == str(next(tmp_path.glob("cache/pools/*/pool.arrow")))


def test_rows_are_written_in_batches(read, monkeypatch):
    monkeypatch.setattr(lark.pool.pool, "BATCH_ROWS", 5)
    by_rows = read(ROWS)
    assert [len(batch) for batch in by_rows.rows.data.to_batches()] == [5, 5, 2]
    monkeypatch.setattr(lark.pool.pool, "BATCH_BYTES", 1)
    by_bytes = read(ROWS, on_error="drop")
    assert [len(batch) for batch in by_bytes.rows.data.to_batches()] == [1] * 12
    assert list(by_bytes.rows) == list(by_rows.rows) and by_bytes.fingerprint == by_rows.fingerprint


def test_extra_columns(read):
    pool = read([make_row(0, 0, score=2, tag=[1, 2]), make_row(0, 1, score=None), make_row(0, 2, score=True, tag=None)])
    np.testing.assert_array_equal(read_extra_column(pool.rows, "score"), [2.0, np.nan, 1.0])
    assert read_extra_column(pool.rows, "tag").tolist() == [[1, 2], None, None]
    assert read_extra_column(pool.rows.select([2, 0]), "score").tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"no column judge .*; its further columns are score, tag$"):
        read_extra_column(pool.rows, "judge")


def test_a_missing_file_names_the_setting(read, tmp_path):
    write(tmp_path / "pool.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"^task\.pool=.*pol\.jsonl does not exist: did you mean .*/pool\.jsonl\?$"):
        read(tmp_path / "pol.jsonl")


def test_a_list_a_folder_and_a_pattern_read_the_same(read, tmp_path):  # problem 1 is in two files
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    write(folder / "a.jsonl", ROWS[:4])
    write(folder / "b.parquet", ROWS[4:8])
    write(folder / "deep" / "c.json", ROWS[8:])
    assert ids(read(folder)) == ids(read(ROWS[:8]))
    listed = read_pool([folder / "deep", str(folder / "a.jsonl"), folder / "b*.parquet"], cache=tmp_path / "cache")
    assert ids(listed) == ids(read(ROWS)), "a.jsonl once"
    assert {"deep/c.json:1", "a.jsonl:1"} <= set(listed.rows["source"])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_folder_of_shards_is_the_pool_of_one_file(read, tmp_path, ending):
    rows = [*ROWS[::2], *ROWS[1::2]]  # the rows of a problem stand in several files
    (tmp_path / "shards").mkdir()
    for number, start in enumerate(range(0, len(rows), 5)):
        write(tmp_path / "shards" / f"{number}.{ending}", rows[start : start + 5])
    one, many = read(rows), read(tmp_path / "shards")
    assert many.fingerprint == one.fingerprint and ids(many) == ids(one)
    assert [{**row, "source": None} for row in many.rows] == [{**row, "source": None} for row in one.rows]
    assert {*(f"0.{ending}:{line}" for line in range(1, 6)), f"1.{ending}:1"} <= set(many.rows["source"])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_contradictions_across_files_name_the_first_row(read, tmp_path, ending):
    write(tmp_path / f"a.{ending}", [make_row(0, 0), make_row(1, 0)])
    write(tmp_path / f"b.{ending}", [make_row(2, 0), make_row(1, 0, answer="9", messages=make_row(2)["messages"])])
    faults = read_faults(read, tmp_path / f"*.{ending}")
    assert [(fault.file, fault.line, fault.reason) for fault in faults] == [
        (f"b.{ending}", 2, reason) for reason in ("duplicate candidate_id", "different prompt", "different answer")
    ]
    assert all(f"of problem 1 in a.{ending}:2" in fault.message for fault in faults[1:])


def test_equal_texts_of_a_column_are_one_object(read, monkeypatch):
    monkeypatch.setattr(lark.pool.pool, "BATCH_ROWS", 5)  # some texts are first seen in the second or third batch
    rows = [make_row(row["problem_id"], row["candidate_id"], teacher=None if i % 4 == 1 else row["teacher"])
            for i, row in enumerate(ROWS)]  # fmt: skip
    pool = read(rows)
    for name in ("problem_id", "candidate_id", "teacher", "answer"):
        column = read_text_column(pool.rows, name)
        assert column.dtype == object and column.tolist() == pool.rows[name][:]
        assert len({id(text) for text in column}) == len(set(column))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, r"task\.limit=0 .* set it to 1 or more"),
        ({"on_error": "ignore"}, r"task\.on_error=ignore .* raise or drop"),
    ],
)
def test_settings_out_of_range(read, settings, message):
    with pytest.raises(ValueError, match=message):
        read(ROWS, **settings)


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "pool.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"^paths\.cache=.* cannot be written .*: set paths\.cache to"):
        read_pool(path, cache=path / "cache")


FAULTS = {  # name: (the line that stands between good ones, field, reason, part of the message)
    "broken JSON": ('{"problem_id": 1', "row", "broken JSON", "broken JSON at column 17: "),
    "invalid UTF-8": (b'{"teacher": "Zo\xeb"}', "row", "invalid UTF-8", "byte 16 (0xeb) is not UTF-8"),
    "no object": ("[]", "row", "no object", "is the list '[]'"),
    "null id": (make_row(None), "problem_id", "no problem_id", "is null"),
    "duplicate": (make_row(0, "0"), "candidate_id", "duplicate candidate_id", "has a candidate 0 already"),
    "teacher": (make_row(0, 1, teacher=3), "teacher", "faulty teacher", "set it to a name or null"),
    "answer": (make_row(0, 1, answer=[1]), "answer", "faulty answer", "set it to a string, a number or null"),
    "other answer": (make_row(0, 1, answer="2"), "answer", "different answer", "of problem 0 in pool.jsonl:1"),
    "answer lost": (make_row(0, 1, answer=None), "answer", "different answer", "of problem 0 in pool.jsonl:1"),
    "correct": (make_row(0, 1, correct=2), "correct", "faulty correct", "set it to true, false"),
    "no trajectory": (
        make_row(0, 1, messages=[{"role": "user", "content": "?"}]), "messages", "no assistant turn", "of the user",
    ),
    "other prompt": (
        make_row(0, 1, messages=make_row(1)["messages"]), "messages", "different prompt", "0 in pool.jsonl:1",
    ),
    "column": (make_row(0, 1, note="\ud83d"), "note", "invalid Unicode", "half of a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "field", "reason", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_reported_with_its_place_or_dropped(read, line, field, reason, message):
    rows = [make_row(0, 0), "", line, make_row(1, 0)]
    [fault] = read_faults(read, rows)
    assert (fault.file, fault.line, fault.field, fault.reason) == ("pool.jsonl", 3, field, reason)
    assert message in fault.message
    pool = read(rows, on_error="drop")
    assert ids(pool) == [("0", "0"), ("1", "0")]
    assert pool.dropped == {reason: 1} and pool.faults == [fault]


def test_faults_of_parquet_name_the_row(read, tmp_path):
    path = write(tmp_path / "pool.parquet", [make_row(0, 0), make_row(0, 1, answer=None), make_row(1, 0, blob=b"x")])
    answer, blob = read_faults(read, path)
    assert (answer.line, answer.field) == (2, "answer") and str(answer).startswith("pool.parquet, row 2, answer: ")
    assert (blob.line, blob.field, blob.reason) == (3, "blob", "faulty column")
    assert "a value of type bytes cannot be carried along" in blob.message


@pytest.mark.parametrize("on_error", ["raise", "drop"])
@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_a_file_that_breaks_off_is_no_matter_of_dropping(read, tmp_path, ending, on_error):
    path = write(tmp_path / f"pool{ending}", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PoolError, match="a file that breaks off: repair or remove that file") as caught:
        read(path, on_error=on_error)
    assert caught.value.faults[-1].reason in ("broken JSON", "damaged Parquet")


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n \n"), ("a.jsonl", ""), ("a.json", "[ ]")])
def test_an_empty_file(read, tmp_path, name, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(content)
    [fault] = read_faults(read, tmp_path / "data")
    assert (fault.file, fault.line, fault.reason) == (name, None, "empty file")
    assert str(fault).startswith(f"{name}, row: the file holds no row")
    with pytest.raises(PoolError, match="no valid row"):
        read(tmp_path / "data", on_error="drop")
    write(tmp_path / "data" / "b.jsonl", ROWS)
    assert read(tmp_path / "data", on_error="drop").dropped == {"empty file": 1}


def test_every_fault_is_reported_and_every_kind_shown(read, tmp_path):
    rows = [make_row(0, number, correct="so", teacher=3) for number in range(15)]
    with pytest.raises(PoolError) as caught:
        read(rows)
    assert [(fault.line, fault.field) for fault in caught.value.faults] == [
        (line, field) for line in range(1, 16) for field in ("teacher", "correct")
    ]
    headline, *lines = str(caught.value).splitlines()
    assert headline.startswith(f"task.pool={tmp_path}/pool.jsonl has 30 faults: ") and "task.on_error=drop" in headline
    assert [line.partition(":")[0] for line in lines] == [
        f"  pool.jsonl, line 1, {field}" for field in ("teacher", "correct")
    ]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_row_is_counted_once_however_many_faults_it_has(read):
    pool = read([ROWS[0], make_row(0, 1, correct="so", teacher=3), "{"], on_error="drop")
    assert pool.dropped == {"faulty teacher": 1, "broken JSON": 1} and len(pool.faults) == 3


def test_a_faulty_row_does_not_speak_for_its_problem(read):
    first, second = make_row(0, 0, answer="9", correct="so"), make_row(0, 1, answer="9")
    assert ids(read([first, ROWS[0], second, ROWS[1]], on_error="drop")) == [("0", "0"), ("0", "1")]


def test_limit_takes_the_first_problems_wherever_their_rows_stand(read):
    rows = [make_row(2, 0), make_row(0, 0), make_row(1, 0), make_row(2, 1), make_row(0, 1)]
    assert ids(read(rows, limit=2)) == [("0", "0"), ("0", "1"), ("2", "0"), ("2", "1")]
    assert ids(read(rows, limit=9)) == ids(read(rows))


def test_limit_counts_problems_with_a_valid_row_and_checks_no_further_ones(read):
    rows = [make_row(0, correct="so"), make_row(1, 0), make_row(2, correct="so"), make_row(1, 1), "{"]
    pool = read(rows, limit=1, on_error="drop")
    assert ids(pool) == [("1", "0"), ("1", "1")]
    assert pool.dropped == {"faulty correct": 1, "broken JSON": 1}, "problem 2 is beyond the limit"


def test_the_fingerprint_is_that_of_the_content(read, tmp_path):
    rows = [make_row(0, 0, score=0.5), make_row(0, 1), make_row(1, 0, tags=["a", "b"])]
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "pool.jsonl", tmp_path / "pool.json", tmp_path / "pool.parquet", tmp_path / "other" / "x.jsonl"]
    pools = [read(write(path, rows)) for path in paths]
    assert len({pool.fingerprint for pool in pools}) == 1
    contents = [[{**row, "source": None} for row in pool.rows] for pool in pools]
    assert contents[0] == contents[1] == contents[2] == contents[3]


@pytest.mark.parametrize(
    "change",
    [
        {"problem_id": 9}, {"candidate_id": 9}, {"teacher": "x"}, {"teacher": None}, {"answer": "9"},
        {"correct": False}, {"score": 1}, {"messages": make_row(1, 1)["messages"]},
    ],
)  # fmt: skip
def test_the_fingerprint_changes_with_every_column(read, change):
    assert read([make_row(0), make_row(1)]).fingerprint != read([make_row(0), {**make_row(1), **change}]).fingerprint


def test_the_fingerprint_changes_with_limit_and_drops(read):
    fingerprints = [
        read(ROWS).fingerprint,
        read(ROWS, limit=3).fingerprint,
        read([*ROWS[:-1], {**ROWS[-1], "correct": 2}], on_error="drop").fingerprint,
    ]
    assert len(set(fingerprints)) == 3
    assert read(ROWS, limit=4).fingerprint == fingerprints[0], "a limit that leaves nothing out"


def test_shuffling_changes_nothing(read):
    one, other = read(ROWS), read(random.Random(0).sample(ROWS, len(ROWS)))
    assert one.fingerprint == other.fingerprint and one.text_fingerprint == other.text_fingerprint
    assert [{**row, "source": None} for row in one.rows] == [{**row, "source": None} for row in other.rows]


def test_rows_are_in_order_of_their_ids_numbers_by_value(read):
    keys = [(problem, candidate) for problem in (10, 9, "b", "aa") for candidate in (11, 2)]
    rows = [{**ROWS[0], "problem_id": problem, "candidate_id": candidate} for problem, candidate in keys]
    expected = [(problem, candidate) for problem in ("9", "b", "10", "aa") for candidate in ("2", "11")]
    assert ids(read(rows)) == expected


def test_what_a_student_does_not_see_is_in_the_full_fingerprint_alone(read):
    one = read(ROWS)
    other = read([{**row, "teacher": "renamed", "judge": 0.5} for row in ROWS])
    assert one.text_fingerprint == other.text_fingerprint and one.fingerprint != other.fingerprint


def refuse(path, *_):
    raise AssertionError(f"{path} is read again")


def test_an_unchanged_pool_is_not_read_again(read, tmp_path, monkeypatch):
    path = write(tmp_path / "pool.jsonl", [*ROWS, "{"])
    first = read(path, on_error="drop")
    os.utime(path, (0, 0))
    (tmp_path / "moved").mkdir()
    path.rename(tmp_path / "moved" / "pool.jsonl")
    monkeypatch.setattr(lark.pool.pool, "read_rows", refuse)
    again = read(tmp_path / "moved", on_error="drop")
    assert list(again.rows) == list(first.rows)
    assert (again.fingerprint, again.dropped, again.faults) == (first.fingerprint, first.dropped, first.faults)
    with pytest.raises(AssertionError, match="is read again"):
        read(tmp_path / "moved", on_error="drop", limit=1)
    with pytest.raises(AssertionError, match="is read again"):
        read([*ROWS[1:], "{"], on_error="drop")
    monkeypatch.setitem(FORMULAS, "pool", FORMULAS["pool"] + 1)
    with pytest.raises(AssertionError, match="is read again"):
        read(tmp_path / "moved", on_error="drop")


def test_faults_leave_nothing_in_the_cache(read, tmp_path):
    read_faults(read, [*ROWS, "{"])
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


IDS = st.lists(st.text(max_size=3), max_size=30)
SHARES = st.floats(0, 1, exclude_max=True)


@settings(deadline=None)
@given(ids=IDS, share=SHARES)
def test_held_out_takes_whole_problems_by_the_hash_of_their_id(ids, share):
    mask = mask_held_out(ids, share)
    assert mask.dtype == bool and mask.shape == (len(ids),)
    problems = sorted(set(ids), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = sum(mask[ids.index(name)] for name in problems)
    assert {name for name, out in zip(ids, mask, strict=True) if out} == set(problems[:count])
    assert not {name for name, out in zip(ids, mask, strict=True) if not out} & set(problems[:count])
    assert count == round(share * len(problems)) or count in (1, len(problems) - 1)


@settings(deadline=None)
@given(ids=IDS, share=SHARES, larger=SHARES, rng=st.randoms())
def test_held_out_ignores_order_and_repeats_and_grows_with_the_share(ids, share, larger, rng):
    def chosen(ids, share):
        return set(np.array(ids, dtype=object)[mask_held_out(ids, share)])

    again = ids + rng.choices(ids, k=5) if ids else ids
    rng.shuffle(again)
    assert chosen(again, share) == chosen(ids, share)
    assert chosen(ids, min(share, larger)) <= chosen(ids, max(share, larger))


@pytest.mark.parametrize(
    ("problems", "share", "count"),
    [(100, 0.1, 10), (100, 0, 0), (100, 1e-9, 1), (2, 0.1, 1), (2, 0.9, 1), (1, 0.5, 0), (0, 0.5, 0), (10, 0.999, 9)],
)
def test_held_out_counts(problems, share, count):
    assert mask_held_out(np.array([str(number) for number in range(problems)]), share).sum() == count


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), "ten", None])
def test_held_out_share_out_of_range(share):
    with pytest.raises(ValueError, match=rf"^task\.held_out={share} is not a share of problems: set it to"):
        mask_held_out(["0", "1"], share)
