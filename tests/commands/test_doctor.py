"""The doctor: what it says of a pool, and a command that works."""

import json
import shlex

import pytest

from lark import doctor


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Asks the doctor; returns its answer, or the message it ends with."""
    monkeypatch.chdir(tmp_path)

    def ask(*words):
        monkeypatch.setattr("sys.argv", ["lark.doctor", *words])
        doctor.main()
        return capsys.readouterr().out

    return ask


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_pool_in_another_shape(ask, tmp_path):
    rows = [
        {"question": f"What is {n} + {n}?", "response": f"It is \\boxed{{{n + n + wrong}}}.", "answer": n + n}
        for n in range(10)
        for wrong in (0, 1)
    ]
    rows += [rows[0], {**rows[1], "response": ""}, {**rows[1], "response": "so " * 200}]
    write(tmp_path / "pool[1].jsonl", rows)
    write(tmp_path / "eval.jsonl", rows[4:6])
    told = ask("pool[1].jsonl", "model=tiny", "eval=eval.jsonl", "task.max_length=99", "task.checker=number")
    for part in (
        "problem: question, trajectory: response, answer: answer",
        "22 trajectories of 10 problems",
        "1 empty trajectory",
        "pool[1].jsonl, line 22, response",
        "2 to 4 candidates",
        "50% right, 50% wrong",
        "1 trajectories repeat",
        "2 of 2 in eval",
        "more than task.max_length=99",
    ):
        assert part in told
    command = shlex.split(told.splitlines()[-1])
    assert command[:5] == ["python", "-m", "lark.run", "task=jsonl", 'task.pool="pool[1].jsonl"']
    advised = ["model=tiny", "task.eval=eval.jsonl", "task.checker=number", "task.on_error=drop", "task.overlap=drop"]
    assert set(advised) < set(command) and command[-2].startswith("task.max_length=")


def test_without_a_student_or_a_pool(ask, tmp_path):
    write(tmp_path / "pool.jsonl", [{"prompt": "?", "completion": "a"}, {"prompt": "?", "completion": "b"}])
    told = ask("pool.jsonl")
    assert "add model=" in told and "add eval=" in told and "budget=1" in told
    listed = ask()
    for name in ("lark ", "smollm2 ", "jsonl "):
        assert f"\n  {name}" in listed


@pytest.mark.parametrize("words", [["a", "b"], ["nope.jsonl"], ["model=tiny"], ["pool.jsonl", "budget=3"]])
def test_what_it_does_not_take(ask, words):
    with pytest.raises(SystemExit, match=r"^lark: "):
        ask(*words)
