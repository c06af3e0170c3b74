"""Tasks say where their files are; the embedded one writes its own, once."""

import json
from pathlib import Path

import pytest

from lark.tasks.files import EmbeddedTask, Task


def numbers(folder: Path, *, count: int = 2) -> None:
    (folder / "pool.jsonl").write_text(json.dumps(count))
    (folder / "eval.jsonl").write_text("")


def test_one_evaluation_file_or_several_by_name() -> None:
    pool, sets = Task(name="t", pool=["a", "b"], eval="e.jsonl").sources(Path("cache"))
    assert (pool, sets) == (["a", "b"], {"eval": Path("e.jsonl")})
    assert Task(name="t", pool="a").sources(Path("cache"))[1] == {}
    several = Task(name="t", pool="a", eval={"easy": "x.jsonl", "hard": "y.jsonl"})
    assert several.sources(Path("cache"))[1] == {"easy": Path("x.jsonl"), "hard": Path("y.jsonl")}


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
