import json

import pandas
import pytest

from lark.tasks.problems import make_answer, make_prompt, read_level, read_problems


def test_prompts():
    user = {"role": "user", "content": "1 + 1?"}
    assert make_prompt({"problem": "1 + 1?"}, None) == [user]
    assert make_prompt({"problem": "1 + 1?"}, "Think.") == [{"role": "system", "content": "Think."}, user]
    assert make_prompt({"messages": [user], "problem": "other"}, "Think.") == [user]


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_problems_are_read_and_normalised(tmp_path):
    turns = [{"role": "user", "content": "2 + 2?"}]
    path = write(
        tmp_path / "eval.jsonl",
        {"problem_id": 3, "problem": "1 + 1?", "answer": 2, "level": 5},
        {"id": "test/4.json", "messages": turns, "answer": "4"},
        {"id": 5, "problem": "?", "answer": 42.0},
    )
    assert read_problems(path, limit=2) == [
        {"problem_id": "3", "problem": "1 + 1?", "answer": "2", "level": 5},
        {"id": "test/4.json", "problem_id": "test/4.json", "messages": turns, "answer": "4"},
    ]
    assert [problem["answer"] for problem in read_problems(path)] == ["2", "4", "42"]


def test_every_fault_has_file_line_and_field(tmp_path):
    path = write(
        tmp_path / "eval.jsonl",
        {"id": 1, "problem": "fine", "answer": "1"},
        '{"id": 2,\n',
        {"problem_id": 2.5, "problem": "no id", "answer": "1"},
        {"id": 4, "problem": "no answer", "answer": None},
        {"id": 5, "problem": "", "answer": "1"},
        {"id": 6, "messages": [{"role": "assistant", "content": "x"}], "answer": "1"},
        {"id": "1", "problem": "again", "answer": "1"},
        {"id": 8, "problem": "?", "answer": "1", "level": [5]},
        {"id": 9, "problem": "?", "answer": "1", "checker": "maths"},
        {"id": 10, "problem": "?", "answer": "1", "pattern": "(", "checker": "number"},
        {"id": 11, "problem": "?", "answer": "1", "pattern": "no group"},
        {"id": 12, "problem": "?", "answer": "1", "pattern": 3},
        {"id": 13, "problem": "?", "answer": "1", "prompt": 1},
    )
    with pytest.raises(ValueError) as error:
        read_problems(path)
    message = str(error.value)
    assert "task.eval=" in message and "12 faulty rows" in message
    places = [(2, "row"), (3, "problem_id"), (4, "answer"), (5, "problem"), (6, "messages"), (7, "problem_id")]
    places += [(8, "level"), (9, "checker"), (10, "pattern"), (11, "pattern"), (12, "pattern"), (13, "prompt")]
    for line, field in places:
        assert f"eval.jsonl, line {line}, {field}:" in message


def test_missing_and_empty_files_and_limits_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"task\.eval"):
        read_problems(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="holds no problem"):
        read_problems(write(tmp_path / "eval.jsonl"))
    with pytest.raises(ValueError, match=r"task\.eval_limit=0"):
        read_problems(tmp_path / "eval.jsonl", limit=0)


def test_levels_are_text():
    assert [read_level(row) for row in ({"level": 5}, {"level": " Level 5 "}, {"level": None}, {})] == [
        *("5", "5", None, None)
    ]


def test_a_row_brings_its_own_checker_and_pattern():
    row = {"problem_id": "1", "problem": "?", "answer": "B", "checker": "choice", "pattern": r"pick (\w)"}
    assert (make_answer(row, "pick B").kind, make_answer(row, "pick B").pattern) == ("choice", r"pick (\w)")
    plain = make_answer({"problem_id": "1", "problem": "?", "answer": "B"}, "B")
    assert (plain.kind, plain.pattern, plain.gold, plain.text) == (None, None, "B", "B")


def test_what_tables_leave_empty_is_absent_and_what_json_cannot_hold_is_named(tmp_path):
    """pandas writes NaN where a row has no value."""
    rows = [{"problem_id": 1, "problem": "1 + 1", "answer": "2", "level": float("nan")}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "eval.parquet")
    assert read_problems(tmp_path / "eval.parquet")[0].get("level") is None
    pandas.DataFrame([rows[0] | {"answer": float("nan")}]).to_parquet(tmp_path / "eval.parquet")
    with pytest.raises(ValueError, match="row 1, answer"):
        read_problems(tmp_path / "eval.parquet")
    pandas.DataFrame([rows[0] | {"day": pandas.Timestamp("2026-01-01")}]).to_parquet(tmp_path / "eval.parquet")
    with pytest.raises(ValueError, match=r"row 1.*holds what JSON cannot"):
        read_problems(tmp_path / "eval.parquet")
