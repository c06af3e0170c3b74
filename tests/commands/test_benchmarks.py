"""`python -m lark.benchmarks`: what it lists, prepares and shows."""

import json
import sys
from pathlib import Path

import pytest

from lark.benchmarks import main
from lark.tasks.benchmarks import BENCHMARKS, PROMPTS


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lark.benchmarks", *words])
    main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    command(monkeypatch)
    listed = capsys.readouterr().out
    for name, benchmark in BENCHMARKS.items():
        (line,) = (line for line in listed.splitlines() if line.split()[:1] == [name])
        assert f"{benchmark.hub}@{benchmark.revision}" in line and benchmark.prompt in line
    assert all(f"prompt {prompt.name} (sha256 {prompt.hash[:12]})" in listed for prompt in PROMPTS.values())
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"id": 7, "problem": "1 + 1?", "answer": "2"}) + "\n")
    command(monkeypatch, f"math500@boxed-user-1={source}", "--show", "--cache", str(tmp_path / "cache"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("benchmark  math500@boxed-user-1: 1 of the benchmark's 500 problems, ")
    assert Path(lines[1].strip()).is_file()
    assert lines[2:5] == ["problem 7", "--- user", "1 + 1?"] and lines[-2:] == ["--- gold (math)", "2"]
    with pytest.raises(SystemExit, match=r"^lark: .*nothing is not the name of a benchmark"):
        command(monkeypatch, "nothing")
