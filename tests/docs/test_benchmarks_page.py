"""docs/benchmarks.md: its commands, its tables and the line it shows."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from lark_command import lark
from pages import blocks, commands, text_of

from lark.benchmarks import BENCHMARKS, describe, is_benchmark, main
from lark.tasks.benchmark_rows import _ANSWER, _ID, _OPTIONS
from lark.tasks.prompts import PROMPTS

PAGE = "docs/benchmarks.md"
COMMANDS = [shlex.split(line) for line in commands(PAGE)]


@pytest.mark.parametrize("words", [w[3:] for w in COMMANDS if w[2:3] == ["lark.run"]], ids=" ".join)
def test_runs_compose(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = lark(*words, "--cfg", "job")
    assert done.code == 0, done.err
    (sets,) = (word.removeprefix("task.eval=") for word in words if word.startswith("task.eval="))
    names = [item.partition(":")[0].strip() for item in sets[1:-1].split(",")]
    assert all(is_benchmark(name) or name == "mine" for name in names)
    assert all(re.search(rf"^ +(- )?{name}\b", done.out, re.MULTILINE) for name in names)


@pytest.mark.parametrize("words", [w[3:] for w in COMMANDS if w[2:3] == ["lark.benchmarks"]], ids=" ".join)
def test_benchmarks_are_prepared(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"unique_id": "test/a.json", "problem": "1 + 1?", "answer": "2", "level": 1}
    Path("math500.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(sys, "argv", ["lark.benchmarks", *words])
    if words and not any("=" in word for word in words):  # from the hub, which no test reaches
        with pytest.raises(SystemExit, match=r"set task\.eval=\{aime24: <file>\}"):
            main()
        return
    main()
    printed = capsys.readouterr().out
    assert "1 + 1?" in printed if words else all(name in printed for name in BENCHMARKS)
    assert not words or len(list(Path("logs/cache/benchmarks").glob("math500-*/manifest.json"))) == 1


def test_the_table_is_of_the_benchmarks() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ([\d,]+) \| (\w+) \| .+? \| (\S+) \|$", text_of(PAGE), re.MULTILINE)
    expected = [(name, b.title, f"{b.problems:,}", b.checker, b.hub) for name, b in BENCHMARKS.items()]
    assert rows == expected


def test_the_line_of_a_set_is_printed_as_on_the_page() -> None:
    (shown,) = blocks(PAGE, "console")
    manifest = {"name": "math500", "problems": 500, "of": 500, "prompt": {"name": "boxed-1"}, "checker": "math"}
    manifest |= {"fingerprint": "...", "identity": {"benchmark": "math500", "source": {}}}
    assert shown.strip() == f"benchmark   {describe(manifest, None)}"


def test_prompts_and_columns_are_named() -> None:
    page = text_of(PAGE)
    assert all(f"`{name}`" in page for name in PROMPTS)
    assert f"`{PROMPTS['boxed-1'].system}`" in page
    columns = {re.sub(r"[\s_-]", "", name).lower() for name in re.findall(r"`([\w ]+)`", page)}
    assert {*_ID, *_ANSWER, *_OPTIONS} <= columns
