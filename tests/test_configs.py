"""Every option of every group composes with the real conf/ and builds; the group files follow one form."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf

from lark import config as configuration
from lark.config import build
from lark.diagnostics.diagnostics import Diagnostics
from lark.selection.rule import Rule
from lark.student.student import Student
from lark.tasks.task import Task
from lark.tracking.tracking import Csv, Wandb

CONF = configuration.find_conf()
OPTIONS = [(group, name) for group in configuration.GROUPS for name in configuration.list_options(group)]
REQUIRED = {
    ("task", "jsonl"): ["task.pool=pool.jsonl"],
    ("task", "hub"): ["task.pool=owner/name", "task.columns.messages=messages"],
    ("task", "teachers"): ["task.pool=folder"],
    ("selector", "custom"): ["selector.score=numpy:zeros"],
    ("baseline", "custom"): ["baseline.score=numpy:zeros"],
}
CLASSES = {
    "task": Task,
    "model": Student,
    "selector": Rule,
    "baseline": Rule,
    "logger": (Wandb, Csv),
    "diagnostics": Diagnostics,
}


def composed(*overrides: str) -> DictConfig:
    configuration.register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_option_composes_and_builds(group: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pool.jsonl").touch()  # named pools have to be there
    monkeypatch.chdir(tmp_path)
    config = composed(f"{group}={name}", *REQUIRED.get((group, name), []))
    configuration.check_config(config)
    configuration.check_types(config)
    assert config[group].name == name
    if group == "trainer":
        node = OmegaConf.masked_copy(config.trainer, [key for key in config.trainer if key != "name"])
        built = build(node)
        assert built.func is Trainer
        if name in ("auto", "cpu"):
            built(logger=False, enable_checkpointing=False)
    elif (group, name) == ("baseline", "none"):
        assert build(config.baseline) == {"name": "none"}
    else:
        assert isinstance(build(config[group]), CLASSES[group])
    for block in configuration.BLOCKS:  # a model may override the recipe
        build(config[block])


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_group_file_has_its_name_and_one_comment(group: str, name: str) -> None:
    lines = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    if group == "baseline" and name != "none":
        assert lines == ["defaults:", f"  - /selector@_here_: {name}"]
        return
    directives = [line for line in lines if line.startswith("# @package")]
    comments = [line for line in lines if line.startswith("#") and line not in directives]
    assert len(comments) == 1
    assert lines[len(directives)] == comments[0]


def test_every_rule_can_be_the_baseline() -> None:
    assert set(configuration.list_options("baseline")) == {*configuration.list_options("selector"), "none"}


@pytest.mark.parametrize("name", configuration.list_options("selector"))
def test_baseline_is_the_selector_of_its_name(name: str) -> None:
    config = composed(f"selector={name}", f"baseline={name}", "filter=correct")
    assert config.baseline == config.selector
    assert config.selector.filter == "correct"


def test_hub_models_name_their_weights_and_override_the_learning_rate() -> None:
    for name in ("smollm2", "qwen", "qwen_math", "qwen3", "llama"):
        config = composed(f"model={name}")
        assert "/" in config.model.id
        assert config.model.revision
        assert config.sft.lr == 1e-4
        assert composed(f"model={name}", "sft.lr=0.5").sft.lr == 0.5


def test_the_budget_and_the_seed_reach_the_rules() -> None:
    config = composed("budget=5", "seed=7", "baseline=random")
    assert (config.selector.policy.budget, config.baseline.policy.budget) == (5, 5)
    assert build(config.baseline).score.seed == 7


@pytest.mark.parametrize("block", configuration.BLOCKS)
def test_blocks_spell_out_every_setting(block: str) -> None:
    """What `--cfg job` prints is all there is."""
    node = composed()[block]
    assert set(node) - {"_target_"} == {field.name for field in dataclasses.fields(type(build(node))) if field.init}


def test_a_sweep_is_named_by_its_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["lark.run", *words])
        return OmegaConf.create({"name": "${lark.sweep:}"}).name

    configuration.register_resolvers()
    assert name("-m", "seed=0,1", "budget=2") == name("budget=2", "seed=0,1", "--multirun")
    assert name("-m", "seed=0,1") != name("-m", "seed=0,2")
    assert Path(name("-m")).name == name("-m")
