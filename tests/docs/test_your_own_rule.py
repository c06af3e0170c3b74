"""docs/your_own_rule.md: every command in a user's folder, and what the page says the candidates and passes hold."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from lark_command import SMALL, Done, lark
from pages import blocks, commands, text_of

from lark.scoring import passes

PAGE = "docs/your_own_rule.md"
COMMANDS = commands(PAGE)
pytestmark = pytest.mark.slow
TINY = ["task.limit=10", "task.eval_limit=2", "task.max_new_tokens=8", "sft.steps=1", "evaluation.samples=1"]
SMALLEST = [*SMALL, *TINY, "evaluation.pass_at=[1]"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with nothing but the page's module; later commands find what earlier ones cached."""
    folder = tmp_path_factory.mktemp("workplace")
    (module,) = blocks(PAGE, "python")
    (folder / "my_rules.py").write_text(module)
    return folder


@pytest.fixture
def command(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend("")  # as `python -m` does
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)

    def run(line: str, *further: str) -> Done:
        return lark(*shlex.split(line.removeprefix("python -m lark.run ")), *SMALLEST, *further)

    yield run
    sys.modules.pop("my_rules", None)


def found(*words: str) -> str:
    """The first command of the page that holds all words."""
    return next(line for line in COMMANDS if all(word in line for word in words))


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_the_page(line: str, command) -> None:
    assert line.startswith("python -m lark.run ")
    done = command(line)
    assert done.code == 0, done.err


def test_the_score_decides_and_stands_beside_the_statistics(command) -> None:
    done = command(found("easy_for_its_length", "top_b"), "selector.name=mine")
    table = pq.read_table(done.folder / "statistics.parquet").to_pandas().dropna(subset="mine")  # without the filtered
    mean_tokens = table.groupby("problem_id")["num_tokens"].transform("mean")
    np.testing.assert_allclose(table["mine"], -table["loss"] + 0.1 * table["num_tokens"] / mean_tokens)
    lines = (done.folder / "selector" / "selection.jsonl").read_text().splitlines()
    chosen = {(m["problem_id"], m["candidate_id"]) for m in (json.loads(line)["meta"] for line in lines)}
    best = table.sort_values("mine", ascending=False).groupby("problem_id").head(2)
    assert chosen == set(zip(best["problem_id"], best["candidate_id"], strict=True))


def test_the_filter_acts_and_the_baseline_is_the_users(command) -> None:
    assert "dropped by filter" in command(found("filter={"), "filter.max=0.2").log
    assert "few_surprises " in command(found("baseline.score")).out


def test_only_what_is_needed_is_asked_of_the_student(command) -> None:
    without = command(found("few_lines"), "paths.cache=fresh")
    assert "no rule asks the student" in without.out and "score within problems against num_tokens" in without.log
    further = command(found("SmallLeaps"), "paths.cache=fresh")
    assert re.findall(r"(\w+ ?\w+): scoring", further.log) == ["statistics", "local windows"]
    again = command(found("easy_for_its_length"), "paths.cache=fresh")
    assert "found in the cache" in again.out and "local windows" not in again.log


def test_settings_of_a_class_are_checked(command) -> None:
    done = command(found("SmallLeaps"), "+selector.score.steps=2")
    assert (
        done.code == 1 and "selector.score.steps is not a setting; did you mean selector.score.steps_before" in done.err
    )


def names_of(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_page_lists_the_statistics_there_are(command) -> None:
    section = text_of(PAGE).partition("## What `candidates` holds")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in names_of(row)}
    table = pq.read_table(command(found("keep=tokens")).folder / "statistics.parquet")
    rules = {"lark", "few_surprises"}
    assert set(table.column_names) - rules <= listed
    assert listed - set(table.column_names) == {"answer", "text", "correct"}


def test_the_page_lists_the_passes_there_are() -> None:
    rows = [line.split("|")[1:4] for line in text_of(PAGE).splitlines() if re.match(r"\| `\w+\(", line)]
    listed = {re.findall(r"`(\w+)\(", name)[0]: names_of(columns) for name, _, columns in rows}
    kinds = {kind.__name__: kind for kind in passes.Pass.__subclasses__() if kind is not passes.Statistics}
    assert listed.keys() == kinds.keys()
    for name, columns in listed.items():
        told = (kinds[name].__doc__ or "").partition("Columns: ")[2]
        assert columns and all(re.search(rf"\b{column}\b", told) for column in columns), name
