"""Rows of a pool: what is normalised, what is refused, how faults are told."""

import datetime
import decimal
import json

import pytest

from lark.pool.rows import Fault, RowError, describe_faults, normalise_row


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


def test_a_fault_says_where():
    fault = RowError("answer", "faulty answer", "is null: set it").at("deep/pool.parquet", 3)
    assert fault == Fault(
        file="deep/pool.parquet", line=3, field="answer", reason="faulty answer", message="is null: set it"
    )
    assert str(fault) == "deep/pool.parquet, row 3, answer: is null: set it"
    assert str(RowError("row", "", "x").at("pool.jsonl", 3)) == "pool.jsonl, line 3, row: x"
    assert str(RowError("row", "", "x").at("pool.json", None)) == "pool.json, row: x"


def test_the_same_mistake_is_told_once():
    def fault(line, field="answer", value="3", file="a.jsonl"):
        return RowError(field, "faulty", f"is {value}: set it").at(file, line)

    faults = [
        fault(2),
        fault(3, "teacher"),
        *(fault(line, value=str(line)) for line in range(4, 11)),
        fault(1, file="b"),
    ]
    assert describe_faults(faults) == [
        "a.jsonl, line 2, answer: is 3: set it (8 more like this: line 4, line 5, line 6, line 7, line 8, ...)",
        "a.jsonl, line 3, teacher: is 3: set it",
    ]
    kinds = [fault(1, f"column {number}") for number in range(25)]
    assert len(describe_faults(kinds)) == 21 and describe_faults(kinds)[-1] == "... and 5 further kinds of mistakes"


# Fields


@pytest.mark.parametrize(
    ("answer", "stored"),
    [("x", "x"), (3, "3"), (3.0, "3"), (0.5, "0.5"), (decimal.Decimal("1.50"), "1.50"), (None, None)],
)
def test_answers_become_strings(answer, stored):
    row, errors = normalise_row({**GOOD, "answer": answer})
    assert (row["answer"], errors) == (stored, [])


def test_messages_may_be_json_and_hold_keys_without_value():
    messages = [{**message, "name": None} for message in GOOD["messages"]]
    for given in (messages, json.dumps(messages)):
        assert normalise_row({**GOOD, "messages": given})[0]["messages"] == GOOD["messages"]


def test_further_columns_become_one_json_object():
    further = {"z": 1, "a": {"c": [1], "b": "é"}, "none": None, "nan": float("nan"), "extra": "x", "source": "y"}
    tables = {"day": datetime.date(2026, 5, 1), "cost": decimal.Decimal("1.50")}
    row, errors = normalise_row({**GOOD, **further, **tables})
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
    "number as correct": ({"correct": 2}, "correct", "faulty correct", "is the int '2': set it to true, false"),
    "word as correct": ({"correct": "perhaps"}, "correct", "faulty correct", "is the str 'perhaps'"),
    "list as correct": ({"correct": [True]}, "correct", "faulty correct", "is the list"),
    "messages null": ({"messages": None}, "messages", "no messages", "is null: set it to a list"),
    "messages empty": ({"messages": []}, "messages", "no messages", "is the list '[]'"),
    "messages a text": ({"messages": "Hello"}, "messages", "unreadable messages", "neither JSON nor a Python list"),
    "messages a JSON number": ({"messages": "3"}, "messages", "no messages", "is the int '3'"),
    "turn a text": ({"messages": ["Hello"]}, "messages", "faulty turn", "turn 1 is the str 'Hello'"),
    "unknown role": ({"messages": turns(("tool", "x"))}, "messages", "unknown role", "turn 1 has as role the str"),
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
    assert normalise_row(GOOD)[1] == []
    row, [error] = normalise_row({**GOOD, **fields})
    assert (error.field, error.reason) == (field, reason)
    assert message in error.message
    assert set(row) == set(normalise_row(GOOD)[0]) - {field if field in GOOD else "extra"}


@pytest.mark.parametrize("field", ["problem_id", "candidate_id", "messages"])
def test_fault_of_a_missing_field(field):
    _, [error] = normalise_row({name: value for name, value in GOOD.items() if name != field})
    assert (error.field, error.reason) == (field, f"no {field}")
    assert error.message.startswith("is missing: ")
    assert "number the candidates of each problem" in error.message or field != "candidate_id"


@pytest.mark.parametrize("raw", [None, 3, "text", ["problem_id"]])
def test_a_row_is_an_object(raw):
    row, [error] = normalise_row(raw)
    assert (row, error.field, error.reason) == ({}, "row", "no object")
