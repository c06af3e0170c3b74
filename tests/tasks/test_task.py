"""Tasks say where their files are; the embedded one writes its own, once."""

import json
from pathlib import Path

import pytest

from lark.tasks.task import EmbeddedTask, Task


def numbers(folder: Path, *, count: int = 2) -> None:
    (folder / "pool.jsonl").write_text(json.dumps(count))
    (folder / "eval.jsonl").write_text("")


def test_one_evaluation_file_or_several_by_name() -> None:
    pool, sets = Task(name="t", pool=["a", "b"], eval="e.jsonl").sources(Path("cache"))
    assert (pool, sets) == (["a", "b"], {"eval": Path("e.jsonl")})
    assert Task(name="t", pool="a").sources(Path("cache"))[1] == {}
    several = Task(name="t", pool="a", eval={"easy": "x.jsonl", "hard": "y.jsonl"})
    assert several.sources(Path("cache"))[1] == {"easy": Path("x.jsonl"), "hard": Path("y.jsonl")}


def test_evaluation_files_need_no_pool(tmp_path: Path) -> None:
    """What `python -m lark.evaluate` asks for."""
    task = Task(name="t", pool="nowhere.jsonl", eval={"easy": "x.jsonl", "left_out": None})
    assert task.evaluation_files(tmp_path) == {"easy": Path("x.jsonl")}
    embedded = EmbeddedTask(name="t", generate=numbers, sets={"eval": "eval.jsonl"}, pool="nowhere.jsonl")
    assert embedded.evaluation_files(tmp_path)["eval"].is_file()


def test_a_benchmark_of_a_local_file_is_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(
        json.dumps({"problem": "What is 1 + 1?", "answer": "2", "level": 3, "unique_id": "a/1.json"}) + "\n"
    )
    said: list[str] = []
    files = Task(name="t", pool="p", eval={"mine": str(path), "math500": str(path)}).evaluation_files(
        tmp_path, said.append
    )
    assert files["mine"] == path != files["math500"] and any("math500" in line for line in said)
    (row,) = map(json.loads, files["math500"].read_text().splitlines())
    assert row["problem"] == "What is 1 + 1?" and row["messages"][-1]["role"] == "user"


@pytest.mark.parametrize("eval", ["math500", ["math500"], "math500, svamp", {"math500": "hub"}])
def test_benchmarks_by_name_come_from_the_hub(eval, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"math500.*task\.eval=\{math500: <file>\}"):  # no network here
        Task(name="t", pool="p", eval=eval).evaluation_files(tmp_path, lambda text: None)


@pytest.mark.parametrize("eval", [["maths"], {"maths": "hub"}])
def test_names_that_are_no_benchmarks(eval, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.eval=maths names no benchmark"):
        Task(name="t", pool="p", eval=eval).evaluation_files(tmp_path)


def test_a_text_of_other_names_is_a_file(tmp_path: Path) -> None:
    assert Task(name="t", pool="p", eval="math500, maths").evaluation_files(tmp_path) == {
        "eval": Path("math500, maths")
    }


def test_embedded_files_are_written_once_and_by_their_settings(tmp_path: Path) -> None:
    calls = []

    def generate(folder: Path, *, count: int) -> None:
        calls.append(count)
        numbers(folder, count=count)

    def task(count: int) -> EmbeddedTask:
        return EmbeddedTask(name="t", generate=generate, sets={"eval": "eval.jsonl"}, settings={"count": count})

    pool, sets = task(2).sources(tmp_path)
    again, _ = task(2).sources(tmp_path)
    other, _ = task(3).sources(tmp_path)
    assert calls == [2, 3]
    assert pool == again != other
    assert (pool.read_text(), other.read_text()) == ("2", "3")
    assert sets["eval"].is_file()


def test_embedded_files_of_a_killed_writer_are_written_again(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        (folder / "pool.jsonl").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EmbeddedTask(name="t", generate=killed).sources(tmp_path)
    pool, _ = EmbeddedTask(name="t", generate=numbers).sources(tmp_path)
    assert pool.read_text() == "2"


def test_an_embedded_task_takes_a_pool_of_the_users_own(tmp_path: Path) -> None:
    task = EmbeddedTask(name="t", generate=numbers, sets={"eval": "eval.jsonl"}, pool="mine.jsonl")
    pool, sets = task.sources(tmp_path)
    assert pool == "mine.jsonl"
    assert sets["eval"].is_file()


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
