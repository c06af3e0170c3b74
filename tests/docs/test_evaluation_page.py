"""docs/evaluation.md: its commands, and what it says is printed."""

import json
import re
import shlex
from pathlib import Path

import lark_command
import pytest
from commands.test_evaluate import FEW
from lark_command import Done, lark
from pages import blocks, commands, text_of

from lark import evaluate as command

PAGE = "docs/evaluation.md"
COMMANDS = [shlex.split(line)[3:] for line in commands(PAGE)]
RUNS_HERE = [words for words in COMMANDS if not any(re.search("<|model=|devices", word) for word in words)]
COMPOSES = [words for words in COMMANDS if any(re.match("(model|checkpoint|trainer)=", word) for word in words)]
RECHECKS = [words for words in COMMANDS if words and words[0].startswith("recheck=")]


def evaluate(*words: object) -> Done:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lark_command, "command", command)
        return lark(*words)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    rows = [{"problem_id": i, "problem": f"What is {i} + 1?", "answer": str(i + 1), "level": i % 2} for i in range(3)]
    for name in ("eval", "hard"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_every_command_is_tried() -> None:
    assert len(RUNS_HERE) == 2 and len(COMPOSES) == 6 and len(RECHECKS) == 3
    assert len(RUNS_HERE) + len(COMPOSES) + len(RECHECKS) == len(COMMANDS)


@pytest.mark.parametrize("words", RUNS_HERE, ids=" ".join)
def test_commands_that_run_here(words: list[str], here: Path) -> None:
    samples = [] if "evaluation.samples=8" in words else ["evaluation.samples=2"]
    done = evaluate(*words, *(word for word in FEW if not word.startswith("evaluation.samples")), *samples)
    assert done.code == 0, done.err


@pytest.mark.parametrize("words", COMPOSES, ids=" ".join)
def test_commands_that_need_more_compose(words: list[str], here: Path) -> None:
    words = [re.sub("<([a-z]+)>", r"\1", word) for word in words if word != "-m"]
    words = [word.replace("run/baseline,run/selector", "run/selector") for word in words]
    done = evaluate(*words, "--cfg", "job")
    assert done.code == 0, done.err


def test_checking_again(here: Path) -> None:
    done = evaluate(*FEW, "hydra.run.dir=evaluation")
    assert done.code == 0, done.err
    for words in RECHECKS:
        done = evaluate(*(re.sub("<[a-z]+>", "evaluation", word) for word in words))
        assert done.code == 0, done.err
        assert "0 of 12 verdicts" in done.out


def test_the_table_is_as_on_the_page(here: Path) -> None:
    (shown,) = blocks(PAGE, "console")
    few = [word for word in FEW if not word.startswith("evaluation.samples")]
    lines = [line.rstrip() for line in evaluate(*few).out.splitlines()]
    for line in shown.strip().splitlines():
        figure = re.compile(r"\[?\d[\d.,]*[%,\]]?")
        words = [r"\S+" if figure.fullmatch(word) or "──" in word else re.escape(word) for word in line.split()]
        pattern = r"\s*" + r"\s+".join(words)
        assert any(re.fullmatch(pattern, found) for found in lines), line


def test_files_are_those_of_the_page(here: Path) -> None:
    evaluate(*FEW, "hydra.run.dir=evaluation")
    table = re.findall(r"^\| `([^`]+)` \|", text_of(PAGE), re.MULTILINE)
    named = {name.replace("<set>", of_set) for name in table for of_set in ("eval", "shifted")}
    assert {path.name for path in Path("evaluation").iterdir()} == named | {"plan.json"}
