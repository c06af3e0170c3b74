"""Shapes that people have, read by task=jsonl without a setting: what is understood, and ten malformed rows of each."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lark.answers.extract import extract_answer
from lark.pool.pool import PoolError, read_pool
from lark.tasks.conversations import Columns, collect_samples, recognise_columns
from lark.tasks.hub import HubTask
from lark.tasks.problems import read_problems
from lark.tasks.task import Task
from lark.tasks.teacher_files import TeacherFiles

MARKED = (
    "<|begin_of_thought|>\n\\boxed{2}?\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\\boxed{5}\n<|end_of_solution|>"
)
USER = {"role": "user", "content": "2 + 3?"}
SHAPES: dict[str, tuple[dict[str, Any], list[dict[str, str]], dict[str, Any]]] = {
    # name: (a row, the turns of its first candidate, more of what the candidate is)
    "sharegpt": (
        {
            "system": "Think.",
            "conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": MARKED}],
        },
        [{"role": "system", "content": "Think."}, USER, {"role": "assistant", "content": MARKED}],
        {"teacher": None, "correct": None},
    ),
    "openai": (
        {
            "messages": [USER, {"role": "assistant", "content": "\\boxed{5}", "reasoning_content": "Count on."}],
            "model": "r1",
            "expected_answer": 5.0,
        },
        [USER, {"role": "assistant", "content": "<think>\nCount on.\n</think>\n\n\\boxed{5}"}],
        {"teacher": "r1", "answer": "5"},
    ),
    "grades": (
        {
            "question": "2 + 3?",
            "a_thinking_trajectory": "hm",
            "a_attempt": "5",
            "a_grade": "Yes",
            "b_thinking_trajectory": "",
            "b_attempt": "6",
            "b_grade": "No",
            "source_type": "book",
        },
        [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n5"}],
        {"teacher": "a_attempt", "correct": True, "source_type": "book"},
    ),
    "generations": (
        {
            "problem": "2 + 3?",
            "answer": "5",
            "generations": ["So 5", "So 6"],
            "correctness_math_verify": [True, False],
            "messages": [USER, {"role": "assistant", "content": "So 5"}],
        },
        [USER, {"role": "assistant", "content": "So 5"}],
        {"answer": "5", "correct": True},
    ),
    "prompt": (
        {"prompt": "2 + 3?", "completion": "It is 5.", "level": 3},
        [USER, {"role": "assistant", "content": "It is 5."}],
        {"level": 3},
    ),
    "trl": (
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "It is 5."}]},
        [USER, {"role": "assistant", "content": "It is 5."}],
        {},
    ),
    "solutions": (
        {"question": "2 + 3?", "solution": "So \\boxed{5}"},
        [USER, {"role": "assistant", "content": "So \\boxed{5}"}],
        {"answer": "5"},
    ),
    "worked": (
        {"Question": "2 + 3?", "answer": "two and three #### 5", "response": "5"},
        [USER, {"role": "assistant", "content": "5"}],
        {"answer": "5"},
    ),
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_one(task: Task, cache: Path) -> dict[str, Any]:
    """Return the only row of a task's pool."""
    rows: list[Any] = list(read_pool(task.prepare_pool(cache), cache=cache).rows)
    assert len(rows) == 1
    return rows[0]


def import_rows(path: Path, cache: Path, **settings: Any) -> list[dict[str, Any]]:
    prepared = Task(name="jsonl", pool=str(path), **settings).prepare_pool(cache)
    assert len(read_pool(prepared, cache=cache).rows) > 0, "what is made is a pool"
    return [json.loads(line) for line in Path(prepared).read_text().splitlines()]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_read_and_told_in_a_line(shape: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row, turns, more = SHAPES[shape]
    caplog.set_level("INFO", "lark")
    first, *others = import_rows(write(tmp_path / "pool.jsonl", row), tmp_path)
    assert first["messages"] == turns and {name: first[name] for name in more} == more
    assert [one["correct"] for one in others] == {"grades": [False], "generations": [False]}.get(shape, [])
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("columns ")]
    for name in row:
        assert name in line, "every column is said to be read, carried along or not used"


MALFORMED: dict[str, list[tuple[str, Any]]] = {  # of each shape: the column, and what stands there instead
    "sharegpt": [
        *(("conversations", value) for value in (None, [], 3, "so", "[", [{"from": "human", "value": "?"}])),
        ("conversations", [{"from": "human", "value": "?"}, {"from": "gpt", "value": " "}]),
        ("conversations", [{"from": "human", "value": "?"}, {"from": "function", "value": "5"}]),
        ("conversations", [{"from": "human", "value": "?"}, {"from": "gpt", "value": "5", "weight": 0}]),
        ("system", ["Think."]),
    ],
    "openai": [
        *(("messages", [USER, turn]) for turn in (3, {}, {"role": "assistant"}, {"role": "assistant", "content": 5})),
        *(
            ("messages", [USER, {"role": "assistant", "content": "5", **further}])
            for further in ({"tool_calls": [{"id": 1}]}, {"reasoning_content": 3}, {"thinking": "a", "reasoning": "b"})
        ),
        ("messages", [{"role": "assistant", "content": "5"}]),
        ("messages", {"role": "user"}),
        ("expected_answer", [5]),
    ],
    "grades": [
        *(("question", value) for value in (None, "", " ", 3, ["?"])),
        *(("a_grade", value) for value in ("Perhaps", 0.5, ["Yes", "No"])),
        ("a_thinking_trajectory", 3),
        ("a_attempt", " "),
    ],
    "generations": [
        *(("generations", value) for value in (None, [], ["", "x"], [None, "x"], "", 3)),
        *(("correctness_math_verify", value) for value in ([True], [2, False], ["maybe", False])),
        ("problem", None),
    ],
    "prompt": [
        *(("prompt", value) for value in (None, "", " ", 3, {"role": "user"})),
        *(("completion", value) for value in (None, "", " \n", 3, {"content": "5"})),
    ],
    "trl": [
        *(("prompt", value) for value in (None, 3, [], ["?"], [{"role": "user"}])),
        *(("completion", value) for value in (None, [{"role": "assistant", "content": ""}], [USER], 3)),
        ("completion", [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ],
    "solutions": [
        *(("question", value) for value in (None, "", " ", 3, ["?"])),
        *(("solution", value) for value in (None, "", " ", 3, {"text": "5"})),
    ],
    "worked": [
        *(("Question", value) for value in (None, "", 3, {})),
        *(("response", value) for value in (None, "", " ", 3, False)),
        ("answer", [5]),
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_malformed_rows_of_a_shape_are_told_by_line_or_dropped(shape: str, tmp_path: Path) -> None:
    good = SHAPES[shape][0]
    rows = [{**deepcopy(good), column: value} for column, value in MALFORMED[shape]]
    assert len(rows) == 10
    path = write(tmp_path / "pool.jsonl", good, *rows)
    with pytest.raises(PoolError) as caught:
        import_rows(path, tmp_path)
    assert {fault.line for fault in caught.value.faults} == set(range(2, 12))
    assert all(fault.file == "pool.jsonl" and fault.field and fault.message for fault in caught.value.faults)
    assert all(fault.field in (*good, "messages", "answer", "problem") for fault in caught.value.faults)
    task = Task(name="jsonl", pool=str(path), on_error="drop")
    task.prepare_pool(tmp_path)
    assert sum(task.count_dropped(tmp_path).values()) == len(caught.value.faults)


def test_fifteen_equal_faults_are_one_sentence_with_columns_and_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", *[{"text": "?", "label": 1}] * 15)
    with pytest.raises(ValueError, match=r"columns label, text; .*task\.columns\.trajectory=") as caught:
        import_rows(path, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_marked_thought_is_kept_as_it_stands_and_gives_no_answer() -> None:
    assert extract_answer(MARKED) == "5"
    assert extract_answer(MARKED.replace("\\boxed{5}", "five")) is None


TALK = [USER, {"role": "assistant", "content": "5", "reasoning_content": "hm"}]


@pytest.mark.parametrize("further", [{}, {"tool_calls": [1]}, {"weight": 0}])
def test_every_importer_reads_turns_alike(further: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    row = {"problem_id": "1", "candidate_id": "0", "messages": [USER, TALK[1] | further]}
    path = write(tmp_path / "pool" / "a.jsonl", row)
    tasks = [
        Task(name="native", pool=str(path)),
        Task(name="named", pool=str(path), columns=Columns(messages="messages")),
        HubTask(name="hub", pool=str(path)),
        TeacherFiles(name="teachers", pool=str(tmp_path / "pool")),
    ]
    for task in tasks:
        if further:
            with pytest.raises(PoolError, match=f"a.jsonl, line 1, messages: .* {next(iter(further))}"):
                read_one(task, tmp_path)
        else:
            assert read_one(task, tmp_path)["messages"][-1]["content"] == "<think>\nhm\n</think>\n\n5"


def test_the_named_file_is_read_by_every_task(tmp_path: Path) -> None:
    write(tmp_path / "pool1.jsonl", {"question": "other?", "solution": "b"})
    path = write(tmp_path / "pool[1].jsonl", {"question": "named?", "solution": "a"})
    for task in (HubTask(name="hub", pool=str(path)), Task(name="jsonl", pool=str(path))):
        assert read_one(task, tmp_path)["messages"][0]["content"] == "named?"
    path.unlink()
    with pytest.raises(ValueError, match=r"pool\[1\]\.jsonl does not exist"):
        HubTask(name="hub", pool=str(path)).prepare_pool(tmp_path)


def test_a_split_is_that_of_the_files_names(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "pool" / f"{split}-00000.jsonl", {"question": f"{split}?", "response": "a"})
    for split in ("train", "test"):
        task = HubTask(name="hub", pool=str(tmp_path / "pool"), split=split)
        assert read_one(task, tmp_path)["messages"][0]["content"] == f"{split}?"


def test_a_csv_file_is_a_pool_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "pool.csv"
    path.write_text('question,response,correct\n"2 + 3, or so?","' + "5" * 200_000 + '",Yes\n"1 + 1?",2\n3,4,no,x\n')
    with pytest.raises(PoolError, match=r"pool\.csv, line 4, row: has more values than the 3 columns"):
        import_rows(path, tmp_path)
    rows = import_rows(path, tmp_path, on_error="drop")
    assert [(row["messages"][0]["content"], row["correct"]) for row in rows] == [
        ("2 + 3, or so?", True),
        ("1 + 1?", None),
    ]


def test_columns_that_are_named_come_before_those_that_are_recognised() -> None:
    samples = collect_samples([{"question": "?", "prompt": None}, {"prompt": "p", "answer": "a", "output": "o"}])
    found = recognise_columns(Columns(problem="prompt", correct=""), samples)
    assert (found.problem, found.trajectory, found.answer, found.correct) == ("prompt", "output", "answer", "")
    assert recognise_columns(Columns(trajectory="answer"), samples).answer is None


def test_evaluation_rows_in_other_shapes(tmp_path: Path) -> None:
    rows = [
        {"question": "2 + 3?", "answer": "two and three\n#### 5"},
        {"prompt": [USER], "solution": "so \\boxed{5}"},
        {"prompt": "2 + 3?", "ground_truth": 5.0},
        {"messages": [{"from": "human", "value": "2 + 3?"}], "answer": 5},
    ]
    found = read_problems(write(tmp_path / "eval.jsonl", *rows))
    assert [row["problem_id"] for row in found] == ["0", "1", "2", "3"] and {row["answer"] for row in found} == {"5"}
    assert [row.get("problem") or row["messages"][0]["content"] for row in found] == ["2 + 3?"] * 4
    with pytest.raises(ValueError, match=r"15 faulty rows") as caught:
        read_problems(write(tmp_path / "bad.jsonl", *[{"text": "?", "label": 1}] * 15))
    assert "columns label, text" in str(caught.value) and str(caught.value).count("\n") == 1
