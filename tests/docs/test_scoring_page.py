"""docs/scoring.md: its commands, and every benchmark that it names, with sizes that a test can afford."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lark_command import SMALL, lark
from pages import ROOT, commands

COMMANDS = commands("docs/scoring.md")
SMALL_BENCHMARKS = {
    "score.py": (["--problems", "4"], {"ratio_plain", "share_of_gemm_limit", "peak_bytes", "trajectories_per_s"}),
    "long_row.py": (["--tokens", "600", "--vocabulary", "3000"], {"peak_bytes", "dense_logits_bytes"}),
    "precision.py": (["--problems", "4"], {"lark", "rsr", "likelihood", "largest_ce_difference"}),
    "memory.py": (["--problems", "10", "--times", "2", "--words", "4"], set()),
    "race.py": (["--problems", "40"], set()),
}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python -m lark.run")])
def test_lark_commands(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[3:]
    several = any("devices" in word for word in words)  # real ones are in test_equivalence and test_sharding
    done = lark(*words, "--cfg", "job") if several else lark(*words, *SMALL)
    assert done.code == 0, done.err


def test_every_benchmark_is_on_the_page() -> None:
    named = {line.split()[1].removeprefix("benchmarks/") for line in COMMANDS if "benchmarks/" in line}
    assert named == set(SMALL_BENCHMARKS)
    others = {
        "inputs.py",
        "selection.py",
        "contenders.py",
        "profiles.py",
        "train.py",  # docs/training.md
        "generate.py",
        "page.py",
        "sweeps.py",
        "verdicts.py",
    }
    assert named | others == {path.name for path in (ROOT / "benchmarks").glob("*.py")}


@pytest.mark.parametrize("name", SMALL_BENCHMARKS)
def test_benchmarks(name: str, tmp_path: Path) -> None:
    arguments, keys = SMALL_BENCHMARKS[name]
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert keys <= set(json.loads(done.stdout.splitlines()[-1]))
