"""Tasks say where their files are; the embedded one writes its own, once."""

import json
from pathlib import Path
from typing import Any

import pytest

from lark.tasks.task import EmbeddedTask, Task


def test_evaluation_files_come_by_name_and_need_no_pool(tmp_path: Path) -> None:
    def prepare(eval):
        return Task(name="t", pool="nowhere.jsonl", eval=eval).prepare_evaluation(tmp_path)

    assert prepare(None) == {}
    assert prepare("e.jsonl") == {"eval": Path("e.jsonl")}
    assert prepare({"easy": "x.jsonl", "left_out": None}) == {"easy": Path("x.jsonl")}
    assert prepare("math500, maths") == {"eval": Path("math500, maths")}, "not all of these are benchmarks"


def test_a_benchmark_of_a_local_file_is_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(
        json.dumps({"problem": "What is 1 + 1?", "answer": "2", "level": 3, "unique_id": "a/1.json"}) + "\n"
    )
    files = Task(name="t", pool="p", eval={"mine": str(path), "math500": str(path)}).prepare_evaluation(tmp_path)
    assert files["mine"] == path != files["math500"]
    (row,) = map(json.loads, files["math500"].read_text().splitlines())
    assert row["problem"] == "What is 1 + 1?" and row["messages"][-1]["role"] == "user"


@pytest.mark.parametrize("eval", ["math500", ["math500"], "math500, svamp", {"math500": "hub"}])
def test_benchmarks_by_name_come_from_the_hub(eval, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"benchmark math500.*task\.eval=\{math500: <file>\}"):  # no network here
        Task(name="t", pool="p", eval=eval).prepare_evaluation(tmp_path)


@pytest.mark.parametrize("eval", [["maths"], {"maths": "hub"}])
def test_names_that_are_no_benchmarks(eval, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.eval=maths is not the name of a benchmark"):
        Task(name="t", pool="p", eval=eval).prepare_evaluation(tmp_path)


def test_embedded_files_are_written_once_and_by_their_settings(tmp_path: Path) -> None:
    calls = []

    def generate(folder: Path, *, count: int) -> None:
        calls.append(count)
        (folder / "pool.jsonl").write_text(json.dumps(count))
        (folder / "eval.jsonl").write_text("")

    def prepare(count: int, pool: Any = None) -> tuple[Any, dict[str, Path]]:
        settings = {"count": count}
        task = EmbeddedTask(name="t", generate=generate, sets={"eval": "eval.jsonl"}, settings=settings, pool=pool)
        return task.prepare_pool(tmp_path), task.prepare_evaluation(tmp_path)

    (two, sets), (again, _), (three, _) = prepare(2), prepare(2), prepare(3)
    assert calls == [2, 3] and two == again != three
    assert (two.read_text(), three.read_text()) == ("2", "3") and sets["eval"].is_file()
    (tmp_path / "mine.jsonl").touch()
    mine = tmp_path / "mine.jsonl"
    assert prepare(2, mine) == (mine, sets), "a pool of the user's own, with this task's sets"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pool", None),
        ("checker", "foo"),
        ("overlong", "foo"),
        ("on_error", "foo"),
        ("overlap", "foo"),
        ("held_out", 1.0),
        ("held_out", -0.1),
        ("limit", 0),
        ("eval_limit", 0),
        ("max_length", 1),
        ("max_new_tokens", 0),
    ],
)
def test_a_wrong_setting_names_itself(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"task.{setting}={value!r}"):
        Task(**{"name": "t", "pool": "p", setting: value})
