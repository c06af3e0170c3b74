"""Rows of files: where they stand, what is normalised and what is refused."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lark.pool.rows import Fault, RowError, find_files, normalise, read_rows


def turns(*messages):
    return [{"role": role, "content": content} for role, content in messages]


GOOD = {
    "problem_id": 0,
    "candidate_id": 0,
    "teacher": "teacher-0",
    "messages": turns(("user", "What is 0 + 1?"), ("assistant", "1")),
    "answer": "1",
    "correct": True,
}


# Sources


def test_files_of_a_list_come_in_its_order_and_once(tmp_path):
    for name in ("a.jsonl", "b.PARQUET", "deep/c.json", "deep/README.md", "deep/.hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = [tmp_path / "deep", str(tmp_path / "b.PARQUET"), tmp_path / "[ab].*"]
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
        ("data/notes.txt", r"^task\.eval=.*notes\.txt has an unknown ending: .*\.jsonl, \.json or \.parquet$"),
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


def test_rows_of_a_json_list_have_their_lines(tmp_path):
    (tmp_path / "pool.json").write_text('\n[{"a": 1}, {"a":\n2},\n\n{"a": 3}\n]\n')
    assert list(read_rows(tmp_path / "pool.json")) == [(2, {"a": 1}), (2, {"a": 2}), (5, {"a": 3})]


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
    ("text", "message"),  # of the text, R stands for a row and > for the place where it breaks
    [
        ("[\nR,\nR,>,\nR]", "Expecting value"),
        ("[\nR\n>R]", "Expecting ',' or ']'"),
        ("[R>", "Expecting ',' or ']'"),
        ("[R]\n >[]", "Extra data"),
        ('\n >{"rows": [R]}', "Expecting one list of rows"),
    ],
)
def test_a_broken_json_list(tmp_path, text, message):
    before, after = text.replace("R", '{"problem_id": "0"}').split(">")
    line, column = before.count("\n") + 1, len(before.split("\n")[-1]) + 1
    (tmp_path / "pool.json").write_text(before + after)
    with pytest.raises(RowError) as caught:
        list(read_rows(tmp_path / "pool.json"))
    assert (caught.value.line, caught.value.field, caught.value.reason) == (line, "row", "broken JSON")
    assert f"broken JSON at column {column}: {message}" in caught.value.message


def test_invalid_utf8_in_a_json_list(tmp_path):
    (tmp_path / "pool.json").write_bytes(b'["Zo\xeb"]')
    with pytest.raises(RowError, match=r"byte 5 \(0xeb\) is not UTF-8"):
        list(read_rows(tmp_path / "pool.json"))


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "pool.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(RowError, match="can be read as Parquet") as caught:
        list(read_rows(tmp_path / "pool.parquet"))
    assert (caught.value.line, caught.value.reason) == (1, "damaged Parquet")


def test_a_fault_says_where():
    fault = RowError("answer", "faulty answer", "is null: set it").at("deep/pool.parquet", 3)
    assert fault == Fault(
        file="deep/pool.parquet", line=3, field="answer", reason="faulty answer", message="is null: set it"
    )
    assert str(fault) == "deep/pool.parquet, row 3, answer: is null: set it"
    assert str(RowError("row", "", "x").at("pool.json", 3)) == "pool.json, line 3, row: x"
    assert str(RowError("row", "", "x").at("pool.json", None)) == "pool.json, row: x"


# Fields


@pytest.mark.parametrize(
    ("answer", "stored"),
    [("x", "x"), (3, "3"), (3.0, "3"), (0.5, "0.5"), (decimal.Decimal("1.50"), "1.50"), (None, None)],
)
def test_answers_become_strings(answer, stored):
    row, errors = normalise({**GOOD, "answer": answer})
    assert (row["answer"], errors) == (stored, [])


def test_messages_may_be_json_and_hold_keys_without_value():
    messages = [{**message, "name": None} for message in GOOD["messages"]]
    for given in (messages, json.dumps(messages)):
        assert normalise({**GOOD, "messages": given})[0]["messages"] == GOOD["messages"]


def test_further_columns_become_one_json_object():
    further = {"z": 1, "a": {"c": [1], "b": "é"}, "none": None, "nan": float("nan"), "extra": "x", "source": "y"}
    tables = {"day": datetime.date(2026, 5, 1), "cost": decimal.Decimal("1.50")}
    row, errors = normalise({**GOOD, **further, **tables})
    assert errors == []
    assert row["extra"] == (
        '{"a": {"b": "é", "c": [1]}, "cost": "1.50", "day": "2026-05-01", "extra": "x", "source": "y", "z": 1}'
    )


FAULTS = {  # name: (the fields that replace those of a good row, field, reason, part of the message)
    "null problem_id": ({"problem_id": None}, "problem_id", "no problem_id", "is null"),
    "bool problem_id": ({"problem_id": True}, "problem_id", "no problem_id", "is the bool 'True'"),
    "float problem_id": ({"problem_id": 1.0}, "problem_id", "no problem_id", "is the float '1.0'"),
    "blank candidate_id": ({"candidate_id": " "}, "candidate_id", "no candidate_id", "is the str ' '"),
    "list candidate_id": ({"candidate_id": []}, "candidate_id", "no candidate_id", "is the list '[]'"),
    "number as teacher": ({"teacher": 3}, "teacher", "faulty teacher", "is the int '3': set it to a name or null"),
    "bool answer": ({"answer": True}, "answer", "faulty answer", "is the bool 'True'"),
    "list answer": ({"answer": ["1"]}, "answer", "faulty answer", "is the list"),
    "NaN answer": ({"answer": float("nan")}, "answer", "faulty answer", "is the float 'nan'"),
    "infinite answer": ({"answer": float("inf")}, "answer", "faulty answer", "is the float 'inf'"),
    "number as correct": ({"correct": 1}, "correct", "faulty correct", "is the int '1': set it to true, false or null"),
    "messages null": ({"messages": None}, "messages", "no messages", "is null: set it to a list"),
    "messages empty": ({"messages": []}, "messages", "no messages", "is the list '[]'"),
    "messages a text": ({"messages": "Hello"}, "messages", "broken JSON", "broken JSON at column 1"),
    "messages a JSON number": ({"messages": "3"}, "messages", "no messages", "is the int '3'"),
    "turn a text": ({"messages": ["Hello"]}, "messages", "faulty turn", "turn 1 is the str 'Hello'"),
    "unknown role": ({"messages": turns(("human", "x"))}, "messages", "unknown role", "turn 1 has as role the str"),
    "role a list": ({"messages": turns((["user"], "x"))}, "messages", "unknown role", "has as role the list"),
    "content null": ({"messages": turns(("user", None))}, "messages", "faulty turn", "turn 1 has as content null"),
    "no assistant": ({"messages": turns(("user", "x"))}, "messages", "no assistant turn", "with a turn of the user"),
    "empty trajectory": (
        {"messages": turns(("user", "?"), ("assistant", " \n"))}, "messages", "empty trajectory", "is empty",
    ),
    "no user": ({"messages": turns(("assistant", "x"))}, "messages", "no user turn", "has no turn of the user"),
    "further key": (
        {"messages": [{"role": "assistant", "content": "x", "thought": "hm"}]}, "messages", "faulty turn", "thought",
    ),
    "bytes in a column": ({"blob": b"x"}, "blob", "faulty column", "a value of type bytes cannot"),
    "bytes as answer": ({"answer": b"x"}, "answer", "faulty answer", "is the bytes"),
    "half a surrogate": ({"teacher": "\ud83d"}, "teacher", "invalid Unicode", "character 1 is half of a surrogate"),
    "half in a column": ({"note": "\ud83d"}, "note", "invalid Unicode", "half of a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "field", "reason", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_fault_of_a_field(fields, field, reason, message):
    assert normalise(GOOD)[1] == []
    row, [error] = normalise({**GOOD, **fields})
    assert (error.field, error.reason) == (field, reason)
    assert message in error.message
    assert set(row) == set(normalise(GOOD)[0]) - {field if field in GOOD else "extra"}


@pytest.mark.parametrize("field", ["problem_id", "candidate_id", "messages"])
def test_fault_of_a_missing_field(field):
    _, [error] = normalise({name: value for name, value in GOOD.items() if name != field})
    assert (error.field, error.reason) == (field, f"no {field}")
    assert error.message.startswith("is missing: ")
    assert "number the candidates of each problem" in error.message or field != "candidate_id"


@pytest.mark.parametrize("raw", [None, 3, "text", ["problem_id"]])
def test_a_row_is_an_object(raw):
    row, [error] = normalise(raw)
    assert (row, error.field, error.reason) == ({}, "row", "no object")
