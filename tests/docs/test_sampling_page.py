"""docs/sampling.md: its commands, its YAML, its flags and settings."""

import json
import re
import shlex
from pathlib import Path

import pytest
from chat_server import chat_server
from lark_command import lark
from pages import blocks, commands, text_of

from lark.sample import main, parser
from lark.tasks.arithmetic import generate
from lark.teachers.openai_teacher import LONGEST_WAIT
from lark.teachers.teachers import read_teachers

PAGE = "docs/sampling.md"
COMMANDS = [shlex.split(line) for line in commands(PAGE)]
SAMPLES = [words[3:] for words in COMMANDS if words[2] == "lark.sample"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generate(tmp_path, problems=1, eval_problems=6, shifted_problems=2)
    (tmp_path / "pool.jsonl").unlink()
    (tmp_path / "eval.jsonl").rename(tmp_path / "problems.jsonl")
    (tmp_path / "shifted.jsonl").rename(tmp_path / "eval.jsonl")
    (tmp_path / "teachers.yaml").write_text(blocks(PAGE, "yaml")[0])
    monkeypatch.setenv("FAR_API_KEY", "sk-0123456789abcdef")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_commands(place: Path) -> None:
    main([*SAMPLES[0], "--max-new-tokens", "80"])
    assert len((place / "pool.jsonl").read_text().splitlines()) == 24
    (run,) = (words[3:] for words in COMMANDS if words[2] == "lark.run")
    done = lark(*run, f"paths.logs={place / 'logs'}", "logger=csv")
    assert done.code == 0, done.err


@pytest.mark.parametrize("words", SAMPLES, ids=" ".join)
def test_commands_are_understood(place: Path, words: list[str]) -> None:
    arguments = parser().parse_args(words)
    teachers = read_teachers(arguments.teacher, arguments.teachers, arguments.key, {})
    assert teachers and all(teacher.url is None or teacher.read_key() for teacher in teachers)


def test_the_endpoint_of_the_page(place: Path) -> None:
    (words,) = (words for words in SAMPLES if any("https://" in word for word in words))
    with chat_server() as server:
        words = ["60000" if word == "60" else re.sub(r"https://[^#]+", server.url, word) for word in words]
        main([*words, "--checker", "number"])
    rows = [json.loads(line) for line in (place / "pool.jsonl").open()]
    further = {"num_tokens", "finish_reason", "model", "sampling", "seed"}
    assert len(rows) == 6 and further <= rows[0].keys() and rows[0]["candidate_id"] == "far-0"
    assert all(f"`{name}`" in text_of(PAGE) for name in further | {"candidate_id", "correct"})


def test_what_the_page_says_is_there() -> None:
    page, shown = text_of(PAGE), parser().format_help()
    for flag in re.findall(r"`(--[a-z-]+)", page):
        assert flag in shown
    assert LONGEST_WAIT == 15 * 60 and "beyond 15 minutes" in page
