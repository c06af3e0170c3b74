"""Every command of the README, in its order, shrunken; what needs a hub or a GPU composes, and runs with `tiny`."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lark_command import SMALL, lark
from pages import ROOT, blocks, commands

from lark import config as configuration
from lark.tasks.arithmetic import generate

README = "README.md"
TINY = ["task.limit=10", "task.eval_limit=2", "task.max_new_tokens=8", "sft.steps=1", "evaluation.samples=1"]
SMALLEST = [*SMALL, *TINY, "evaluation.pass_at=[1]"]
HUB_MODELS = {f"model={name}" for name in ("smollm2", "qwen", "qwen_math", "qwen3", "llama")}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the files that the README's commands name, and the README's own module."""
    folder = tmp_path_factory.mktemp("workplace")
    generate(folder, problems=12, eval_problems=2, shifted_problems=1)
    (module,) = blocks(README, "python")
    (folder / "my_module.py").write_text(module)
    return folder


@pytest.mark.parametrize("line", [line for line in commands(README) if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    target = line.split()[1]
    plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"run": "-m lark.run", "test": "-m pytest"}[target] in plan


def test_lark_commands(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, since later commands read what earlier ones wrote."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    lines = [line for line in commands(README) if line.startswith("python -m lark.")]
    assert len(lines) > 10
    for line in lines:
        module, *words = shlex.split(line)[2:]
        if module == "lark.report":
            done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=True)
            assert ("tabular" if "latex" in words else "selector - baseline") in done.stdout
            continue
        words = ["seed=0" if word.startswith("seed=0,") else word for word in words]  # seeds differ in nothing here
        if HUB_MODELS & set(words):
            overrides = [word for word in words if not word.startswith("-")]
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(configuration.folder()), version_base="1.3"):
                configuration.check(compose("config", overrides))
            words = [word for word in words if not word.startswith("model.path=") and word != "trainer=ddp"]
            words = ["model=tiny" if word in HUB_MODELS else word for word in words]
        if "<run>" in words:
            summaries = sorted(workplace.glob("logs/runs/*/*/*/summary.json"), key=lambda path: path.stat().st_mtime)
            finished = [path for path in summaries if json.loads(path.read_text()).get("sets")]
            done = lark(*(str(finished[-1].parent) if word == "<run>" else word for word in words))
            assert done.code == 0, (line, done.err)
            continue
        if "trainer=ddp" in words:  # two processes: what Lightning launches must be a command, not this test
            done = subprocess.run([sys.executable, "-m", module, *words, *SMALLEST, "sft.batch_size=2"], check=False)
            assert done.returncode == 0, line
            continue
        done = lark(*words, *(() if "--cfg" in words else SMALLEST))
        assert done.code == 0, (line, done.err)


def test_table_in_readme_is_a_real_table() -> None:
    """The table shown is what the first command prints (its figures come from `make run` and are not repeated here)."""
    (table,) = blocks(README, "text")
    for word in ("before training", "baseline: random", "selector: lark", "held-out", "avg@4"):
        assert word in table
