"""Every command of the README and of docs/ is one that the programs understand; four of them run."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lark_command import SMALL, lark
from omegaconf import OmegaConf
from pages import ROOT, blocks, commands

from lark import config as configuration

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
LINES = sorted(
    {line for page in PAGES for line in commands(page, "bash", "sbatch") if re.search(r"-m lark\.\w+", line)}
)
COMPOSED = ("run", "evaluate")


def split(line: str) -> tuple[str, list[str]]:
    """The command's name and its words; what stands for a folder becomes one."""
    words = shlex.split(re.sub(r"<([\w ]+)>", lambda name: name[1].replace(" ", "-"), line))
    start = next(i for i, word in enumerate(words) if re.fullmatch(r"lark\.\w+", word))
    return words[start].removeprefix("lark."), words[start + 1 :]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with the Python and YAML files that pages have saved, and a student's file."""
    folder = tmp_path_factory.mktemp("workplace")
    for block in [block for page in PAGES for block in blocks(page, "python", "yaml")]:
        name = block.partition("\n")[0].removeprefix("# ")
        if re.fullmatch(r"[\w/]+\.(py|yaml)", name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(block, encoding="utf-8")
    return folder


@pytest.mark.parametrize("line", [line for line in LINES if split(line)[0] in COMPOSED])
def test_runs_compose(line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)  # another test's
    monkeypatch.setattr("lark.tasks.task.Task.check_files", lambda task: None)  # a page's files are the reader's
    name, words = split(line)
    if "--config-path" in words:  # a replay: its configuration is the run's
        return
    search = []
    if "--config-dir" in words:
        search = [f"hydra.searchpath=[file://{workplace / words.pop(words.index('--config-dir') + 1)}]"]
    overrides = [word for word in words if not word.startswith("-") and word not in ("job", "all")]
    first = [word if re.search(r"[\[{\"]", word) else word.partition(",")[0] for word in overrides]
    configuration.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configuration.find_conf()), version_base="1.3"):
        config = compose("evaluate" if name == "evaluate" else "config", [*search, *first], return_hydra_config=True)
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    if name == "run":
        configuration.check_config(own)
        configuration.check_types(own)
    if "srun" in line:
        assert f"--nodes={config.trainer.num_nodes}" in line or "--nodes" not in line


@pytest.mark.parametrize("line", [line for line in LINES if split(line)[0] not in COMPOSED])
def test_other_commands_parse(line: str) -> None:
    name, words = split(line)
    importlib.import_module(f"lark.{name}").build_parser().parse_args(words)


@pytest.mark.parametrize("line", [line for line in commands("README.md") if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{line.split()[1]}:", text, re.MULTILINE)


@pytest.mark.slow
def test_four_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's first ones, on less data; later ones read what earlier ones wrote."""
    from lark.tasks.arithmetic import generate

    generate(tmp_path, problems=12, eval_problems=2, shifted_problems=1)
    monkeypatch.chdir(tmp_path)
    small = [
        *SMALL,
        "task.limit=10",
        "task.eval_limit=2",
        "sft.steps=1",
        "evaluation.samples=1",
        "evaluation.pass_at=[1]",
    ]
    own_pool = ["task=jsonl", "task.pool=pool.jsonl", "task.eval=eval.jsonl", "stop_after=selection"]
    for words in ([], own_pool, ["-m", "baseline=random,longest"]):
        done = lark(*words, *small)
        assert done.code == 0, done.err
    (multirun,) = Path("logs/multiruns").iterdir()
    report = importlib.import_module("lark.report")
    monkeypatch.setattr("sys.argv", ["lark.report", str(multirun)])
    report.main()
