"""docs/pools.md: its commands, on small files of the names that they use; what needs the hub composes and builds."""

import json
import shlex
from pathlib import Path

import pytest
import teacher_folder as rsr
from lark_command import SMALL, lark
from pages import commands, text_of

from lark import config as configuration
from lark.tasks.arithmetic import generate
from lark.tasks.gold_steps import WITH_STEPS

PAGE = "docs/pools.md"
LINES = commands(PAGE)
HUB = ("task=math", "task.pool=open-r1/", "task.pool=simplescaling/")
SMALL_GYM = ["task.settings.problems=12", "task.settings.eval_problems=3", "task.settings.harder_problems=2"]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    generate(folder, problems=12, eval_problems=2, shifted_problems=1)
    for name in ("a", "b", "c"):
        rows = [{"trajectory": f"I am {name}. So \\boxed{{{rsr.gold(i)}}}"} for i in range(10, 14)]
        write_rows(folder / "by_teacher" / f"{name}.jsonl", rows)
    questions = range(10, 14)
    write_rows(folder / "problems.jsonl", [{"id": i - 10, "problem": rsr.question(i), "answer": 1} for i in questions])
    talks = [
        {"conversations": [{"from": "human", "value": rsr.question(i)}, {"from": "gpt", "value": m}], "model": m}
        for i in questions
        for m in ("x", "y", "z")
    ]
    write_rows(folder / "talks.jsonl", talks)
    write_rows(folder / "test.jsonl", [{"question": "How many are 6 apples and 1?", "answer": "It is 7.\n#### 7"}])
    (folder / "sampled.jsonl").write_text((folder / "pool.jsonl").read_text())
    return folder


@pytest.mark.parametrize("line", LINES)
def test_commands(line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    words = shlex.split(line)[3:]
    if any(mark in line for mark in HUB):
        done = lark(*words, "--cfg", "job")
        assert done.code == 0, done.err
        return
    gym = SMALL_GYM if "reasoning_gym" in line else []
    done = lark(*words, *SMALL, *gym, "task.max_length=512", "stop_after=selection")
    assert done.code == 0, done.err


def test_the_page_names_the_tasks_there_are() -> None:
    table = text_of(PAGE).partition("| `task=` |")[2].partition("\n\n")[0]
    assert {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")} == set(
        configuration.options("task")
    )


def test_the_page_names_the_data_sets_with_worked_solutions() -> None:
    paragraph = text_of(PAGE).partition("Worked solutions exist")[2].partition("\n\n")[0]
    from reasoning_gym.factory import DATASETS

    assert {name for name in DATASETS if f"`{name}`" in paragraph} == set(WITH_STEPS)
    assert f"All {len(DATASETS) - 1} data sets" in text_of(PAGE) and f"all {len(DATASETS) - 1}:" in paragraph
