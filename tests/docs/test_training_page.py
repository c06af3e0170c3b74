"""docs/training.md: its commands, and what it says is printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lark_command import SMALL, lark
from pages import ROOT, blocks, commands, text_of

PAGE = "docs/training.md"
COMMANDS = [shlex.split(line) for line in commands(PAGE)]


@pytest.mark.parametrize("words", [w[3:] for w in COMMANDS if w[2:3] == ["lark.run"]], ids=" ".join)
def test_lark_commands(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    on_hub = any(word.startswith("model=") for word in words)
    words = [word.replace("seed=0,1,2", "seed=0") for word in words]
    done = lark(*words, "--cfg", "job") if on_hub else lark(*words, *SMALL)
    assert done.code == 0, done.err


def test_what_an_arm_came_to_is_printed_as_on_the_page(tmp_path: Path) -> None:
    (printed,) = blocks(PAGE, "console")
    pattern = re.escape(printed.strip()).replace(r"\.\.\.", r"[\d,.]+").replace("1,024", r"1,024")
    # the limit is measured in longer trainings only
    pattern = pattern.replace(r";\ [\d,.]+%\ of\ the\ GEMM\ limit", r"(; \d+% of the GEMM limit)?")
    done = lark(*SMALL, "sft.steps=7", f"paths.logs={tmp_path}")
    assert re.search(pattern, done.out), done.out


def test_the_benchmark_says_what_the_page_says_it_takes() -> None:
    assert ["python", "benchmarks/train.py"] in COMMANDS
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in re.findall(r"`(--[a-z-]+)", text_of(PAGE)):
        assert flag in shown
